"""The one boundary between our types and the `tinker` SDK's, both ways.

Out: token ids, target_tokens, and what the loss that runs *there* needs; nothing else of a datum.
In: results, checked before anybody computes with them, since a service may answer "success" with
fewer outputs than datums, flattened ones, or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cookbook_core.builtin_losses import BuiltinLoss, needed_inputs
from cookbook_core.custom_loss import LossFn, logprobs_from_output
from cookbook_core.datums import SCORE_MASK, input_key
from cookbook_core.errors import AnswerError, CheckpointError, DatumError, raise_all
from cookbook_core.storage.paths import is_on_service
from cookbook_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)

if TYPE_CHECKING:
    import torch

LARGEST_SEED = 2**31 - 1
"""Seeds are folded to what every engine behind a service takes (int32)."""


# ---- out -----------------------------------------------------------------------------------------


def named_loss(loss_fn: LossFn, data: Sequence[Datum]) -> BuiltinLoss | None:
    """The built-in loss a service can run by its name, in one pass; None: two passes.

    The SDK's reinforcement-learning losses know no weights: with weights they go in two passes,
    with our formulas.
    """
    if not isinstance(loss_fn, BuiltinLoss):
        return None
    weighted = any("weights" in datum.loss_fn_inputs for datum in data)
    return loss_fn if loss_fn.name == "cross_entropy" or not weighted else None


def bare_datums(data: Sequence[Datum]) -> list[Datum]:
    """Datums to score: target_tokens, and weights of 0, since there is no loss to compute."""
    out = []
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": np.zeros(targets.shape, np.float32)}
        out.append(Datum(datum.model_input, inputs))
    return out


def named_datums(data: Sequence[Datum], loss: BuiltinLoss) -> list[Datum]:
    """Datums with the inputs that a built-in loss needs, and no other.

    Weights get the shape of target_tokens: `(N,)` beside `(N, K)` stands for every candidate, and
    without weights each target weighs 1.

    Raises:
        DatumError: an input is missing, or weights do not fit target_tokens. The client checks all
            this and more; who calls the backend itself hears of it here.
    """
    out = []
    for i, datum in enumerate(data):
        own = {key: input_key(datum, key) for key in needed_inputs(loss.name)}
        missing = [key for key in own if own[key] not in datum.loss_fn_inputs]
        if missing:
            rule = f"what {loss.name} needs"
            raise DatumError(f'data[{i}]["{missing[0]}"]', "missing", expected=rule, got="nothing")
        inputs = {key: datum.loss_fn_inputs[own[key]] for key in own}
        if loss.name == "cross_entropy":
            shape = tuple(inputs["target_tokens"].shape)
            given = datum.loss_fn_inputs.get("weights")
            weights = np.ones(shape[:1], np.float32) if given is None else given.to_numpy()
            rows = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
            if rows.shape[:1] != shape[:1]:
                where, what = f'data[{i}]["weights"]', "not one per target"
                raise DatumError(where, what, expected=shape, got=weights.shape)
            inputs["weights"] = np.broadcast_to(rows, shape)
        out.append(Datum(datum.model_input, inputs))
    return out


def datums_out(types: Any, data: Sequence[Datum]) -> list[Any]:
    """The SDK's datums; every input of ours goes, so strip first (`bare_datums` and the like)."""
    return [
        types.Datum(
            model_input=prompt_out(types, datum.model_input),
            loss_fn_inputs={k: _tensor_out(types, v) for k, v in datum.loss_fn_inputs.items()},
        )
        for datum in data
    ]


def _tensor_out(types: Any, tensor: TensorData) -> Any:
    dtype = "int64" if tensor.dtype == "int64" else "float32"  # the wire has no other
    array = np.ascontiguousarray(tensor.to_numpy(), dtype=dtype)
    return types.TensorData(data=array, dtype=dtype, shape=list(array.shape))


def prompt_out(types: Any, prompt: ModelInput) -> Any:
    """The SDK's ModelInput of the same token ids."""
    return types.ModelInput.from_ints([int(token) for token in prompt.to_ints()])


def adam_out(types: Any, params: AdamParams) -> Any:
    """The SDK's AdamParams; names and meaning are the same."""
    return types.AdamParams(**vars(params))


def sampling_params_out(types: Any, params: SamplingParams) -> Any:
    """The SDK's SamplingParams."""
    stop = params.stop
    if stop is not None and not isinstance(stop, str):
        stop = [s if isinstance(s, str) else int(s) for s in stop]
    seed = None if params.seed is None else int(params.seed) % LARGEST_SEED
    return types.SamplingParams(**{**vars(params), "stop": stop, "seed": seed})


def check_path(path: object) -> None:
    """Refuse, with a CheckpointError, what no service can load: a folder of this machine."""
    if not isinstance(path, str) or not is_on_service(path):
        mend = "Weights saved on this machine cannot be sent: start without them, or train locally."
        raise CheckpointError(
            "path", "not a service's checkpoint", expected="tinker://...", got=repr(path), fix=mend
        )


# ---- in ------------------------------------------------------------------------------------------


def output_in(where: str, found: Any, data: Sequence[Datum]) -> ForwardBackwardOutput:
    """Our output of a forward or forward_backward, checked against the datums it is of.

    Positions at which a datum's "score_mask" is 0 read 0.0, as they do locally.

    Raises:
        AnswerError: not one output per datum, logprobs missing, of another shape than
            target_tokens, or not finite; the message names the datum.
    """
    outputs = [{key: _tensor_in(value) for key, value in o.items()} for o in found.loss_fn_outputs]
    metrics = {str(k): float(v) for k, v in (found.metrics or {}).items()}
    output = ForwardBackwardOutput(str(found.loss_fn_output_type), outputs, metrics)
    try:
        logprobs_from_output(output, data)
    except DatumError as error:
        what = f"the service's answer does not fit the request: {error.where} {error.what}"
        fix = "`cookbook check` lists what else the service does differently."
        raise AnswerError(where, what, expected=error.expected, got=error.got, fix=fix) from error
    problems = []
    for i, (out, datum) in enumerate(zip(outputs, data, strict=True)):
        logprobs = out["logprobs"].to_numpy()
        bad = np.argwhere(~np.isfinite(logprobs))
        if len(bad):
            at = tuple(int(j) for j in bad[0])
            token = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[at])
            problems.append(
                AnswerError(
                    f"{where}: logprobs of data[{i}] at {list(at)}",
                    'the service answered "success" with a logprob that is not finite',
                    expected="a finite log p",
                    got=f"{float(logprobs[at])} for token {token}",
                    fix="Look for token ids outside the model's vocabulary. The service may hold a "
                    "broken gradient: go on from the last checkpoint.",
                )
            )
        out["logprobs"] = _masked(out["logprobs"], datum)
    raise_all(problems)
    return output


def mask_grads(data: Sequence[Datum], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of logprobs, 0 where "score_mask" is 0: those logprobs were constants."""
    return [
        grad if (mask := datum.loss_fn_inputs.get(SCORE_MASK)) is None
        # mask is (N,), grad (N,) or (N, K)
        else grad * (mask.to_torch() != 0).reshape(-1, *[1] * (grad.dim() - 1))
        for datum, grad in zip(data, grads, strict=True)
    ]  # fmt: skip


def _masked(logprobs: TensorData, datum: Datum) -> TensorData:
    mask = datum.loss_fn_inputs.get(SCORE_MASK)
    if mask is None:
        return logprobs
    kept = logprobs.to_numpy().copy()
    kept[mask.to_numpy() == 0] = 0.0
    return TensorData(kept, dtype=logprobs.dtype)


def _tensor_in(found: Any) -> TensorData:
    array = np.asarray(found.to_numpy())
    if found.shape is not None:
        array = array.reshape(found.shape)
    return TensorData(array, dtype="int64" if array.dtype.kind == "i" else "float32")


def optim_in(found: Any, params: AdamParams) -> OptimStepResponse:
    """The service's metrics, and the learning rate that was asked for as "lr"."""
    metrics = {str(k): float(v) for k, v in (found.metrics or {}).items()}
    return OptimStepResponse({**metrics, "lr": params.learning_rate})


def sampled_in(where: str, found: Any, num_samples: int) -> SampleResponse:
    """Our response to a request to sample.

    Raises:
        AnswerError: another count of completions than asked for, or a completion whose logprobs
            are not one finite number per token.
    """
    if len(found.sequences) != num_samples:
        what = "the service gave another number of completions"
        raise AnswerError(where, what, expected=num_samples, got=len(found.sequences))
    sequences = []
    for i, s in enumerate(found.sequences):
        tokens = np.asarray(s.tokens, dtype=np.int64)
        logprobs = None if s.logprobs is None else np.asarray(s.logprobs, dtype=np.float32)
        if logprobs is not None and (
            logprobs.shape != tokens.shape or not np.isfinite(logprobs).all()
        ):
            finite = int(np.isfinite(logprobs).sum())
            raise AnswerError(
                f"{where}: sequences[{i}].logprobs",
                "not one finite number per token",
                expected=f"{len(tokens)} of them",
                got=f"{len(logprobs)}, {finite} of them finite",
            )
        name = getattr(s, "sequence_id", None) or str(i)
        sequences.append(SampledSequence(s.stop_reason, name, tokens, logprobs))
    return SampleResponse(sequences, found.prompt_logprobs, found.topk_prompt_logprobs)


def without_service_loss(metrics: Mapping[str, float]) -> dict[str, float]:
    """A service's metrics without its own value of the loss, which is computed here instead."""
    return {key: value for key, value in metrics.items() if key not in ("loss", "loss:sum")}


def disagrees(theirs: float | None, ours: float) -> bool:
    """Whether a service's "loss:sum" is another than that of its own logprobs."""
    return theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-2, abs_tol=1e-4)
