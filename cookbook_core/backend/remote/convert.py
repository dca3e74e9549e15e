"""Convert between this package's types and the `tinker` SDK's.

Out: token ids, target_tokens, and the inputs of a loss that runs at the service; no other input of
a datum is sent.
In: results, checked before anything is computed from them, since a service may report success with
fewer outputs than datums, flattened ones, or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core.builtin_losses import BuiltinLoss, needed_inputs
from cookbook_core.custom_loss import LossFn, logprobs_from_output
from cookbook_core.datums import SCORE_MASK, TEMPERATURE, input_key, temperature_of
from cookbook_core.errors import AnswerError, CheckpointError, DatumError, RequestError, raise_all
from cookbook_core.storage.paths import is_on_service
from cookbook_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    OptimStepResponse,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
    TopkLogprobs,
)

import numpy as np

if TYPE_CHECKING:
    import torch

LARGEST_SEED = 2**31 - 1
"""Seeds are taken modulo this, since some services accept int32 only."""


# ---- out -----------------------------------------------------------------------------------------


def named_loss(loss_fn: LossFn, data: Sequence[Datum]) -> BuiltinLoss | None:
    """The built-in loss that a service can run by name in one pass; None for two passes.

    The SDK's reinforcement-learning losses take no weights: with weights they need two passes and
    this package's formulas.
    """
    if not isinstance(loss_fn, BuiltinLoss):
        return None
    weighted = any("weights" in datum.loss_fn_inputs for datum in data)
    return loss_fn if loss_fn.name == "cross_entropy" or not weighted else None


def bare_datums(data: Sequence[Datum]) -> list[Datum]:
    """Datums to score: target_tokens, and weights of 0, since no loss is computed."""
    out = []
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": np.zeros(targets.shape, np.float32)}
        out.append(Datum(datum.model_input, inputs))
    return out


def named_datums(data: Sequence[Datum], loss: BuiltinLoss) -> list[Datum]:
    """Datums with the inputs that a built-in loss needs, and no other.

    Weights are broadcast to the shape of target_tokens, `(N,)` or `(N, K)`; missing weights are 1.

    Raises:
        DatumError: an input is missing, or weights do not fit target_tokens. The client has checked
            this; the error is for direct callers of the backend.
    """
    out = []
    for i, datum in enumerate(data):
        own = {key: input_key(datum, key) for key in needed_inputs(loss.name)}
        missing = [key for key in own if own[key] not in datum.loss_fn_inputs]
        if missing:
            fix = f"{loss.name} needs {', '.join(needed_inputs(loss.name))}."
            raise DatumError(f'data[{i}]["{missing[0]}"]', "missing", fix=fix)
        inputs = {key: datum.loss_fn_inputs[own[key]] for key in own}
        if loss.name == "cross_entropy":
            shape = tuple(inputs["target_tokens"].shape)
            given = datum.loss_fn_inputs.get("weights")
            weights = np.ones(shape[:1], np.float32) if given is None else given.to_numpy()
            rows = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
            if rows.shape[:1] != shape[:1]:
                where, what = f'data[{i}]["weights"]', "shape does not fit target_tokens"
                fix = "Build datums with datum_from_tokens_weights()."
                raise DatumError(where, what, expected=shape, got=weights.shape, fix=fix)
            inputs["weights"] = np.broadcast_to(rows, shape)
        out.append(Datum(datum.model_input, inputs))
    return out


def refuse_temperatures(data: Sequence[Datum]) -> None:
    """Raise DatumError where a datum is to be scored at a temperature other than 1."""
    raise_all(
        [
            DatumError(
                f'data[{i}].loss_fn_inputs["{TEMPERATURE}"]',
                "services score at temperature 1 only",
                expected=1.0,
                got=round(temperature_of(datum), 6),
                fix="Sample at temperature 1, or train on this machine. Without this input the "
                "importance ratio would be wrong from the first step.",
            )
            for i, datum in enumerate(data)
            if temperature_of(datum) != 1
        ]
    )


def datums_out(types: Any, data: Sequence[Datum]) -> list[Any]:
    """The SDK's datums, with all inputs but the temperature, which is 1: strip them first
    (`bare_datums`, `named_datums`)."""
    out = []
    for datum in data:
        tensors = {k: v for k, v in datum.loss_fn_inputs.items() if k != TEMPERATURE}
        inputs = {k: tensor_out(types, v) for k, v in tensors.items()}
        prompt = prompt_out(types, datum.model_input)
        out.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
    return out


def tensor_out(types: Any, tensor: TensorData) -> Any:
    """The SDK's TensorData with the same values."""
    dtype = "int64" if tensor.dtype == "int64" else "float32"  # the protocol's two dtypes
    array = np.ascontiguousarray(tensor.to_numpy(), dtype=dtype)
    return types.TensorData(data=array, dtype=dtype, shape=list(array.shape))


def prompt_out(types: Any, prompt: ModelInput) -> Any:
    """The SDK's ModelInput with the same token ids and images."""
    if not prompt.images:
        return types.ModelInput.from_ints([int(token) for token in prompt.to_ints()])
    return types.ModelInput(chunks=[_chunk_out(types, chunk) for chunk in prompt.chunks])


def _chunk_out(types: Any, chunk: ModelInputChunk) -> Any:
    if isinstance(chunk, ImageChunk):
        count = None if chunk.expected_tokens is None else int(chunk.expected_tokens)
        return types.ImageChunk(data=chunk.data, format=chunk.format, expected_tokens=count)
    return types.EncodedTextChunk(tokens=[int(token) for token in chunk.tokens])


def adam_out(types: Any, params: AdamParams) -> Any:
    """The SDK's AdamParams, whose fields have the same names and meanings."""
    return types.AdamParams(**vars(params))


def sampling_params_out(types: Any, params: SamplingParams) -> Any:
    """The SDK's SamplingParams."""
    stop = params.stop
    if stop is not None and not isinstance(stop, str):
        stop = [s if isinstance(s, str) else int(s) for s in stop]
    seed = None if params.seed is None else int(params.seed) % LARGEST_SEED
    return types.SamplingParams(**{**vars(params), "stop": stop, "seed": seed})


def check_path(path: object) -> None:
    """Raise CheckpointError for a folder on this machine, which no service can load."""
    if not isinstance(path, str) or not is_on_service(path):
        fix = "Local weights cannot be uploaded: start without them, or train locally."
        raise CheckpointError(
            "path", "not a service's checkpoint", expected="tinker://...", got=repr(path), fix=fix
        )


# ---- in ------------------------------------------------------------------------------------------


def output_in(where: str, response: Any, data: Sequence[Datum]) -> ForwardBackwardOutput:
    """The output of a forward or forward_backward, checked against its datums.

    Logprobs are 0.0 where a datum's "score_mask" is 0, as they are locally.

    Raises:
        AnswerError: not one output per datum, logprobs missing, of another shape than
            target_tokens, or not finite; the message names the datum.
    """
    outputs = [{k: _tensor_in(v) for k, v in o.items()} for o in response.loss_fn_outputs]
    metrics = {str(k): float(v) for k, v in (response.metrics or {}).items()}
    output = ForwardBackwardOutput(str(response.loss_fn_output_type), outputs, metrics)
    try:
        logprobs_from_output(output, data)
    except DatumError as error:
        what = f"the service's answer does not fit the request: {error.where} {error.what}"
        fix = "Run `cookbook check --base_url URL` to list what else the service does differently."
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
                    "the service reported success with a logprob that is not finite",
                    expected="a finite log p",
                    got=f"{float(logprobs[at])} for token {token}",
                    fix="Look for token ids outside the model's vocabulary. Its gradient may be "
                    "broken too: resume from the last checkpoint.",
                )
            )
        out["logprobs"] = _masked(out["logprobs"], datum)
    raise_all(problems)
    return output


def mask_grads(data: Sequence[Datum], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Set gradients to 0 where "score_mask" is 0: those logprobs are constants.

    Args:
        data: D datums; a score_mask is `(N,)`.
        grads: D tensors `(N,)` or `(N, K)`.
    """
    return [
        grad if (mask := datum.loss_fn_inputs.get(SCORE_MASK)) is None
        else grad * (mask.to_torch() != 0).reshape(-1, *[1] * (grad.dim() - 1))
        for datum, grad in zip(data, grads, strict=True)
    ]  # fmt: skip


def _masked(logprobs: TensorData, datum: Datum) -> TensorData:
    mask = datum.loss_fn_inputs.get(SCORE_MASK)
    if mask is None:
        return logprobs
    array = logprobs.to_numpy().copy()
    array[mask.to_numpy() == 0] = 0.0
    return TensorData(array, dtype=logprobs.dtype)


def _tensor_in(tensor: Any) -> TensorData:
    array = np.asarray(tensor.to_numpy())
    if tensor.shape is not None:
        array = array.reshape(tensor.shape)
    return TensorData(array, dtype="int64" if array.dtype.kind == "i" else "float32")


def optim_in(response: Any, params: AdamParams) -> OptimStepResponse:
    """The service's metrics, and the learning rate of the request as "lr"."""
    metrics = {str(k): float(v) for k, v in (response.metrics or {}).items()}
    return OptimStepResponse({**metrics, "lr": params.learning_rate})


def sampled_in(
    where: str, response: Any, num_samples: int, wanted: Mapping[str, Any]
) -> SampleResponse:
    """The completions of one prompt, and what was `wanted` beside them, under the SDK's names.

    Raises:
        AnswerError: not `num_samples` completions, one whose logprobs are not a finite number per
            token, or an answer without something that was wanted.
    """
    if len(response.sequences) != num_samples:
        what = "the service returned another number of completions"
        fix = "Run `cookbook check --base_url URL` to list what else the service does differently."
        raise AnswerError(where, what, expected=num_samples, got=len(response.sequences), fix=fix)
    sequences = []
    for i, s in enumerate(response.sequences):
        tokens = np.asarray(s.tokens, dtype=np.int64)
        logprobs = None if s.logprobs is None else np.asarray(s.logprobs, dtype=np.float32)
        if logprobs is not None and (
            logprobs.shape != tokens.shape or not np.isfinite(logprobs).all()
        ):
            finite = int(np.isfinite(logprobs).sum())
            raise AnswerError(
                f"{where}: sequences[{i}].logprobs",
                "not one finite number per token",
                expected=f"{len(tokens)} finite numbers",
                got=f"{len(logprobs)}, {finite} of them finite",
                fix="Run `cookbook check --base_url URL`; do not train on these samples.",
            )
        name = getattr(s, "sequence_id", None) or str(i)
        top = getattr(s, "topk_logprobs", None) if "topk_sample_logprobs" in wanted else None
        if top is not None:
            top = TopkLogprobs.from_lists(top, wanted["topk_sample_logprobs"])
        sequences.append(SampledSequence(s.stop_reason, name, tokens, logprobs, top))
    targets = getattr(response, "target_prompt_logprobs", None)
    drawn = getattr(response, "prompt_alt_tokens", None)
    missing = {
        "topk_sample_logprobs": any(s.topk_logprobs_np is None for s in sequences),
        "target_prompt_logprobs": targets is None,
        "prompt_alt_tokens_k": drawn is None,
    }
    for name in wanted:
        if missing.get(name):
            fix = f"The service may not know {name}: leave it out."
            raise AnswerError(f"{where}: {name}", "requested, but not in the answer", fix=fix)
    return SampleResponse(
        sequences,
        response.prompt_logprobs,
        response.topk_prompt_logprobs,
        None if targets is None else _tensor_in(targets),
        getattr(response, "prompt_cache_hit_tokens", 0),
        drawn and PromptAltTokens(_tensor_in(drawn.tokens), _tensor_in(drawn.logprobs)),
    )


def metadata_in(where: str, checkpoints: Sequence[Any], path: str) -> dict[str, str]:
    """The user_metadata of the checkpoint at `path`, out of the SDK's list of a run's checkpoints.

    Raises:
        CheckpointError: the list has no such path. RequestError: the SDK's checkpoints have no
            user_metadata (before 0.38).
    """
    checkpoint = next((c for c in checkpoints if c.tinker_path == path), None)
    if checkpoint is None:
        fix = "Pass a path that save_state or save_weights_for_sampler returned."
        raise CheckpointError("path", "no such checkpoint at the service", got=path, fix=fix)
    if not hasattr(checkpoint, "user_metadata"):
        what = "the installed tinker SDK does not read user_metadata of checkpoints"
        raise RequestError(where, what, fix='Install a newer one: pip install "tinker>=0.38".')
    return dict(checkpoint.user_metadata or {})


def without_service_loss(metrics: Mapping[str, float]) -> dict[str, float]:
    """A service's metrics without its value of the loss, which is computed here."""
    return {key: value for key, value in metrics.items() if key not in ("loss", "loss:sum")}


def disagrees(theirs: float | None, ours: float) -> bool:
    """Whether a service's "loss:sum" differs from the loss of its own logprobs."""
    return theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-2, abs_tol=1e-4)
