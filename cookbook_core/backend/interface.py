"""What a backend must do. The client above knows only this; `local` and a remote service fit it.

Every method that touches a model returns a `concurrent.futures.Future` at once, and the requests
of one backend run one after another in the order they were made. A backend knows no loss: it
turns datums into logprobs, hands them to the loss it was given, and pushes the gradient back.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from cookbook_core.custom_loss import LossFn, LossTypeInput
from cookbook_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoraConfig,
    ModelData,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
)


class SamplingBackend(Protocol):
    """One fixed set of weights to generate from."""

    model_data: ModelData

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> Future[SampleResponse]:
        """Completions of one prompt."""
        ...

    def sample_batch(
        self, prompts: Sequence[ModelInput], num_samples: int, params: Sequence[SamplingParams]
    ) -> list[Future[SampleResponse]]:
        """Completions of each prompt; where the backend decodes itself, together as one unit."""
        ...

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """log p of each prompt token given those before it, nats; None at position 0."""
        ...

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        ...


class TrainingBackend(Protocol):
    """One adapter in training: its weights, accumulated gradients and optimizer."""

    info: GetInfoResponse

    def forward(self, data: Sequence[Datum], loss_fn: LossFn) -> Future[ForwardBackwardOutput]:
        """Logprobs and the value of the loss; leaves no trace."""
        ...

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        """Add the loss's gradient to what is accumulated; on any error add nothing."""
        ...

    def optim_step(
        self, params: AdamParams, after: Sequence[Future[Any]] = ()
    ) -> Future[OptimStepResponse]:
        """Step, unless one of the earlier requests `after` failed: then change nothing."""
        ...

    def save(
        self,
        name: str,
        *,
        for_sampler: bool,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]:
        """Write a checkpoint; the result is its path."""
        ...

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        """Take over what was saved at `path`."""
        ...

    def open_sampler(self, path: str) -> Future[SamplingBackend]:
        """Weights saved at `path`."""
        ...

    def snapshot(self) -> Future[SamplingBackend]:
        """The weights as they are at this point of the queue."""
        ...

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        ...


class Backend(Protocol):
    """One base model, and everything made from it."""

    def create_training(
        self, lora: LoraConfig, user_metadata: dict[str, str] | None = None
    ) -> Future[TrainingBackend]:
        """A fresh adapter."""
        ...

    def restore_training(self, path: str, *, with_optimizer: bool) -> Future[TrainingBackend]:
        """An adapter as saved at `path`."""
        ...

    def create_sampler(self, path: str | None) -> Future[SamplingBackend]:
        """Weights saved at `path`, or the bare base model."""
        ...

    def close(self) -> None:
        """Serve what is queued, then let go."""
        ...
