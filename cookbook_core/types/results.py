"""Results of requests: losses and logprobs, samples, saved paths, model information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from cookbook_core.types.tensors import TensorData

import numpy as np

StopReason: TypeAlias = Literal["length", "stop"]
ModelID: TypeAlias = str
LossFnOutput: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Result of `forward`, `forward_backward` and `forward_backward_custom`.

    loss_fn_outputs: one dict per datum, in order; "logprobs" has the shape of its target_tokens,
        in nats.
    metrics: "loss:sum"; for a custom loss also "loss" (the same) and the loss's own metrics.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The value of the loss."""
        return self.metrics["loss:sum"]


@dataclass(frozen=True)
class OptimStepResponse:
    """metrics: "grad_norm" (before clipping), "update_norm" (of the change of weights), "lr"."""

    metrics: dict[str, float] | None = None


NO_LOGPROB = -99999.0
"""The logprob of an empty entry of `TopkLogprobs`; its token is 0."""
TopkList: TypeAlias = list[list[tuple[int, float]] | None]


@dataclass(frozen=True)
class TopkLogprobs:
    """The k most likely tokens at N positions: `(N, k)` int32 ids and float32 logprobs, nats."""

    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def from_lists(cls, lists: TopkList, k: int) -> TopkLogprobs:
        """From `(token_id, logprob)` pairs per position, at most k; the rest stays empty."""
        ids = np.zeros((len(lists), k), np.int32)
        logprobs = np.full((len(lists), k), NO_LOGPROB, np.float32)
        for i, row in enumerate(lists):
            for j, (token, logprob) in enumerate(row or ()):
                ids[i, j], logprobs[i, j] = token, logprob
        return cls(ids, logprobs)

    def to_lists(self) -> TopkList:
        """As `(token_id, logprob)` pairs per position; None where it is empty."""
        rows = zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True)
        lists = [
            [pair for pair in zip(*row, strict=True) if pair != (0, NO_LOGPROB)] for row in rows
        ]
        return [row or None for row in lists]


@dataclass(frozen=True)
class SampledSequence:
    """One completion: its token ids, their logprobs (nats), and why it stopped.

    temperature: of the distribution that its logprobs are of; 1 for a greedy one. Not in the SDK.
    topk_logprobs_np: the likeliest tokens at each position, if they were requested.
    """

    stop_reason: StopReason
    sequence_id: str
    tokens_np: np.ndarray | None = field(default=None, repr=False)
    logprobs_np: np.ndarray | None = field(default=None, repr=False)
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    temperature: float = field(default=1.0, repr=False)

    @cached_property
    def tokens(self) -> list[int]:
        """The sampled ids, the stop token included: train on these, never on re-encoded text."""
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """log p of each token under the distribution at the request's temperature, before
        top_k and top_p."""
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> TopkList | None:
        """For each token the likeliest `(token_id, logprob)`, most likely first, under the
        distribution that `logprobs` are of; None if they were not requested."""
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.to_lists()

    def __repr__(self) -> str:
        return f"SampledSequence(stop_reason={self.stop_reason!r}, tokens={self.tokens})"


@dataclass(frozen=True)
class PromptAltTokens:
    """Tokens drawn at each position of a prompt of N tokens but the first, with replacement.

    tokens: `(N - 1, k)` int64; tokens[i] are alternatives to prompt[i + 1].
    logprobs: `(N - 1, k)` float32, nats.
    """

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampleResponse:
    """The completions of one request, and what was requested of its prompt.

    sequences: one SampledSequence for each sample.
    prompt_logprobs: one per prompt token, nats; None for the first, which no position predicts,
        and before the last prompt_logprobs_last_n.
    topk_prompt_logprobs: for each prompt token the k most likely `(token_id, logprob)` at its
        position; None where prompt_logprobs are.
    target_prompt_logprobs: log p of the requested tokens, float32, in the request's shape; 0.0
        where it had -1.
    prompt_cache_hit_tokens: prompt tokens that a service had cached; 0 locally.
    prompt_alt_tokens: the requested draws.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkList | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None


@dataclass(frozen=True)
class SaveWeightsResponse:
    """path: the folder that save_state wrote, or its path on the service."""

    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    """path: the folder that save_weights_for_sampler wrote, or its path on the service."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """path: the checkpoint that was loaded."""

    path: str | None = None


@dataclass(frozen=True)
class ModelData:
    """Properties of a base model.

    arch: the model's class name.
    model_name: the base model's name or path.
    tokenizer_id: name or path of its tokenizer.
    max_context_length: tokens.
    vocab_size: tokens.
    """

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None
    max_context_length: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    """Properties of a training client: its base model, its id, its LoRA rank."""

    model_data: ModelData
    model_id: ModelID
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class SupportedModel:
    """A base model that is available without a download."""

    model_name: str | None = None


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """supported_models: the bundled ones; any Hugging Face causal LM can be named as well."""

    supported_models: list[SupportedModel]
