"""Results of requests: losses and logprobs, samples, saved paths, and what a model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from cookbook_core.types.tensors import TensorData

StopReason: TypeAlias = Literal["length", "stop"]
ModelID: TypeAlias = str
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
