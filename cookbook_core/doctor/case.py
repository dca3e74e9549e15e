"""A loss with a batch and plausible logprobs, to be run many times.

Each run gets its own copies, so a loss that changes its inputs cannot affect the next run, and the
same random seed, so two runs differ only in what was changed on purpose.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cookbook_core.custom_loss import LossFn, LossResult, LossTypeInput, differentiate, name_of
from cookbook_core.datums import SCORE_MASK, with_inputs
from cookbook_core.doctor.watch import watch_class
from cookbook_core.errors import ConfigError, CookbookError
from cookbook_core.types import Datum, ModelInput, TensorData

import numpy as np

if TYPE_CHECKING:
    import torch

Role: TypeAlias = Literal[
    "reference", "sampling", "logprobs", "advantages", "weights", "desirable", "probs", "reward", ""
]
MAX_CELLS = 20_000_000  # logprobs of a whole vocabulary: 160 MB in float64
_ROLES: tuple[tuple[Role, str], ...] = (
    ("reference", r"(ref|reference|base|initial)_.*(logp|lp)"),
    ("sampling", r"(sampling|sampled|sampler|old|behaviou?r|rollout|inf)_.*(logp|lp)|logprobs$"),
    ("logprobs", r".*logp"),
    ("advantages", r"adv"),
    ("weights", r".*(weight|mask)"),
    ("desirable", r"desirable"),
    ("probs", r".*(prob|dist|label|share)"),
    ("reward", r".*(reward|return|score|rating)"),
)


def role_of(key: str) -> Role:
    """Read the role of a loss input from its name; "" where the name does not say."""
    for role, pattern in _ROLES:
        if re.match(pattern, key.lower()):
            return role
    return ""


class WatchedInputs(dict[str, Any]):
    """A datum's loss inputs that add each name a loss looks up to `reads`."""

    def __init__(self, inputs: Mapping[str, Any], reads: set[str]) -> None:
        super().__init__(inputs)
        self._reads = reads

    def __getitem__(self, key: str) -> Any:
        self._reads.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._reads.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`."""
        self._reads.add(key)
        return super().get(key, default)


def copies(data: Sequence[Datum], reads: set[str]) -> list[Datum]:
    """Copy datums and their arrays; each input name that is looked up is added to `reads`."""
    made = []
    for datum in data:
        inputs = {
            key: TensorData(value.to_numpy(), dtype=value.dtype)
            for key, value in datum.loss_fn_inputs.items()
        }
        copy = Datum(datum.model_input, inputs)
        object.__setattr__(copy, "loss_fn_inputs", WatchedInputs(inputs, reads))
        made.append(copy)
    return made


@dataclass
class Case:
    """One loss on one batch.

    data: D datums.
    logprobs: D tensors, nats, float64 where the loss takes it, else float32.
    loss_type_input: what the logprobs are of, see `custom_loss.LossFn`.
    reads: names of the loss inputs that the loss has looked up.
    unit: number of neighbouring datums that belong together (pairs: 2); None before `batch.order`
        has run, and where the order matters.
    escapes, tape: see `watch.watch_class`.
    """

    loss_fn: LossFn
    data: list[Datum]
    logprobs: list[torch.Tensor]
    loss_type_input: LossTypeInput = "logprobs"
    reads: set[str] = field(default_factory=set)
    unit: int | None = None
    escapes: list[str] = field(default_factory=list)
    tape: list[Any] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The name of the loss in messages."""
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
        """Compute loss, metrics and gradient on copies, with a fixed random seed.

        Raises:
            CookbookError: the error that a training client would raise.
        """
        import torch

        def watched(batch: list[Datum], leaves: list[Any]) -> Any:
            with watch or nullcontext():
                return self.loss_fn(batch, leaves)

        watched.__name__ = name_of(self.loss_fn)
        batch = copies(self.data if data is None else data, self.reads)
        values = self.logprobs if logprobs is None else logprobs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return differentiate(watched, batch, values, views=[torch.clone] * len(values))

    @functools.cached_property
    def base(self) -> LossResult:
        """The result on the unchanged batch; fills `tape` and `escapes`."""
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
        """Which positions of datum i should get gradient, bool `(N,)`; None where nothing says so.

        Those whose weight is not 0 and, in a loss that reads advantages, whose advantage is not 0.
        """
        inputs, n, marks = self.data[i].loss_fn_inputs, self.data[i].model_input.length, []
        for key in {"weights", *self.keys("weights"), *self.keys("advantages")} & set(inputs):
            on = inputs[key].to_numpy() != 0
            marks.append(on.reshape(n, -1).any(axis=1) if on.shape[:1] == (n,) else on.any())
        marks = [np.broadcast_to(mark, n) for mark in marks]
        return np.logical_and.reduce(marks) if marks else None

    def with_side_data(self, change: Callable[[str, int, tuple[int, ...]], Any]) -> list[Datum]:
        """Replace inputs by change(key, i, shape); None keeps the input."""
        made = []
        for i, datum in enumerate(self.data):
            new = {k: change(k, i, tuple(v.shape)) for k, v in datum.loss_fn_inputs.items()}
            arrays = {k: TensorData(v, dtype="float64") for k, v in new.items() if v is not None}
            made.append(with_inputs(datum, **arrays))
        return made

    def filled(self, names: set[str], value: float) -> list[Datum]:
        """Fill the inputs of these names with one value."""
        return self.with_side_data(
            lambda k, _, shape: np.full(shape, value) if k in names else None
        )

    def at_step_0(self) -> list[Datum]:
        """Set reference and sampling logprobs to the policy's: the state before step 1."""
        keys = {*self.keys("reference"), *self.keys("sampling")}
        lps = [lp.numpy() for lp in self.logprobs]
        return self.with_side_data(
            lambda k, i, shape: lps[i] if k in keys and lps[i].shape == shape else None
        )


def per_token(datum: Datum) -> list[str]:
    """List the datum's inputs that have one entry per position."""
    n = datum.model_input.length
    return [
        key
        for key, value in datum.loss_fn_inputs.items()
        if value.shape[:1] == [n] and role_of(key) != "probs"
    ]


def take_rows(datum: Datum, rows: np.ndarray) -> Datum:
    """Build a datum of these positions, in this order; -1 adds a new position of weight 0.

    rows: `(M,)` int64. Positions of images have token 0: a loss is not given the images.
    """
    tokens = np.asarray(datum.model_input.ids())[rows]
    inputs = dict(datum.loss_fn_inputs)
    for key in per_token(datum):
        array = inputs[key].to_numpy()[rows]
        if key != "target_tokens":
            array[rows < 0] = 0
        inputs[key] = TensorData(array, dtype=inputs[key].dtype)
    return Datum(ModelInput.from_ints(tokens.tolist()), inputs)


def draw_logprobs(
    data: Sequence[Datum], loss_type_input: LossTypeInput, seed: int
) -> list[torch.Tensor]:
    """Draw plausible logprobs of the datums' targets: float64, nats, seeded.

    They lie near the datum's sampling logprobs or else its reference logprobs, as those of a policy
    one step away. They are 0.0 where "score_mask" is 0, as in training.

    Returns:
        D tensors `(N,)`, `(N, K)` or `(N, V)`.
    Raises:
        ConfigError: the whole vocabulary's logprobs have more than MAX_CELLS entries.
    """
    import torch

    rng = np.random.default_rng(seed)
    vocab = 1 + max(max(datum.model_input.ids(), default=0) for datum in data)
    for datum in data:
        if targets := datum.loss_fn_inputs.get("target_tokens"):
            vocab = max(vocab, 1 + int(targets.to_numpy().max()))
    cells = vocab * sum(datum.model_input.length for datum in data)
    if loss_type_input == "vocab_logprobs" and cells > MAX_CELLS:
        rule, fix = f"at most {MAX_CELLS} logprobs", "Examine fewer or shorter datums."
        raise ConfigError(
            "data", "too large a table of logprobs", expected=rule, got=cells, fix=fix
        )
    drawn = []
    for datum in data:
        n, targets = datum.model_input.length, datum.loss_fn_inputs.get("target_tokens")
        shape = [n] if targets is None else list(targets.shape)
        if loss_type_input == "vocab_logprobs" or len(shape) == 2:
            size = vocab if loss_type_input == "vocab_logprobs" else shape[1] + 3
            logits = rng.normal(size=(n, size))
            lp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            lp = lp if loss_type_input == "vocab_logprobs" else lp[:, : shape[1]]
        else:
            lp = -0.2 - rng.exponential(size=n)
            for role, spread in (("reference", 0.3), ("sampling", 0.05)):
                for key, value in datum.loss_fn_inputs.items():
                    if role_of(key) == role and value.shape == shape:
                        center = value.to_numpy()
                        near = np.minimum(center + spread * rng.normal(size=n), -0.01)
                        lp = np.where(center != 0, near, lp)
        if SCORE_MASK in datum.loss_fn_inputs:
            lp[datum.loss_fn_inputs[SCORE_MASK].to_numpy() == 0] = 0.0
        drawn.append(torch.tensor(lp))
    return drawn


def make_case(
    loss_fn: LossFn,
    data: Sequence[Datum],
    logprobs: Sequence[Any] | None,
    loss_type_input: LossTypeInput,
    seed: int,
) -> Case:
    """Build a case in float64, or in float32 where the loss runs in that alone."""
    import torch

    values = draw_logprobs(data, loss_type_input, seed) if logprobs is None else list(logprobs)
    values = [torch.as_tensor(lp).detach().double() for lp in values]
    case = Case(loss_fn, list(data), values, loss_type_input)
    try:
        case.run()
    except CookbookError:
        single = Case(loss_fn, list(data), [lp.float() for lp in values], loss_type_input)
        try:
            single.run()
            return single
        except CookbookError:
            pass
    return case
