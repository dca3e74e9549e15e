"""The values that cross the client: data in, results out. All are frozen dataclasses.

Names and fields follow the `tinker` SDK 0.38. What differs is named in
`tests/test_sdk_signatures.py`; the two that matter when reading code are: any key is allowed in
`loss_fn_inputs` (the SDK refuses plain lists under keys it does not know), and `TensorData` may
hold "float64" when asked to by name, which the exactness tests need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from cookbook_core.errors import ConfigError, is_finite, message
from cookbook_core.tinker.model_input import EncodedTextChunk as EncodedTextChunk
from cookbook_core.tinker.model_input import ModelInput, own_input, require_type
from cookbook_core.tinker.model_input import ModelInputChunk as ModelInputChunk
from cookbook_core.tinker.tensors import TensorData, to_array
from cookbook_core.tinker.tensors import TensorDtype as TensorDtype

StopReason: TypeAlias = Literal["length", "stop"]
LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
ModelID: TypeAlias = str
SamplingClientKind: TypeAlias = Literal["snapshot"]

_INTEGER_KEYS = frozenset({"target_tokens"})
_FLOAT_KEYS = frozenset({"weights", "advantages", "logprobs"})


# ---- inputs -------------------------------------------------------------------------------------


LossFnInputs: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class Datum:
    """One sequence and everything its loss needs.

    Args:
        model_input: the tokens the model reads, N of them.
        loss_fn_inputs: arrays by name (TensorData, torch, numpy or nested lists; all are stored
            as TensorData). "target_tokens" `(N,)` or `(N, K)`: the token(s) to predict at each
            position. "weights" like target_tokens. Any other key is handed to the loss as it is
            and never reaches the model.

    Raises:
        DatumError: a value that is not a rectangular numeric array, or a name that is not text.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_input", own_input(self.model_input))
        known = isinstance(self.model_input, ModelInput)
        require_type(known, "Datum.model_input", "ModelInput", self.model_input)
        named = isinstance(self.loss_fn_inputs, Mapping)
        require_type(named, "Datum.loss_fn_inputs", "arrays by name", self.loss_fn_inputs)
        for key in self.loss_fn_inputs:
            require_type(isinstance(key, str), "Datum.loss_fn_inputs", "names that are str", key)
        inputs = {k: _to_tensor_data(k, v) for k, v in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _to_tensor_data(key: str, value: Any) -> TensorData:
    if isinstance(value, TensorData) and (key not in _INTEGER_KEYS or value.dtype == "int64"):
        return value
    if isinstance(value, ModelInput):  # the SDK's own examples pass targets this way
        value = value.to_ints()
    dtype = "int64" if key in _INTEGER_KEYS else "float32" if key in _FLOAT_KEYS else None
    where = f'Datum.loss_fn_inputs["{key}"]'
    array = to_array(where, value, np.dtype(dtype) if dtype else None)
    return TensorData(array, dtype="float32" if array.dtype.kind == "f" else "int64")


# ---- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamParams:
    """One optimizer step: torch.optim.AdamW with these values (defaults are the SDK's).

    Raises:
        ConfigError: a value AdamW cannot use: negative, not finite, or a beta of 1 or more.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 means no clipping."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, below = getattr(self, f.name), 1.0 if f.name.startswith("beta") else math.inf
            if not is_finite(value) or not 0 <= value < below:
                rule = f"0 <= {f.name} < {below:g}" if below < math.inf else "a finite number >= 0"
                raise ConfigError(
                    message(f"AdamParams.{f.name}", "out of range", rule, repr(value))
                )
            object.__setattr__(self, f.name, float(value))


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """Chooses AdamW, the one optimizer there is here."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA adapter covers; alpha is 32 whatever the rank."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """How to generate.

    stop: None stops at the tokenizer's end-of-sequence token; strings or token ids stop at those
    instead; [] never stops before max_tokens.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    """Keep the k most likely tokens; -1 for all."""
    top_p: float = 1
    """Keep the smallest set of tokens with at least this much probability."""


# ---- results ------------------------------------------------------------------------------------

LossFnOutput: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What `forward`, `forward_backward` and `forward_backward_custom` give back.

    loss_fn_outputs: one dict per datum, in order; "logprobs" has the shape of its target_tokens,
        in nats.
    metrics: "loss:sum" always; for a custom loss "loss" and the loss's own metrics too.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The value of the loss that was run."""
        return self.metrics["loss:sum"]


@dataclass(frozen=True)
class OptimStepResponse:
    """metrics: "grad_norm" (before clipping), "update_norm" (of the change made), "lr"."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SampledSequence:
    """One completion: its token ids, their logprobs in nats, and why it ended."""

    stop_reason: StopReason
    sequence_id: str
    tokens_np: np.ndarray | None = field(default=None, repr=False)
    logprobs_np: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def tokens(self) -> list[int]:
        """The sampled ids, the stop token included: train on these, never on re-encoded text."""
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """log p of each token under the distribution at the request's temperature, before
        top_k and top_p."""
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    def __repr__(self) -> str:
        return f"SampledSequence(stop_reason={self.stop_reason!r}, tokens={self.tokens})"


@dataclass(frozen=True)
class SampleResponse:
    """The completions of one request, and what was asked about its prompt.

    sequences: one SampledSequence for each sample: tokens, logprobs, stop_reason.
    prompt_logprobs: `(len(prompt),)`, None at position 0, which nothing predicts.
    prompt_cache_hit_tokens: a service bills these less; nothing is billed here.
    topk_prompt_logprobs: per position the k most likely `(token_id, logprob)`, None at position 0.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True)
class SaveWeightsResponse:
    """path: the folder written by save_state."""

    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    """path: the folder written by save_weights_for_sampler."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """path: the folder that was loaded."""

    path: str | None = None


@dataclass(frozen=True)
class ModelData:
    """arch: the model's class name. model_name: the base model's name or path."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None
    max_context_length: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    """What a training client is: its base model, its own id, its LoRA rank."""

    model_data: ModelData
    model_id: ModelID
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class SupportedModel:
    """A base model that is there without a download."""

    model_name: str | None = None


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """supported_models: those bundled; any Hugging Face causal LM works besides."""

    supported_models: list[SupportedModel]
