"""TrainingClient: forward, forward_backward, optim_step, and what saves or samples the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from cookbook_core.backend.interface import TrainingBackend
from cookbook_core.builtin_losses import builtin_loss, needed_inputs
from cookbook_core.custom_loss import LossFn, LossTypeInput, check_loss
from cookbook_core.datums import check_data, score_where_weighted
from cookbook_core.errors import ConfigError, check_choice
from cookbook_core.tinker.futures import APIFuture, ClientFuture, Outcome, mapped
from cookbook_core.tinker.sampling import SamplingClient
from cookbook_core.tinker.sdk_objects import loss_on, own_data, own_params
from cookbook_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

T = TypeVar("T")
LossConfig: TypeAlias = Mapping[str, float | str] | None
logger = logging.getLogger("cookbook_core")


class TrainingClient:
    """One LoRA adapter in training.

    Every method that touches the model returns an `APIFuture` at once; requests run in the order
    they were made. Bad data is refused before anything is queued; a request that fails later
    leaves gradients, weights and optimizer as they were, and the client usable.
    `ServiceClient.create_lora_training_client` and its siblings make one.
    """

    def __init__(self, backend: TrainingBackend) -> None:
        self._backend = backend
        self._outcomes: list[Outcome] = []
        self._gradients: list[Outcome] = []
        """forward_backward requests since the last optim_step."""

    # ---- losses ----------------------------------------------------------------------------------

    def forward(
        self, data: list[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Logprobs and the value of a built-in loss; no gradient, no trace left.

        Args:
            data: datums with target_tokens `(N,)` or `(N, K)`.
            loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo" or "dro".
            loss_fn_config: the loss's options, e.g. {"clip_low_threshold": 0.8}.
        Raises:
            DatumError, ConfigError: at once, before anything is queued.
        """
        loss = builtin_loss(loss_fn, loss_fn_config)
        own = self._own(data, needed_inputs(loss_fn))
        return self._future("forward", self._backend.forward(list(own), loss))

    def forward_backward(
        self, data: list[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Like `forward`, and adds the loss's gradient to what `optim_step` will use.

        Positions whose weights are 0 are not computed: their logprobs come back as 0.0.
        """
        loss = builtin_loss(loss_fn, loss_fn_config)
        weighted = [score_where_weighted(d) for d in self._own(data, needed_inputs(loss_fn))]
        return self._gradient("forward_backward", self._backend.forward_backward(weighted, loss))

    def forward_backward_custom(
        self,
        data: list[Datum],
        loss_fn: LossFn,
        *,
        loss_type_input: LossTypeInput | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of your own loss: one forward, one backward, exact.

        Args:
            data: datums with target_tokens; any further loss_fn_inputs are for your loss. Where a
                datum has a "score_mask" `(N,)`, positions at which it is 0 are not computed and
                their logprobs read 0.0.
            loss_fn: `loss_fn(data, logprobs_list) -> (loss, metrics)`; logprobs_list[i] has the
                shape of data[i]'s target_tokens, in nats, on the CPU. It may mix datums freely.
                It runs exactly once, in this request's place in the queue, and `data` holds the
                very objects given here, the SDK's own datums included.
            loss_type_input: what the loss gets. "vocab_logprobs": logprobs_list[i] acts as a
                tensor `(N, V)`, log p of every token at each position; rows are computed when
                indexed (`[t][ids]` costs one), and no target_tokens are needed. None: "logprobs".
        Returns:
            metrics: "loss" (your loss), your own metrics, "passes" (1, or 2 when the graph did
            not fit in memory), "tokens". loss_fn_outputs is empty for "vocab_logprobs".
        Raises:
            DatumError, ConfigError: at once. LossError: from the future, when the loss raised or
            returned something without a finite gradient; nothing is accumulated then.
        """
        form = check_loss(loss_fn, loss_type_input)
        own = self._own(data, ("target_tokens",) if form == "logprobs" else ())
        if own is not data:
            loss_fn = loss_on(data, loss_fn)
        return self._gradient(
            "forward_backward_custom", self._backend.forward_backward(list(own), loss_fn, form)
        )

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which is used up by it.

        Refuses, changing nothing, when no gradient was accumulated, or when a forward_backward
        since the last step failed and its error was never read.

        Returns:
            metrics: grad_norm (before clipping), update_norm, lr.
        Raises:
            ConfigError: at once. RequestError: from the future.
        """
        if optim_params is not None and adam_params is not None:
            raise ConfigError("optim_step", "given twice", expected="one AdamParams", got="two")
        params = own_params(AdamParams, optim_params if optim_params is not None else adam_params)
        if not isinstance(params, AdamParams):
            raise ConfigError(
                "optim_params", "wrong type", expected="AdamParams", got=type(params).__name__
            )
        unread = [o for o in self._gradients if not o.read]
        step = self._backend.optim_step(params, [o.future for o in unread])
        future = self._future("optim_step", step)
        future.outcome.after = unread
        step.add_done_callback(lambda f: f.cancelled() or f.exception() or unread.clear())
        self._gradients.clear()
        return future

    # ---- saving and loading ----------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer under `name`; peft opens the folder whose path comes back.

        overwrite=False: a name that holds other weights is a CheckpointError, from the future;
        saving the same ones again is none. overwrite=True: they are replaced.
        ttl_seconds is for hosted services; files here stay until you delete them.
        """
        del ttl_seconds
        saved = self._backend.save(
            name, for_sampler=False, overwrite=overwrite, user_metadata=user_metadata
        )
        return self._future("save_state", mapped(saved, SaveWeightsResponse))

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save the weights alone, for `ServiceClient.create_sampling_client(model_path=path)`."""
        del ttl_seconds
        saved = self._backend.save(name, for_sampler=True, user_metadata=user_metadata)
        return self._future(
            "save_weights_for_sampler", mapped(saved, SaveWeightsForSamplerResponse)
        )

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Take over weights saved here or by peft; accumulated gradients go, Adam starts afresh."""
        del weights_access_token
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Take over weights, Adam moments and step of a `save_state`."""
        del weights_access_token
        return self._load(path, with_optimizer=True)

    def _load(self, path: str, *, with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        loaded = self._backend.load(path, with_optimizer=with_optimizer)
        return self._future("load_state", mapped(loaded, lambda _: LoadWeightsResponse(path)))

    # ---- sampling --------------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> ClientFuture[SamplingClient]:
        """A sampling client of the weights as they are at this point of the queue.

        The other parameters are the SDK's and have no effect here: nothing is written to disk, a
        local request is never retried, and a snapshot is the only kind.
        """
        del name, retry_config, record_stability_info
        check_choice(ConfigError, "kind", "not offered here", kind, ("snapshot",))
        snapshot = mapped(self._backend.snapshot(), SamplingClient)
        return self._future("save_weights_and_get_sampling_client", snapshot, ClientFuture)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> ClientFuture[SamplingClient]:
        """A sampling client of weights saved at `model_path`; see ServiceClient for the rest."""
        del retry_config, record_stability_info
        opened = mapped(self._backend.open_sampler(model_path), SamplingClient)
        return self._future("create_sampling_client", opened, ClientFuture)

    # ---- information -----------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        """Base model, LoRA rank, context length and vocabulary size; answers at once."""
        return self._backend.info

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return self._backend.tokenizer()

    @property
    def model_id(self) -> str:
        """Names this client within its service, and its folder of checkpoints."""
        return self._backend.info.model_id

    # ---- async names: each awaits to what its plain sibling returns ------------------------------

    async def forward_async(
        self, data: list[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Awaits to the APIFuture that `forward` returns."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: list[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Awaits to the APIFuture that `forward_backward` returns."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self,
        data: list[Datum],
        loss_fn: LossFn,
        *,
        loss_type_input: LossTypeInput | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Awaits to the APIFuture that `forward_backward_custom` returns."""
        return self.forward_backward_custom(data, loss_fn, loss_type_input=loss_type_input)

    async def optim_step_async(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Awaits to the APIFuture that `optim_step` returns."""
        return self.optim_step(optim_params, adam_params=adam_params)

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Awaits to the APIFuture that `save_state` returns."""
        return self.save_state(name, ttl_seconds, overwrite, user_metadata)

    async def save_weights_for_sampler_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Awaits to the APIFuture that `save_weights_for_sampler` returns."""
        return self.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    async def load_state_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Awaits to the APIFuture that `load_state` returns."""
        return self.load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Awaits to the APIFuture that `load_state_with_optimizer` returns."""
        return self.load_state_with_optimizer(path, weights_access_token)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """Awaits to the SamplingClient itself."""
        return await self.save_weights_and_get_sampling_client(
            name, retry_config, record_stability_info, kind
        )

    async def create_sampling_client_async(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """Awaits to the SamplingClient itself."""
        return await self.create_sampling_client(model_path, retry_config, record_stability_info)

    async def get_info_async(self) -> GetInfoResponse:
        """Same as `get_info`."""
        return self.get_info()

    # ---- within ----------------------------------------------------------------------------------

    def _own(self, data: Any, needs: Sequence[str]) -> Sequence[Datum]:
        """The batch as our own datums, checked."""
        data, model = own_data(data), self._backend.info.model_data
        size = model.vocab_size
        check_data(data, vocab_size=size, max_context=model.max_context_length, needs=needs)
        return data

    def _gradient(self, label: str, future: Future[T]) -> APIFuture[T]:
        wrapped = self._future(label, future)
        self._gradients = [o for o in self._gradients if not o.read] + [wrapped.outcome]
        return wrapped

    def _future(self, label: str, future: Future[T], kind: type[APIFuture[Any]] = APIFuture) -> Any:
        self._mention_unread()
        wrapped = kind(future, label)
        self._outcomes.append(wrapped.outcome)
        return wrapped

    def _mention_unread(self) -> None:
        """Log, once each, failures nobody has read yet; forget requests that are done."""
        for outcome in self._outcomes:
            error = outcome.error()
            if error is not None and not outcome.known:
                outcome.mentioned = True
                logger.warning(
                    "an earlier %s failed and its result has not been read: %s",
                    outcome.label,
                    error,
                )
        self._outcomes = [o for o in self._outcomes if not o.future.done()]
