"""The interface of a backend: `local` and `remote` implement it, and the clients use nothing else.

Every method that uses a model returns a `concurrent.futures.Future` at once, and the requests of
one backend run one after another in the order of submission. Invalid arguments are raised at once
or by the future; a request that fails changes nothing. A backend knows no loss: it computes
logprobs, calls the loss it is given, and propagates the loss's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
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
    TensorData,
)


class SamplingBackend(Protocol):
    """One fixed set of weights to generate from; later training does not change it."""

    model_data: ModelData
    """The base model's name, vocabulary and context, as far as they are known."""

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[SampleResponse]:
        """Draw completions of one prompt.

        Args:
            prompt: token ids, at least one.
            num_samples: completions to draw.
            params: max_tokens, temperature, top_k, top_p, stop and seed; the same seed draws the
                same tokens.
            include_prompt_logprobs: also log p of each prompt token.
            topk_prompt_logprobs: also the k likeliest tokens at each prompt position.
            topk_sample_logprobs: also the k likeliest tokens at each position of a completion.
            target_prompt_logprobs: also log p of these tokens, see `SamplingClient.sample`.
            prompt_alt_tokens_k: also k draws of each prompt token but the first.
            prompt_logprobs_last_n: logprobs of the last n prompt tokens only.

        Returns:
            A response of exactly num_samples sequences: token ids, and one logprob (nats) for each
            under the distribution at the request's temperature, before top_k and top_p.

        Raises:
            DatumError, ConfigError: at once, if the request cannot be served.
        """
        ...

    def unit(self) -> AbstractContextManager[None]:
        """Compute the requests that this thread makes inside the block together, as one unit.

        The same requests then give the same bits. No effect at a service.
        """
        ...

    def compute_logprobs(
        self, prompt: ModelInput, last_n: int | None = None
    ) -> Future[list[float | None]]:
        """log p (nats) of each prompt token given those before it; None at position 0.

        last_n: of the last n tokens alone; None before them.

        Raises:
            DatumError, ConfigError: at once; fewer than 2 tokens, or tokens that do not fit the
                model; last_n out of range.
        """
        ...

    def forward(self, data: Sequence[Datum]) -> Future[ForwardBackwardOutput]:
        """Logprobs of the target_tokens of D datums, as of `TrainingBackend.forward` with the
        built-in cross_entropy."""
        ...

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model; may block while it loads."""
        ...


class TrainingBackend(Protocol):
    """One adapter in training: its weights, accumulated gradients and optimizer."""

    info: GetInfoResponse
    """The adapter's id and rank, and its base model."""
    machine: dict[str, Any]
    """What results depend on besides seed and data, down to their last bits; JSON values."""

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
        keep_graph: bool = False,
    ) -> Future[ForwardBackwardOutput]:
        """Compute logprobs and the loss; change neither gradients nor weights.

        Args:
            data: D datums with target_tokens `(N_i,)` or `(N_i, K)`, validated by the client.
            loss_fn: called one time with `data` and D logprob tensors in the shape of
                target_tokens, in nats, on the CPU.
            loss_type_input: as for `forward_backward`.
            keep_graph: a forward_backward of the same tokens may follow, as of clients that
                compute their loss themselves; once one has, such pairs need one forward where
                memory allows. No effect at a service.

        Returns:
            loss_fn_outputs[i]["logprobs"] in the shape of target_tokens, float32 or better, none
            for "vocab_logprobs";
            metrics "loss" and the loss's own.

        Raises:
            LossError: from the future; the loss raised or returned something invalid.
        """
        ...

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        """`forward`, and add the loss's gradient to the accumulated one; on an error add nothing.

        Gradients of several calls add up, without any division, until `optim_step` uses them.

        Args:
            data: as for `forward`. At positions where a "score_mask" is 0, logprobs may be left
                uncomputed: they read 0.0 and get no gradient.
            loss_fn: called exactly one time, in this request's place in the queue.
            loss_type_input: "vocab_logprobs" gives the loss `(N_i, V)` log p of every token; a
                backend may refuse it with a ConfigError.

        Returns:
            as `forward`; metrics also "passes" (forwards of the model, 1 or 2; one of a `forward`
            with keep_graph included) and "tokens".

        Raises:
            LossError: from the future; also for a gradient that is not finite.
        """
        ...

    def optim_step(
        self, params: AdamParams, after: Sequence[Future[Any]] = ()
    ) -> Future[OptimStepResponse]:
        """Take one AdamW step on the accumulated gradient, and clear it.

        Args:
            params: torch.optim.AdamW's, and the gradient norm to clip to.
            after: earlier requests; if one of them failed, nothing is changed.

        Returns:
            metrics "lr" and, where known, "grad_norm" (before clipping) and "update_norm".

        Raises:
            RequestError: from the future; no gradient was accumulated, or one of `after` failed.
        """
        ...

    def save(
        self,
        name: str,
        *,
        for_sampler: bool,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]:
        """Write a checkpoint, whole or not at all; the result is its path.

        Args:
            name: one path component.
            for_sampler: the weights alone; else the optimizer's state too.
            overwrite: replace other weights of this name, which are an error otherwise.
            user_metadata: text that `ServiceClient.get_checkpoint_metadata` returns.

        Raises:
            CheckpointError: at once or from the future.
        """
        ...

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        """Replace the weights by those saved at `path`, and discard accumulated gradients.

        The optimizer's state becomes the saved one, or is reset.

        Raises:
            CheckpointError: from the future; the checkpoint does not fit, and nothing has changed.
        """
        ...

    def open_sampler(self, path: str) -> Future[SamplingBackend]:
        """A sampler of the weights saved at `path`; this adapter stays as it is."""
        ...

    def snapshot(self) -> Future[SamplingBackend]:
        """A sampler of the weights as they are at this point of the queue."""
        ...

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model; may block while it loads."""
        ...


class Backend(Protocol):
    """One base model, its queue, and the adapters and samplers made from it."""

    def create_training(
        self,
        lora: LoraConfig,
        user_metadata: dict[str, str] | None = None,
        model_id: str | None = None,
    ) -> Future[TrainingBackend]:
        """A fresh adapter, which leaves the base model's logprobs unchanged.

        Args:
            lora: rank, seed (the same seed gives the same bytes) and which layers get LoRA.
            user_metadata: text kept with the adapter's checkpoints, or with its run at a service.
            model_id: name of the adapter and of its folder of checkpoints; None makes one. No
                effect at a service, which names its adapters.

        Raises:
            ModelError, ConfigError: from the future.
        """
        ...

    def restore_training(self, path: str, *, with_optimizer: bool) -> Future[TrainingBackend]:
        """An adapter with the weights (and the optimizer's state) saved at `path`.

        Raises:
            CheckpointError: at once or from the future.
        """
        ...

    def create_sampler(self, path: str | None) -> Future[SamplingBackend]:
        """A sampler of the weights saved at `path` or, for None, of the bare base model.

        Raises:
            CheckpointError: at once or from the future.
        """
        ...

    def close(self) -> None:
        """Finish queued requests, then free the model."""
        ...
