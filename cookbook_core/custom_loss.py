"""The custom-loss driver: logprobs out, the user's loss, a gradient in.

    params --model--> logprobs l --loss_fn--> C(l)          dC/dparams = (dC/dl) (dl/dparams)

The graph is cut at l. `differentiate` runs the user's loss on detached leaves and returns
g = dC/dl; the backend pushes g back through the model. In one process the graph of the forward is
still in memory, so that takes one forward and one backward (`backend/local`). Where it is not (a
remote service, a batch whose graph does not fit), the linear surrogate sum(-w * l) with w = -g has
the same gradient and costs a second forward: `surrogate_datums`, `forward_backward_two_pass`.

Source: the linear surrogate is the one of Thinking Machines' custom-loss page; Fireworks' and
Tinkex's modules use the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from cookbook_core.datums import TEMPERATURE
from cookbook_core.errors import (
    ConfigError,
    CookbookError,
    DatumError,
    LossError,
    NoGradientError,
    NotFiniteError,
    check_choice,
    cut_own_frames,
    raise_all,
)
from cookbook_core.types import Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import torch

LossFn: TypeAlias = Callable[[list[Datum], "list[torch.Tensor]"], tuple[Any, Mapping[str, Any]]]
"""loss_fn(data, logprobs_list) -> (loss, metrics).

logprobs_list[i]: log p of data[i]'s target_tokens in nats, same shape, `(N,)` or `(N, K)`, on the
CPU; with loss_type_input="vocab_logprobs" log p of every token at every position, `(N, V)`, on the
model's device. There, other tensors that an operation needs follow from the CPU by themselves.
loss: 0-d tensor that depends on them. metrics: floats or 0-d tensors by name.
"""

LossTypeInput: TypeAlias = Literal["logprobs", "vocab_logprobs"]
"""What a custom loss is given for each datum: see `LossFn`."""

RESERVED_METRICS = ("loss", "loss:sum")
"""Names under which the loss itself is reported."""


@dataclass(frozen=True)
class LossResult:
    """A loss, its metrics and its gradients.

    loss: in the unit that the loss function chose.
    grads: grads[i] = d loss / d logprobs[i], in the shape of logprobs[i].
    param_grads: d loss / d params of the parameters passed to `differentiate`, None where unused.
    """

    loss: float
    metrics: dict[str, float]
    grads: list[torch.Tensor]
    param_grads: Sequence[torch.Tensor | None] = field(default_factory=list)


def check_loss(loss_fn: Any, loss_type_input: str | None) -> LossTypeInput:
    """Validate a custom loss and its `loss_type_input`; None means "logprobs".

    Returns:
        "logprobs" or "vocab_logprobs".
    Raises:
        ConfigError: an unknown loss_type_input, or a loss that is not a function.
    """
    if loss_type_input is not None:
        known = get_args(LossTypeInput)
        check_choice(ConfigError, "loss_type_input", "unknown", loss_type_input, known)
    if not callable(loss_fn):
        raise ConfigError(
            "loss_fn",
            "not a function",
            expected="loss_fn(data, logprobs_list) -> (loss, metrics)",
            got=repr(loss_fn),
            fix="Pass the name of a built-in loss to forward_backward() instead.",
        )
    return "vocab_logprobs" if loss_type_input == "vocab_logprobs" else "logprobs"


def name_of(loss_fn: Any) -> str:
    """The name of a loss in messages: a partial has its function's, an object its class's."""
    inner = getattr(loss_fn, "func", loss_fn)
    return getattr(inner, "__name__", type(inner).__name__)


def logprobs_from_output(
    output: ForwardBackwardOutput, data: Sequence[Datum]
) -> list[torch.Tensor]:
    """Read the logprobs of each datum from a forward's output.

    Returns:
        D tensors in the order of `data`, nats, each in the shape of its datum's target_tokens.
    Raises:
        DatumError: a datum has no logprobs, or their shape is not that of its target_tokens.
    """
    outputs = output.loss_fn_outputs
    if len(outputs) != len(data):
        raise DatumError(
            "forward output", "not one per datum", expected=len(data), got=len(outputs)
        )
    problems, logprobs = [], []
    for i, (out, datum) in enumerate(zip(outputs, data, strict=True)):
        values = out.get("logprobs")
        expected = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        if values is None or list(values.shape) != list(expected):
            got = "no logprobs" if values is None else tuple(values.shape)
            where = f'output[{i}]["logprobs"]'
            problems.append(
                DatumError(
                    where, "shape does not match target_tokens", expected=tuple(expected), got=got
                )
            )
        else:
            logprobs.append(values.to_torch())
    raise_all(problems)
    return logprobs


def differentiate(
    loss_fn: LossFn,
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    views: Sequence[Callable[[torch.Tensor], Any]] | None = None,
    params: Sequence[torch.Tensor] = (),
) -> LossResult:
    """Run the loss once on detached leaves and return its value, metrics and gradient.

    Args:
        loss_fn: see `LossFn`.
        data: D datums.
        logprobs: D tensors, nats, any shape; not modified. With `views`, the tensors they take.
        views: D functions; the loss gets views[i](leaf) in place of leaf i, such as hidden states
            `(N, H)` seen as the logprobs `(N, V)` that they give.
        params: further tensors that the views depend on.
    Returns:
        LossResult; a datum that the loss did not use has a zero gradient.
    Raises:
        LossError: the loss raised (its exception is the cause), returned another structure, or a
            metric that is not a number.
        NoGradientError: the loss does not depend on the logprobs, or cannot be differentiated.
        NotFiniteError: the loss or a gradient is not finite; names each datum and position.
        CookbookError: one that the loss itself raised, such as a helper's DatumError, unchanged.

    >>> import torch
    >>> def squares(data, logprobs):
    ...     return sum((lp**2).sum() for lp in logprobs), {}
    >>> result = differentiate(squares, [], [torch.tensor([-1.0, -2.0])])
    >>> result.loss, result.grads
    (5.0, [tensor([-2., -4.])])
    """
    import torch

    leaves = [lp.detach().clone().requires_grad_(True) for lp in logprobs]
    where = f"{name_of(loss_fn)}()"
    with torch.enable_grad():
        try:
            seen = leaves
            if views is not None:
                seen = [view(leaf) for view, leaf in zip(views, leaves, strict=True)]
            returned = loss_fn(list(data), list(seen))
        except CookbookError:
            raise
        except Exception as error:
            raise LossError.caused_by(where, error) from error
        loss, metrics = _loss_and_metrics(where, returned)
        if not loss.requires_grad:
            raise NoGradientError(
                where,
                "the loss is detached from the logprobs",
                expected="a loss computed from logprobs_list",
                got="requires_grad=False",
                fix="Look for .item(), .detach(), torch.tensor(...) or numpy on the way.",
            )
        try:
            grads = torch.autograd.grad(loss, [*leaves, *params], allow_unused=True)
        except Exception as error:
            raise NoGradientError(
                where,
                "no gradient can be taken of what it returned",
                expected="a loss that autograd can differentiate",
                got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                fix="Do not call .backward() inside the loss, and change no tensor in place.",
            ) from cut_own_frames(error)
    if all(g is None for g in grads[: len(leaves)]):
        raise NoGradientError(
            where,
            "the loss uses no datum",
            expected="a loss computed from logprobs_list",
            got=f"{loss.item():.6g}, computed from other tensors",
            fix="Use the tensors of logprobs_list, the second argument.",
        )
    leaf_grads = [
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(grads[: len(leaves)], leaves, strict=True)
    ]
    _check_finite_gradients(where, leaf_grads, None if views else leaves)
    return LossResult(loss.item(), metrics, leaf_grads, grads[len(leaves) :])


def evaluate(
    loss_fn: LossFn,
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    finite: bool = True,
) -> LossResult:
    """Run the loss once without gradients, for `forward`: the result's `grads` is empty.

    Args:
        loss_fn: see `LossFn`.
        data: D datums.
        logprobs: D tensors, nats, any shape.
        finite: False accepts a loss that is NaN or infinite.
    Returns:
        LossResult, its loss the value of a 0-d tensor.
    Raises:
        LossError, CookbookError: as `differentiate` does.
    """
    import torch

    where = f"{name_of(loss_fn)}()"
    with torch.no_grad():
        try:
            returned = loss_fn(list(data), list(logprobs))
        except CookbookError:
            raise
        except Exception as error:
            raise LossError.caused_by(where, error) from error
        loss, metrics = _loss_and_metrics(where, returned, finite=finite)
    return LossResult(loss.item(), metrics, [])


def _loss_and_metrics(
    where: str, returned: Any, *, finite: bool = True
) -> tuple[torch.Tensor, dict[str, float]]:
    """Validate what a loss returned: a (finite) 0-d tensor, and metrics that are numbers.

    Raises:
        LossError: another structure, or a metric that is not a number.
        NotFiniteError: the loss is NaN or infinite.
    """
    import torch

    structure, fix = "a tuple (loss, metrics)", "End the loss with `return loss, {}`."
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = type(returned).__name__
        raise LossError(where, "wrong return structure", expected=structure, got=got, fix=fix)
    loss, metrics = returned
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            where,
            "loss is not a tensor",
            expected="a 0-d tensor",
            got=type(loss).__name__,
            fix="Compute it from logprobs_list with torch, without .item() or float().",
        )
    if loss.dim() != 0 or loss.is_meta or loss.is_complex():
        raise LossError(
            where,
            "loss is not a scalar",
            expected="a 0-d tensor of a real number",
            got=f"shape {tuple(loss.shape)}, {loss.dtype} on {loss.device}",
            fix="Reduce it: .sum() or .mean().",
        )
    if finite and not torch.isfinite(loss):
        raise NotFiniteError(
            where,
            "loss is not finite",
            expected="a finite loss",
            got=loss.item(),
            fix="Look for log(0), exp() of a large log-ratio or a division by zero.",
        )
    if not isinstance(metrics, Mapping):
        got = type(metrics).__name__
        raise LossError(where, "metrics is not a dict", expected=structure, got=got, fix=fix)
    return loss, {str(k): _metric(where, k, v) for k, v in metrics.items()}


def _metric(where: str, key: Any, value: Any) -> float:
    """A metric as a float; NaN and infinity are allowed.

    Raises:
        LossError: neither a number nor a tensor of one number.
    """
    try:
        kind = getattr(getattr(value, "dtype", None), "kind", "")  # "c": float() halves a complex
        if not isinstance(value, (str, bytes)) and kind != "c":
            return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    shape = getattr(value, "shape", None)
    raise LossError(
        f'{where} metrics["{key}"]',
        "not a number",
        expected="a float or 0-d tensor",
        got=repr(value if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"),
        fix="Reduce it (.mean()), or leave it out.",
    )


def _check_finite_gradients(
    where: str, grads: Sequence[torch.Tensor], logprobs: Sequence[torch.Tensor] | None
) -> None:
    """Raise a NotFiniteError with the first bad position of each datum, and the logprob there."""
    import torch

    # one question for all of them: to wait for a device's answer is slow
    if not grads or torch.stack([torch.isfinite(grad).all() for grad in grads]).all():
        return
    problems = []
    for i, grad in enumerate(grads):
        bad = (~torch.isfinite(grad)).nonzero()
        if not len(bad):
            continue
        at = tuple(int(j) for j in bad[0])
        place, fix = list(at), "Look for log(0), 0 * inf or a division by zero."
        if logprobs is None:
            place = f"position {at[0]}"
        else:
            fix = f"The logprob there is {float(logprobs[i][at].detach()):.4g}. {fix}"
        problems.append(
            NotFiniteError(
                f"{where} gradient of data[{i}] at {place}",
                "not finite",
                expected="a finite d loss / d logprob",
                got=float(grad[at]),
                fix=fix,
            )
        )
    raise_all(problems)


def surrogate_datums(data: Sequence[Datum], grads: Sequence[torch.Tensor]) -> list[Datum]:
    """Build datums whose cross-entropy sum(-weights * logprobs) has the custom loss's gradient.

    Args:
        data: D datums with target_tokens.
        grads: D tensors, d loss / d logprobs, each in the shape of its target_tokens.
    Returns:
        D datums with the same model_input and what scoring reads of their inputs, and weights =
        -grads. Other inputs are left out: they belong to the loss and never leave this process.
    """
    import torch

    surrogates = []
    for datum, grad in zip(data, grads, strict=True):
        dtype = "float64" if grad.dtype == torch.float64 else "float32"
        weights = TensorData((-grad).detach().cpu().numpy(), dtype=dtype)
        surrogates.append(Datum(datum.model_input, {**_scored_inputs(datum), "weights": weights}))
    return surrogates


def _scored_inputs(datum: Datum) -> dict[str, TensorData]:
    """The inputs of a datum that its logprobs depend on."""
    keys = ("target_tokens", TEMPERATURE)
    return {key: datum.loss_fn_inputs[key] for key in keys if key in datum.loss_fn_inputs}


def merge_metrics(result: LossResult, backend_metrics: Mapping[str, float]) -> dict[str, float]:
    """Join the backend's metrics, the loss's own and the loss; later ones replace earlier ones.

    Raises:
        LossError: the loss reports another number under a reserved name ("loss", "loss:sum").
    """
    for key in RESERVED_METRICS:
        mine = result.metrics.get(key, result.loss)
        if not abs(mine - result.loss) <= 1e-4 * max(1.0, abs(result.loss)):  # NaN too
            raise LossError(
                f'metrics["{key}"]',
                "this name is reserved for the loss",
                expected=f"the loss, {result.loss:.6g}",
                got=mine,
                fix="Rename the metric.",
            )
    return {**backend_metrics, **result.metrics, **dict.fromkeys(RESERVED_METRICS, result.loss)}


class BuiltinClient(Protocol):
    """Any client that can run built-in losses by name, such as a TrainingClient."""

    def forward(self, data: list[Datum], loss_fn: str) -> Any:
        """Return a future of the logprobs."""
        ...

    def forward_backward(self, data: list[Datum], loss_fn: str) -> Any:
        """Accumulate gradients and return a future of the logprobs."""
        ...


def forward_backward_two_pass(
    client: BuiltinClient, data: Sequence[Datum], loss_fn: LossFn
) -> ForwardBackwardOutput:
    """Run a custom loss through a client that has only `forward` and `cross_entropy`.

    forward -> logprobs; the loss in this process -> g; forward_backward of the surrogate ->
    gradients: the same as those of `forward_backward_custom`, at the cost of a second forward. The
    one-pass form is tested against this function; a remote service is driven in the same way.

    Raises:
        LossError, DatumError: as `differentiate` and `logprobs_from_output` do, before anything is
            accumulated.
    """
    bare = [Datum(d.model_input, _scored_inputs(d)) for d in data]
    output = client.forward(bare, "cross_entropy").result()
    result = differentiate(loss_fn, data, logprobs_from_output(output, data))
    merge_metrics(result, {})  # raises for a reserved name before anything accumulates
    surrogates = surrogate_datums(data, result.grads)
    backward = client.forward_backward(surrogates, "cross_entropy").result()
    metrics = {k: v for k, v in backward.metrics.items() if k not in RESERVED_METRICS}
    return ForwardBackwardOutput(
        output.loss_fn_output_type, output.loss_fn_outputs, merge_metrics(result, metrics)
    )
