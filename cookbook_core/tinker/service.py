"""ServiceClient: makes training and sampling clients."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cookbook_core.backend.interface import Backend
from cookbook_core.errors import CheckpointError, ConfigError
from cookbook_core.storage.paths import usable_path
from cookbook_core.tinker.futures import (
    APIFuture,
    ClientFuture,
    async_result,
    async_version,
    mapped,
)
from cookbook_core.tinker.sampling import SamplingClient
from cookbook_core.tinker.sdk_objects import check_optimizer
from cookbook_core.tinker.training import TrainingClient
from cookbook_core.types import (
    AdamOptimizerConfig,
    GetServerCapabilitiesResponse,
    LoraConfig,
    SupportedModel,
)

if TYPE_CHECKING:
    from cookbook_core.backend.remote.backend import RemoteBackend
    from cookbook_core.backend.remote.connection import Connection


class ServiceClient:
    """The entry point: everything runs on this machine or, with a base_url, at a service.

    Clients made for the same base model share one copy of it and one queue.

    Args:
        base_url: of a Tinker-compatible service, used through the `tinker` SDK (the extra
            "remote"). None or "": this machine.
        api_key: for the service; None takes TINKER_API_KEY or, unless the service is the hosted
            one, a placeholder.
        trust_service: train custom losses at the service without checking its gradients first.
        user_metadata, project_id, default_headers_overrides: passed to the service.
        device: "auto" (cuda, then mps, then cpu) or torch's own device string.
        dtype: "auto" (bfloat16 on cuda, else float32), "float32", "bfloat16", "float64", or "nf4":
            as "auto", with linear layers in 4 bits (docs/memory.md).
        gradient_checkpointing: "on" recomputes layers in the backward instead of storing their
            activations; "auto" does so if they do not fit into free memory; "off" never does.
        checkpoint_dir: where `save_state` and `save_weights_for_sampler` write; by default
            ./checkpoints in the folder Python was started in. Each client writes to a new folder
            model-N there; a client resumed from a checkpoint with its optimizer writes beside that.
        sampler_url: of a vLLM server of the same base model, which then draws all samples; the rest
            stays on this machine (docs/scaling.md).
        shard: under torchrun, each process holds a part of every layer of the base model instead of
            the whole (docs/scaling.md).
        display_name: no effect. api_key to default_headers_overrides have no effect on this
            machine, device to checkpoint_dir none at a service.

    Raises:
        ConfigError: base_url or sampler_url is not a URL, both are given, the SDK is not
            installed, or shard is given with base_url.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        gradient_checkpointing: str = "auto",
        checkpoint_dir: str | Path = "checkpoints",
        trust_service: bool = False,
        sampler_url: str | None = None,
        shard: bool = False,
    ) -> None:
        del display_name
        self._service: Connection | None = None
        self._trust = trust_service
        if sampler_url:
            from cookbook_core.backend.remote.connection import checked_url

            if base_url:
                fix = "Leave sampler_url out: the service samples."
                raise ConfigError("sampler_url", "not supported with base_url", fix=fix)
            sampler_url = checked_url("sampler_url", sampler_url)
        if base_url:
            if shard:
                fix = "Leave shard out: the service holds the model."
                raise ConfigError("shard", "not supported with base_url", fix=fix)
            from cookbook_core.backend.remote.connection import Connection

            headers = dict(default_headers_overrides or {})
            self._service = Connection(
                base_url, api_key, user_metadata=user_metadata, project_id=project_id,
                headers=headers,
            )  # fmt: skip
        self._options: dict[str, Any] = {
            "sampler_url": sampler_url or "",
            "device": device,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
            "shard": shard,
        }
        self._checkpoint_dir = usable_path("checkpoint_dir", checkpoint_dir, ConfigError)
        self._backends: dict[str, Any] = {}
        self._model_ids: Any = None

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A client that trains a fresh LoRA adapter on `base_model`.

        Args:
            base_model: a Hugging Face folder, a name on the Hub, or "tiny" for the bundled model.
            rank: of the adapter; alpha is 32 for every rank.
            seed: of the adapter's initial values; the same seed gives the same bytes.
            train_mlp, train_attn, train_unembed: which linear layers get LoRA.
            user_metadata: text by name, written into every checkpoint of this client (a service
                stores it with the training run instead).
            optimizer: AdamW is the only one.

        Raises:
            ModelError, ConfigError: from the future.
        """
        check_optimizer(optimizer)
        lora = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        created = self._backend(base_model).create_training(lora, user_metadata)
        return ClientFuture(mapped(created, TrainingClient), "create_lora_training_client")

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A client that starts from saved weights, with a fresh optimizer.

        Args:
            path: a folder that `save_state` or `save_weights_for_sampler` wrote, or that peft
                wrote for a LoRA on this base model; at a service, a path that one of the two
                returned.
            base_model: None takes the base model that the checkpoint names.
            user_metadata, weights_access_token: no effect.
            optimizer: AdamW is the only one.

        Raises:
            CheckpointError, ConfigError: at once or from the future.
        """
        del user_metadata, weights_access_token
        check_optimizer(optimizer)
        return self._restore(path, base_model, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A client that resumes exactly from a `save_state`, with its optimizer.

        Parameters and errors are those of `create_training_client_from_state`.
        """
        del user_metadata, weights_access_token
        return self._restore(path, base_model, with_optimizer=True)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> ClientFuture[SamplingClient]:
        """A client that samples from saved weights (`model_path`) or from a bare base model.

        Args:
            model_path: a checkpoint, as for `create_training_client_from_state`.
            base_model: a model, as for `create_lora_training_client`; beside a model_path, the
                base model of its weights.
            retry_config, record_stability_info: no effect.

        Raises:
            ConfigError, CheckpointError, ModelError: at once or from the future.
        """
        del retry_config, record_stability_info
        if model_path is None and base_model is None:
            what, fix = "model_path and base_model both missing", "Pass one of them."
            raise ConfigError("create_sampling_client", what, fix=fix)
        created = self._backend_of(model_path, base_model).create_sampler(model_path)
        return ClientFuture(mapped(created, SamplingClient), "create_sampling_client")

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The models that a service lists; on this machine the bundled one.

        Any Hugging Face causal LM can be used on this machine.
        """
        if self._service is not None:
            names = [m.model_name for m in self._service.models()]
            return GetServerCapabilitiesResponse([SupportedModel(name) for name in names])
        return GetServerCapabilitiesResponse([SupportedModel("tiny")])

    def get_checkpoint_metadata(self, path: str) -> dict[str, str]:
        """The user_metadata saved with a checkpoint, by name; empty if it has none.

        Waits for the result. Not in the SDK, which lists a run's checkpoints through its REST
        client instead.

        Args:
            path: a checkpoint, as for `create_training_client_from_state`.

        Raises:
            CheckpointError: no such checkpoint, or it cannot be read.
            RequestError: the service or the installed SDK does not store metadata of checkpoints.
        """
        if self._service is not None:
            return self._remote(None).checkpoint_metadata(path).result()
        from cookbook_core.backend.local.checkpoints import base_model_of, metadata_of

        folder = usable_path("path", path, CheckpointError)
        base_model_of(folder)  # refuses what is no checkpoint
        return metadata_of(folder)

    def close(
        self,
        status: Literal["success", "errored", "interrupted"] = "success",
        detail: str | None = None,
    ) -> APIFuture[None]:
        """Finish queued requests and release the models, before it returns.

        `with ServiceClient() as service:` does so at the end of the block. The parameters are the
        SDK's and have no effect.
        """
        del status, detail
        for backend in self._backends.values():
            backend.close()
        self._backends.clear()
        if self._service is not None:
            self._service.close()
        done: Future[None] = Future()
        done.set_result(None)
        return APIFuture(done, "close")

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def create_rest_client(self) -> Any:
        """Not supported: there is no REST interface on this machine.

        Raises:
            ConfigError: always; a ValueError, which callers of the SDK catch.
        """
        if self._service is None:
            fix = "Read the checkpoint folders directly."
            raise ConfigError("create_rest_client()", "not supported locally", fix=fix)
        fix = f"Use the SDK's: tinker.ServiceClient(base_url={self._service.url!r})."
        raise ConfigError("create_rest_client()", "not supported for a service", fix=fix)

    # ---- async names -----------------------------------------------------------------------------

    create_lora_training_client_async = async_result(create_lora_training_client)
    create_training_client_from_state_async = async_result(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = async_result(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = async_result(create_sampling_client)
    get_server_capabilities_async = async_version(get_server_capabilities)

    # ---- internal --------------------------------------------------------------------------------

    def _backend(self, base_model: str) -> Backend:
        """The backend of a base model; a local one imports torch and transformers."""
        if not isinstance(base_model, str) or not base_model:
            raise ConfigError(
                "base_model",
                "missing",
                expected='a folder, a name on the Hub or "tiny"',
                got=repr(base_model),
            )
        return self._local(base_model) if self._service is None else self._remote(base_model)

    def _backend_of(self, path: str | None, base_model: str | None) -> Backend:
        """The backend of `base_model` or, without one, of the base model that `path` names."""
        if base_model is None:
            if self._service is not None:
                return self._remote(None)
            base_model = _base_model_of(path)
        return self._backend(base_model)

    def _local(self, base_model: str) -> Backend:
        from cookbook_core.backend.local.backend import LocalBackend
        from cookbook_core.backend.local.model.loading import resolve_model
        from cookbook_core.backend.local.model_ids import ModelIds

        key = resolve_model(base_model)
        self._model_ids = self._model_ids or ModelIds(self._checkpoint_dir)
        if key not in self._backends:
            self._backends[key] = LocalBackend(
                base_model, self._checkpoint_dir, model_ids=self._model_ids, **self._options
            )
        return self._backends[key]

    def _remote(self, base_model: str | None) -> RemoteBackend:
        from cookbook_core.backend.remote.backend import RemoteBackend

        assert self._service is not None, "a base_url was given"
        key = base_model or f"of checkpoint {len(self._backends)}"
        if key not in self._backends:
            self._backends[key] = RemoteBackend(self._service, base_model, trusted=self._trust)
        return self._backends[key]

    def _restore(
        self, path: str, base_model: str | None, *, with_optimizer: bool
    ) -> ClientFuture[TrainingClient]:
        backend = self._backend_of(path, base_model)
        created = backend.restore_training(path, with_optimizer=with_optimizer)
        return ClientFuture(mapped(created, TrainingClient), "create_training_client_from_state")


def _base_model_of(path: Any) -> str:
    from cookbook_core.backend.local.checkpoints import base_model_of

    return base_model_of(usable_path("path", path, CheckpointError))
