"""TrainingClient: forward, forward_backward, optim_step; saving, loading, sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from cookbook_core.backend.interface import TrainingBackend
from cookbook_core.builtin_losses import builtin_loss, needed_inputs
from cookbook_core.custom_loss import LossFn, LossTypeInput, check_loss
from cookbook_core.datum_checks import check_data
from cookbook_core.datums import score_where_weighted
from cookbook_core.errors import ConfigError, check_choice
from cookbook_core.tinker.futures import (
    APIFuture,
    ClientFuture,
    Outcome,
    async_result,
    async_version,
    mapped,
)
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
    """One LoRA adapter in training, made by `ServiceClient.create_lora_training_client` and others.

    Every method that uses the model returns an `APIFuture` at once; requests run in the order of
    submission. Bad data is an error before anything is queued; a request that fails later leaves
    gradients, weights and optimizer unchanged, and the client usable.
    """

    def __init__(self, backend: TrainingBackend) -> None:
        self._backend = backend
        self._outcomes: list[Outcome] = []
        self._gradients: list[Outcome] = []
        """forward_backward requests since the last optim_step."""

    # ---- losses ----------------------------------------------------------------------------------

    def forward(
        self,
        data: list[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: LossConfig = None,
        *,
        loss_type_input: LossTypeInput | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute logprobs and the value of a loss, without gradient or side effects.

        Args:
            data: datums with target_tokens `(N,)` or `(N, K)`.
            loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo" or "dro"; or, not in the
                SDK, your own loss as for `forward_backward_custom`, called under torch.no_grad().
            loss_fn_config: a built-in loss's options, e.g. {"clip_low_threshold": 0.8}.
            loss_type_input: what your own loss takes: see `forward_backward_custom`. A loss that
                keeps its rows of "vocab_logprobs" hands them out: they are constants. Services
                refuse "vocab_logprobs".

        Returns:
            loss_fn_outputs[i]["logprobs"]: shape of data[i]'s target_tokens, nats; none for
            "vocab_logprobs".
            metrics: "loss" and the loss's own.

        Raises:
            DatumError, ConfigError: at once, before anything is queued.
            LossError: from the future, if your own loss raises or is not finite.
        """
        if callable(loss_fn):
            loss_type = check_loss(loss_fn, loss_type_input)
            if loss_fn_config is not None:
                fix = "Bind your loss's arguments with functools.partial."
                raise ConfigError("loss_fn_config", "only for built-in losses", fix=fix)
            loss, own = self._custom(data, loss_fn, loss_type)
            return self._future("forward", self._backend.forward(own, loss, loss_type))
        if loss_type_input not in (None, "logprobs"):
            rule, got = '"logprobs" for a built-in loss', repr(loss_type_input)
            fix = "Pass your own function as loss_fn."
            raise ConfigError(
                "loss_type_input", "only for your own loss", expected=rule, got=got, fix=fix
            )
        builtin = builtin_loss(loss_fn, loss_fn_config)
        own = self._own(data, needed_inputs(loss_fn))
        return self._future("forward", self._backend.forward(list(own), builtin))

    def forward_backward(
        self, data: list[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """`forward`, and add the loss's gradient to the one that `optim_step` uses.

        Positions whose weights are 0 are not computed: their logprobs are returned as 0.0.
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
        """Add the exact gradient of your own loss; locally, in one forward and one backward.

        Args:
            data: datums with target_tokens; further loss_fn_inputs are for your loss alone. At
                positions where a datum's "score_mask" `(N,)` is 0, logprobs are not computed and
                read 0.0.
            loss_fn: `loss_fn(data, logprobs_list) -> (loss, metrics)`; logprobs_list[i] has the
                shape of data[i]'s target_tokens, in nats, on the CPU. It may mix datums freely.
                It runs exactly once, in this request's place in the queue; its `data` are the
                objects given here, the SDK's own datums included.
            loss_type_input: the loss's input. "vocab_logprobs": logprobs_list[i] acts as a tensor
                `(N, V)`, log p of every token at each position; rows are computed when indexed
                (`[t][ids]` costs one), and no target_tokens are needed. None: "logprobs".

        Returns:
            metrics: "loss" (your loss), your own metrics, "passes" (1; 2 if the graph does not
            fit in memory, or on a service), "tokens". loss_fn_outputs is empty for
            "vocab_logprobs".

        Raises:
            DatumError, ConfigError: at once, before anything is queued.
            LossError: from the future, if the loss raises or has no finite gradient; nothing is
                accumulated then.
        """
        loss_type = check_loss(loss_fn, loss_type_input)
        loss, own = self._custom(data, loss_fn, loss_type)
        backward = self._backend.forward_backward(own, loss, loss_type)
        return self._gradient("forward_backward_custom", backward)

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Take one AdamW step on the accumulated gradient, and clear the gradient.

        Args:
            optim_params: learning rate, betas, eps, weight decay and clipping; required.
            adam_params: the same, under the SDK's older name.

        Returns:
            metrics: grad_norm (before clipping), update_norm, lr.

        Raises:
            ConfigError: at once.
            RequestError: from the future, with nothing changed: no gradient was accumulated, or a
                forward_backward since the last step failed and its error was never read.
        """
        if optim_params is not None and adam_params is not None:
            fix = "Pass optim_params alone."
            raise ConfigError("optim_step", "optim_params and adam_params both given", fix=fix)
        params = own_params(AdamParams, optim_params if optim_params is not None else adam_params)
        if not isinstance(params, AdamParams):
            raise ConfigError(
                "optim_params",
                "wrong type",
                expected="AdamParams",
                got=type(params).__name__,
                fix="Pass tinker.AdamParams(learning_rate=...).",
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
        """Save weights and optimizer; locally as a folder that peft opens, at the returned path.

        Args:
            name: letters, digits, ".", "_" and "-".
            ttl_seconds: ignored; checkpoints stay until you delete them.
            overwrite: replace a checkpoint of this name that has other weights.
            user_metadata: text by name, for `ServiceClient.get_checkpoint_metadata`.

        Raises:
            CheckpointError: from the future: the name has other weights (without overwrite; the
                same weights are no error), or cannot be written.
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
        """Save the weights alone, for `ServiceClient.create_sampling_client(model_path=path)`.

        Parameters and errors are those of `save_state`, without overwrite.
        """
        del ttl_seconds
        saved = self._backend.save(name, for_sampler=True, user_metadata=user_metadata)
        return self._future(
            "save_weights_for_sampler", mapped(saved, SaveWeightsForSamplerResponse)
        )

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load weights saved by this package or peft; discard gradients and the optimizer's state.

        Raises:
            CheckpointError: from the future: not a checkpoint, or not for this model and adapter.
        """
        del weights_access_token
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load weights, Adam moments and step of a `save_state`; discard gradients.

        Raises:
            CheckpointError: from the future, as for `load_state`, or without optimizer state.
        """
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

        The parameters are the SDK's and have no effect: nothing is written to disk, no request is
        retried, and "snapshot" is the only kind.
        """
        del name, retry_config, record_stability_info
        check_choice(ConfigError, "kind", "not supported here", kind, ("snapshot",))
        snapshot = mapped(self._backend.snapshot(), SamplingClient)
        return self._future("save_weights_and_get_sampling_client", snapshot, ClientFuture)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> ClientFuture[SamplingClient]:
        """A sampling client of weights saved at `model_path`; other parameters have no effect."""
        del retry_config, record_stability_info
        opened = mapped(self._backend.open_sampler(model_path), SamplingClient)
        return self._future("create_sampling_client", opened, ClientFuture)

    # ---- information -----------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        """Base model, LoRA rank, context length and vocabulary size, without a request."""
        return self._backend.info

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return self._backend.tokenizer()

    @property
    def model_id(self) -> str:
        """The client's name within its service, and of its folder of checkpoints."""
        return self._backend.info.model_id

    @property
    def machine(self) -> dict[str, Any]:
        """What results depend on besides seed and data, down to their last bits: device, dtype,
        threads, processes, sizes of batches; or the service's URL. Not in the SDK."""
        return dict(self._backend.machine)

    # ---- async names -----------------------------------------------------------------------------

    forward_async = async_version(forward)
    forward_backward_async = async_version(forward_backward)
    forward_backward_custom_async = async_version(forward_backward_custom)
    optim_step_async = async_version(optim_step)
    save_state_async = async_version(save_state)
    save_weights_for_sampler_async = async_version(save_weights_for_sampler)
    load_state_async = async_version(load_state)
    load_state_with_optimizer_async = async_version(load_state_with_optimizer)
    save_weights_and_get_sampling_client_async = async_result(save_weights_and_get_sampling_client)
    create_sampling_client_async = async_result(create_sampling_client)
    get_info_async = async_version(get_info)

    # ---- internal --------------------------------------------------------------------------------

    def _own(self, data: Any, needs: Sequence[str]) -> Sequence[Datum]:
        """The batch as this package's datums, validated."""
        data, model = own_data(data), self._backend.info.model_data
        size = model.vocab_size
        check_data(data, vocab_size=size, max_context_length=model.max_context_length, needs=needs)
        return data

    def _custom(
        self, data: list[Datum], loss_fn: LossFn, loss_type: LossTypeInput
    ) -> tuple[LossFn, list[Datum]]:
        """A custom loss that gets the caller's own objects, and the batch, validated."""
        own = self._own(data, ("target_tokens",) if loss_type == "logprobs" else ())
        return (loss_fn if own is data else loss_on(data, loss_fn)), list(own)

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
        """Log each unread failure, at most one time; forget finished requests."""
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
