"""The custom-loss driver: logprobs out, the user's loss, a gradient in.

    params --model--> logprobs l --loss_fn--> C(l)          dC/dparams = (dC/dl) (dl/dparams)

The graph is cut at l. `differentiate` runs the user's loss on detached leaves and returns
g = dC/dl; whoever holds the model pushes g back. In one process the forward's own graph is still
there, so that is one forward and one backward (`backend/local`). Where it is not (a remote
service, a batch whose graph does not fit), the linear surrogate sum(-w * l) with w = -g has the
same gradient and costs a second forward: `surrogate_datums`, `forward_backward_two_pass`.

Source: the linear surrogate is the one of Thinking Machines' custom-loss page; Fireworks' and
Tinkex's modules use the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from cookbook_core.errors import (
    ConfigError,
    CookbookError,
    DatumError,
    LossError,
    check_choice,
    raise_all,
)
from cookbook_core.types import Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import torch

LossFn: TypeAlias = Callable[[list[Datum], "list[torch.Tensor]"], tuple[Any, Mapping[str, Any]]]
"""loss_fn(data, logprobs_list) -> (loss, metrics).

logprobs_list[i]: log p of data[i]'s target_tokens in nats, same shape, `(N,)` or `(N, K)`; with
loss_type_input="vocab_logprobs" log p of every token at every position, `(N, V)`.
loss: 0-d tensor that depends on them. metrics: floats or 0-d tensors by name.
"""

LossTypeInput: TypeAlias = Literal["logprobs", "vocab_logprobs"]
"""What a custom loss is given for each datum: see `LossFn`."""

RESERVED_METRICS = ("loss", "loss:sum")


@dataclass(frozen=True)
class LossResult:
    """loss in the loss's own unit; grads[i] = d loss / d logprobs[i], same shape.

    param_grads: d loss / d params of the parameters given to `differentiate`, None where unused.
    """

    loss: float
    metrics: dict[str, float]
    grads: list[torch.Tensor]
    param_grads: Sequence[torch.Tensor | None] = field(default_factory=list)


def check_loss(loss_fn: Any, loss_type_input: str | None) -> LossTypeInput:
    """The form of logprobs that `loss_fn` is to be given, None meaning "logprobs".

    Raises:
        ConfigError: an unknown form, or a loss that is not a function.
    """
    if loss_type_input is not None:
        forms = get_args(LossTypeInput)
        check_choice(ConfigError, "loss_type_input", "unknown form", loss_type_input, forms)
    if not callable(loss_fn):
        raise ConfigError(
            "loss_fn",
            "not a function",
            expected="loss_fn(data, logprobs_list) -> (loss, metrics)",
            got=repr(loss_fn),
            fix="Built-in losses by name go to forward_backward().",
        )
    return "vocab_logprobs" if loss_type_input == "vocab_logprobs" else "logprobs"


def name_of(loss_fn: Any) -> str:
    """What to call a loss in a message (functools.partial and callables included)."""
    inner = getattr(loss_fn, "func", loss_fn)
    return getattr(inner, "__name__", type(inner).__name__)


def logprobs_from_output(
    output: ForwardBackwardOutput, data: Sequence[Datum]
) -> list[torch.Tensor]:
    """Per-datum logprobs out of a forward's output, order and shape kept, never flattened.

    Raises:
        DatumError: a datum has no logprobs, or they have another shape than its target_tokens.
    """
    if len(output.loss_fn_outputs) != len(data):
        raise DatumError(
            "forward output",
            "not one per datum",
            expected=len(data),
            got=len(output.loss_fn_outputs),
        )
    problems, logprobs = [], []
    for i, (out, datum) in enumerate(zip(output.loss_fn_outputs, data, strict=True)):
        found = out.get("logprobs")
        expected = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        if found is None or list(found.shape) != list(expected):
            got = "nothing" if found is None else tuple(found.shape)
            where = f'output[{i}]["logprobs"]'
            problems.append(
                DatumError(where, "not that of target_tokens", expected=tuple(expected), got=got)
            )
        else:
            logprobs.append(found.to_torch())
    raise_all(problems)
    return logprobs


def differentiate(
    loss_fn: LossFn,
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    view: Callable[[torch.Tensor], Any] | None = None,
    params: Sequence[torch.Tensor] = (),
) -> LossResult:
    """Run the loss once on detached leaves and return its value, metrics and gradient.

    Args:
        loss_fn: see `LossFn`.
        data: D datums.
        logprobs: D tensors, nats, any shape; not modified. With a `view`, whatever it takes.
        view: the loss is given view(leaf) instead of the leaf (hidden states seen as logprobs).
        params: further tensors that the view depends on.
    Returns:
        LossResult; a datum the loss did not use gets a zero gradient.
    Raises:
        LossError: the loss raised, returned another structure, or its value cannot be
            differentiated: not 0-d, detached, not finite, or a gradient that is not finite (the
            message names the datum and position). Also for a metric that is not a number.
    """
    import torch

    leaves = [lp.detach().clone().requires_grad_(True) for lp in logprobs]
    where = f"{name_of(loss_fn)}()"
    with torch.enable_grad():
        try:
            returned = loss_fn(list(data), [view(leaf) if view else leaf for leaf in leaves])
        except CookbookError:
            raise
        except Exception as error:
            what, rule = f"raised {type(error).__name__}: {error}", "(loss, metrics)"
            mend = "Nothing was accumulated; gradients and weights are as they were."
            raise LossError(where, what, expected=rule, got="this exception", fix=mend) from error
        loss, metrics = _check_returned(where, returned)
        if not loss.requires_grad:
            raise LossError(
                where,
                "the loss is detached from the logprobs",
                expected="a loss computed from logprobs_list",
                got="requires_grad=False",
                fix="Look for .item(), .detach(), torch.tensor(...) or numpy on the way.",
            )
        try:
            found = torch.autograd.grad(loss, [*leaves, *params], allow_unused=True)
        except Exception as error:
            raise LossError(
                where,
                "no gradient can be taken of what it returned",
                expected="a loss that autograd can differentiate",
                got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                fix="Return the loss without calling .backward() on it, and change no tensor in "
                "place.",
            ) from error
    grads, param_grads = found[: len(leaves)], list(found[len(leaves) :])
    if all(g is None for g in grads):
        raise LossError(
            where, "the loss uses no datum", expected="a loss computed from logprobs_list", got=loss
        )
    full = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    ]
    _check_grads(where, full, None if view else leaves)
    return LossResult(loss.item(), metrics, full, param_grads)


def evaluate(
    loss_fn: LossFn, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
) -> LossResult:
    """Like `differentiate`, without gradients: for `forward` (grads is empty)."""
    import torch

    with torch.no_grad():
        loss, metrics = _check_returned(
            f"{name_of(loss_fn)}()", loss_fn(list(data), list(logprobs))
        )
    return LossResult(loss.item(), metrics, [])


def _check_returned(where: str, returned: Any) -> tuple[torch.Tensor, dict[str, float]]:
    import torch

    structure = "a tuple (loss, metrics)"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise LossError(
            where, "wrong return structure", expected=structure, got=type(returned).__name__
        )
    loss, metrics = returned
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            where, "loss is not a tensor", expected="a 0-d tensor", got=type(loss).__name__
        )
    if loss.dim() != 0 or loss.is_meta or loss.is_complex():
        raise LossError(
            where,
            "loss is not a scalar",
            expected="a 0-d tensor of a real number",
            got=f"shape {tuple(loss.shape)}, {loss.dtype} on {loss.device}",
            fix="Reduce it: .sum() or .mean().",
        )
    if not torch.isfinite(loss):
        raise LossError(where, "loss is not finite", expected="a finite loss", got=loss.item())
    if not isinstance(metrics, Mapping):
        raise LossError(
            where, "metrics is not a dict", expected=structure, got=type(metrics).__name__
        )
    return loss, {str(k): _number(where, k, v) for k, v in metrics.items()}


def _number(where: str, key: Any, value: Any) -> float:
    try:
        kind = getattr(getattr(value, "dtype", None), "kind", "")  # "c": float() halves a complex
        if not isinstance(value, (str, bytes)) and kind != "c":
            return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    shape = getattr(value, "shape", None)
    got = value if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"
    raise LossError(
        f'{where} metrics["{key}"]', "not a number", expected="a float or 0-d tensor", got=repr(got)
    )


def _check_grads(
    where: str, grads: Sequence[torch.Tensor], logprobs: Sequence[torch.Tensor] | None
) -> None:
    import torch

    problems = []
    for i, g in enumerate(grads):
        bad = (~torch.isfinite(g)).nonzero()
        if len(bad):
            at = tuple(int(j) for j in bad[0])
            mend = "look for log(0), 0 * inf or a division by zero."
            if logprobs is None:
                spot, mend = f"position {at[0]}", mend.capitalize()
            else:
                lp = float(logprobs[i][at].detach())
                spot, mend = str(list(at)), f"The logprob there is {lp:.4g}; {mend}"
            problems.append(
                LossError(
                    f"{where} gradient of data[{i}] at {spot}",
                    "not finite",
                    expected="a finite d loss / d logprob",
                    got=float(g[at]),
                    fix=mend,
                )
            )
    raise_all(problems)


def surrogate_datums(data: Sequence[Datum], grads: Sequence[torch.Tensor]) -> list[Datum]:
    """Datums whose cross-entropy sum(-weights * logprobs) has the custom loss's gradient.

    Same model_input and target_tokens; weights = -grads, shape of target_tokens. Nothing else of
    the datum is kept: extra inputs are the loss's own and never leave this process.
    """
    import torch

    surrogates = []
    for datum, grad in zip(data, grads, strict=True):
        dtype = "float64" if grad.dtype == torch.float64 else "float32"
        weights = TensorData((-grad).detach().cpu().numpy(), dtype=dtype)
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": weights}
        surrogates.append(Datum(datum.model_input, inputs))
    return surrogates


def merge_metrics(result: LossResult, backend_metrics: Mapping[str, float]) -> dict[str, float]:
    """The backend's metrics, then the loss's own, then the loss itself.

    Raises:
        LossError: the loss reports a different number under a reserved name ("loss").
    """
    for key in RESERVED_METRICS:
        mine = result.metrics.get(key, result.loss)
        if not abs(mine - result.loss) <= 1e-4 * max(1.0, abs(result.loss)):  # NaN too
            raise LossError(
                f'metrics["{key}"]',
                "this name is the loss's own",
                expected=f"no such metric, or the loss {result.loss:.6g}",
                got=mine,
                fix="Rename the metric.",
            )
    return {**backend_metrics, **result.metrics, **dict.fromkeys(RESERVED_METRICS, result.loss)}


class BuiltinClient(Protocol):
    """Any client that can run built-in losses by name, such as a TrainingClient."""

    def forward(self, data: list[Datum], loss_fn: str) -> Any:
        """Logprobs, as the result of a future."""
        ...

    def forward_backward(self, data: list[Datum], loss_fn: str) -> Any:
        """Gradients accumulated, logprobs as the result of a future."""
        ...


def forward_backward_two_pass(
    client: BuiltinClient, data: Sequence[Datum], loss_fn: LossFn
) -> ForwardBackwardOutput:
    """A custom loss through any client that offers only `forward` and `cross_entropy`.

    forward -> logprobs; loss on this side -> g; forward_backward of the surrogate -> gradients.
    The same parameter gradients as `forward_backward_custom`, for a second forward more. The
    reference the one-pass form is tested against, and the way a remote service is driven.
    """
    bare = [
        Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data
    ]
    output = client.forward(bare, "cross_entropy").result()
    result = differentiate(loss_fn, data, logprobs_from_output(output, data))
    merge_metrics(result, {})  # a metric that is refused is refused before anything accumulates
    surrogates = surrogate_datums(data, result.grads)
    backward = client.forward_backward(surrogates, "cross_entropy").result()
    metrics = {k: v for k, v in backward.metrics.items() if k not in RESERVED_METRICS}
    return ForwardBackwardOutput(
        output.loss_fn_output_type, output.loss_fn_outputs, merge_metrics(result, metrics)
    )
