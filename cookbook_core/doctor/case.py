"""A loss, a batch and made-up logprobs, asked the same question many times.

Each call gets copies of its own, so a loss that changes its inputs cannot spoil the next answer,
and the same random seed, so that what differs between two calls is what was changed on purpose.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from cookbook_core.custom_loss import LossFn, LossResult, LossTypeInput, differentiate, name_of
from cookbook_core.datums import SCORE_MASK, with_inputs
from cookbook_core.doctor.watch import watch_class
from cookbook_core.errors import ConfigError, CookbookError
from cookbook_core.types import Datum, ModelInput, TensorData

if TYPE_CHECKING:
    import torch

Role: TypeAlias = Literal[
    "reference", "sampling", "logprobs", "advantages", "weights", "probs", "reward", ""
]
MAX_CELLS = 20_000_000
_ROLES: tuple[tuple[Role, str], ...] = (
    ("reference", r"(ref|reference|base|initial)_.*(logp|lp)"),
    ("sampling", r"(sampling|sampled|sampler|old|behaviou?r|rollout|inf)_.*(logp|lp)|logprobs$"),
    ("logprobs", r".*logp"),
    ("advantages", r"adv"),
    ("weights", r".*(weight|mask)"),
    ("probs", r".*(prob|dist|label|share)"),
    ("reward", r".*(reward|return|score|rating)"),
)


def role_of(key: str) -> Role:
    """What a loss input is by its name; "" where the name does not say."""
    found: list[Role] = [role for role, pattern in _ROLES if re.match(pattern, key.lower())]
    return found[0] if found else ""


class WatchedInputs(dict[str, Any]):
    """A datum's loss inputs that remember which names were asked for."""

    def __init__(self, inputs: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(inputs)
        self._asked = asked

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As dict's."""
        self._asked.add(key)
        return super().get(key, default)


def copies(data: Sequence[Datum], asked: set[str]) -> list[Datum]:
    """Equal datums with arrays of their own; the names they are asked for go to `asked`."""
    made = []
    for datum in data:
        inputs = {
            key: TensorData(value.to_numpy(), dtype=value.dtype)
            for key, value in datum.loss_fn_inputs.items()
        }
        copy = Datum(datum.model_input, inputs)
        object.__setattr__(copy, "loss_fn_inputs", WatchedInputs(inputs, asked))
        made.append(copy)
    return made


@dataclass
class Case:
    """One loss on one batch.

    data: D datums. logprobs: D tensors, nats, float64 where the loss takes it, else float32.
    reads: names of loss inputs the loss asked for. unit: how many neighbouring datums belong
    together (pairs: 2), None until `checks.order` has found it or when the order matters.
    """

    loss_fn: LossFn
    data: list[Datum]
    logprobs: list[torch.Tensor]
    form: LossTypeInput = "logprobs"
    reads: set[str] = field(default_factory=set)
    unit: int | None = None
    escapes: list[str] = field(default_factory=list)
    tape: list[Any] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The loss as messages call it."""
        return f"{name_of(self.loss_fn)}()"

    @property
    def exact(self) -> bool:
        """Whether the logprobs are float64."""
        return str(self.logprobs[0].dtype) == "torch.float64"

    @property
    def tolerance(self) -> float:
        """Relative difference below which two losses are the same number."""
        return 1e-7 if self.exact else 1e-3

    def same(self, a: float, b: float, scale: float = 0.0) -> bool:
        """Whether two numbers are equal up to rounding in sums of size `scale`."""
        return abs(a - b) <= self.tolerance * max(abs(a), abs(b), scale, 1e-6)

    def run(
        self,
        data: Sequence[Datum] | None = None,
        logprobs: Sequence[torch.Tensor] | None = None,
        watch: Any = None,
    ) -> LossResult:
        """Loss, metrics and gradient, on copies, with the random seed set.

        Raises:
            CookbookError: what the training client would have raised.
        """
        import torch

        def watched(given: list[Datum], leaves: list[Any]) -> Any:
            with watch or nullcontext():
                return self.loss_fn(given, leaves)

        watched.__name__ = name_of(self.loss_fn)
        given = copies(self.data if data is None else data, self.reads)
        values = self.logprobs if logprobs is None else logprobs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return differentiate(watched, given, values, view=torch.clone)

    @functools.cached_property
    def base(self) -> LossResult:
        """The result on the batch as it is; fills `tape` and `escapes`."""
        watch = watch_class()()
        result = self.run(watch=watch)
        self.tape, self.escapes = watch.tape, list(dict.fromkeys(watch.escapes))
        return result

    @property
    def steepest(self) -> float:
        """The largest |d loss / d logprob| of the batch."""
        return max(float(g.abs().max()) for g in self.base.grads)

    def keys(self, role: Role) -> list[str]:
        """Names of the inputs with this role that the loss reads and the first datum has."""
        have = self.data[0].loss_fn_inputs
        return sorted(key for key in self.reads if role_of(key) == role and key in have)

    def weighted(self, i: int) -> np.ndarray | None:
        """Positions of datum i that carry loss `(N,)`, or None where nothing says which.

        They are those with a weight; a loss driven by advantages needs these to be not 0 too.
        """
        inputs, n, marks = self.data[i].loss_fn_inputs, self.data[i].model_input.length, []
        for key in {"weights", *self.keys("weights"), *self.keys("advantages")} & set(inputs):
            on = inputs[key].to_numpy() != 0
            marks.append(on.reshape(n, -1).any(axis=1) if on.shape[:1] == (n,) else on.any())
        marks = [np.broadcast_to(mark, n) for mark in marks]
        return np.logical_and.reduce(marks) if marks else None

    def with_side_data(self, change: Callable[[str, int, tuple[int, ...]], Any]) -> list[Datum]:
        """The datums with each input replaced by change(key, i, shape), kept where that is None."""
        made = []
        for i, datum in enumerate(self.data):
            new = {k: change(k, i, tuple(v.shape)) for k, v in datum.loss_fn_inputs.items()}
            arrays = {k: TensorData(v, dtype="float64") for k, v in new.items() if v is not None}
            made.append(with_inputs(datum, **arrays))
        return made

    def filled(self, names: set[str], value: float) -> list[Datum]:
        """The datums with these inputs equal to value throughout."""
        return self.with_side_data(
            lambda k, _, shape: np.full(shape, value) if k in names else None
        )

    def at_step_0(self) -> list[Datum]:
        """The datums with reference and sampling logprobs equal to the logprobs."""
        keys = {*self.keys("reference"), *self.keys("sampling")}
        lps = [lp.numpy() for lp in self.logprobs]
        return self.with_side_data(
            lambda k, i, shape: lps[i] if k in keys and lps[i].shape == shape else None
        )


def per_token(datum: Datum) -> list[str]:
    """Names of the datum's inputs that have one entry per position."""
    n = datum.model_input.length
    return [
        key
        for key, value in datum.loss_fn_inputs.items()
        if value.shape[:1] == [n] and role_of(key) != "probs"
    ]


def take_rows(datum: Datum, rows: np.ndarray) -> Datum:
    """The datum made of these positions, in this order; -1 stands for a new one of weight 0."""
    tokens = np.asarray(datum.model_input.to_ints())[rows]
    inputs = dict(datum.loss_fn_inputs)
    for key in per_token(datum):
        array = inputs[key].to_numpy()[rows]
        if key != "target_tokens":
            array[rows < 0] = 0
        inputs[key] = TensorData(array, dtype=inputs[key].dtype)
    return Datum(ModelInput.from_ints(tokens.tolist()), inputs)


def draw_logprobs(data: Sequence[Datum], form: LossTypeInput, seed: int) -> list[torch.Tensor]:
    """Plausible logprobs of the datums' targets, float64, nats, seeded.

    Near what the sampler or, failing that, the reference gave, where the datum says so: a policy
    one step away from them. 0.0 where "score_mask" is 0, as in training.
    """
    import torch

    rng = np.random.default_rng(seed)
    vocab = 1 + max(max(datum.model_input.to_ints(), default=0) for datum in data)
    for datum in data:
        if targets := datum.loss_fn_inputs.get("target_tokens"):
            vocab = max(vocab, 1 + int(targets.to_numpy().max()))
    cells = vocab * sum(datum.model_input.length for datum in data)
    if form == "vocab_logprobs" and cells > MAX_CELLS:
        rule, mend = f"at most {MAX_CELLS} logprobs", "Examine fewer or shorter datums."
        raise ConfigError(
            "data", "too large a table of logprobs", expected=rule, got=cells, fix=mend
        )
    drawn = []
    for datum in data:
        n, targets = datum.model_input.length, datum.loss_fn_inputs.get("target_tokens")
        shape = [n] if targets is None else list(targets.shape)
        if form == "vocab_logprobs" or len(shape) == 2:
            width = vocab if form == "vocab_logprobs" else shape[1] + 3
            scores = rng.normal(size=(n, width))
            lp = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
            lp = lp if form == "vocab_logprobs" else lp[:, : shape[1]]
        else:
            lp = -0.2 - rng.exponential(size=n)
            for role, spread in (("reference", 0.3), ("sampling", 0.05)):
                for key, value in datum.loss_fn_inputs.items():
                    if role_of(key) == role and value.shape == shape:
                        known = value.to_numpy()
                        near = np.minimum(known + spread * rng.normal(size=n), -0.01)
                        lp = np.where(known != 0, near, lp)
        if SCORE_MASK in datum.loss_fn_inputs:
            lp[datum.loss_fn_inputs[SCORE_MASK].to_numpy() == 0] = 0.0
        drawn.append(torch.tensor(lp))
    return drawn


def make_case(
    loss_fn: LossFn,
    data: Sequence[Datum],
    logprobs: Sequence[Any] | None,
    form: LossTypeInput,
    seed: int,
) -> Case:
    """A case in float64, or in float32 where the loss runs in that alone."""
    import torch

    values = draw_logprobs(data, form, seed) if logprobs is None else list(logprobs)
    values = [torch.as_tensor(lp).detach().double() for lp in values]
    case = Case(loss_fn, list(data), values, form)
    try:
        case.run()
    except CookbookError:
        single = Case(loss_fn, list(data), [lp.float() for lp in values], form)
        try:
            single.run()
            return single
        except CookbookError:
            pass
    return case
