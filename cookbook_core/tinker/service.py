"""ServiceClient: where training and sampling clients come from."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cookbook_core.backend.interface import Backend
from cookbook_core.errors import CheckpointError, ConfigError, RequestError
from cookbook_core.storage.paths import usable_path
from cookbook_core.tinker.futures import APIFuture, ClientFuture, mapped
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
    from cookbook_core.backend.remote.connection import Connection


class ServiceClient:
    """The entry point. Without a base_url everything runs on this machine.

    Clients made for the same base model share one copy of it and one queue.

    Args:
        base_url: of a Tinker-compatible service, driven through the `tinker` SDK (the extra
            "remote"). None or "": this machine.
        api_key: for the service; None takes TINKER_API_KEY, or, away from the hosted service, a
            placeholder.
        trust_service: train a loss of one's own on the service even if its arithmetic, which is
            looked at once before that, is wrong.
        user_metadata, project_id, default_headers_overrides: handed to the service.
        device: "auto" (cuda, then mps, then cpu) or torch's own device string.
        dtype: "auto" (bfloat16 on cuda, else float32), "float32", "bfloat16" or "float64".
        gradient_checkpointing: "on" computes layers again in the backward rather than keep what
            is in them; "auto" does so for what does not fit into free memory; "off" never does.
        checkpoint_dir: where `save_state` and `save_weights_for_sampler` write; by default
            ./checkpoints in the folder Python was started in. Each client has a folder model-N of
            its own there: the next that is not there yet, but for a client that goes on, with its
            optimizer, from a checkpoint in one: it saves beside that.
        display_name: no effect. device to checkpoint_dir have none at a service, nor has the third
            line on this machine.

    Raises:
        ConfigError: a base_url that is none, or without the SDK.
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
    ) -> None:
        del display_name
        self._service: Connection | None = None
        self._trust = trust_service
        if base_url:
            from cookbook_core.backend.remote.connection import Connection

            headers = dict(default_headers_overrides or {})
            self._service = Connection(
                base_url, api_key, user_metadata=user_metadata, project_id=project_id,
                headers=headers,
            )  # fmt: skip
        self._options = {
            "device": device,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
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
            base_model: a Hugging Face folder or hub name, or "tiny" for the bundled model.
            rank: of the adapter; alpha is 32 whatever the rank.
            seed: of the adapter's initial values; the same seed gives the same bytes.
            train_mlp, train_attn, train_unembed: which linear layers get LoRA.
            user_metadata: written into every checkpoint of this client.
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
            path: a folder `save_state` or `save_weights_for_sampler` wrote, or any folder peft
                wrote for a LoRA on this base model.
            base_model: None takes the base model the folder names.
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
        """A client that goes on exactly where a `save_state` left off."""
        del user_metadata, weights_access_token
        return self._restore(path, base_model, with_optimizer=True)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> ClientFuture[SamplingClient]:
        """A client that samples from saved weights (`model_path`) or from a bare base model."""
        del retry_config, record_stability_info
        if model_path is None and base_model is None:
            raise ConfigError(
                "create_sampling_client",
                "nothing named",
                expected="model_path or base_model",
                got=None,
            )
        created = self._backend_of(model_path, base_model).create_sampler(model_path)
        return ClientFuture(mapped(created, SamplingClient), "create_sampling_client")

    def get_checkpoint_metadata(self, path: str) -> dict[str, str]:
        """The user_metadata that the checkpoint at `path` was saved with.

        Raises:
            CheckpointError: not a checkpoint. RequestError: at a service.
        """
        if self._service is not None:
            fix = "Download the checkpoint, and use it on this machine."
            raise RequestError("get_checkpoint_metadata", "not offered by a service", fix=fix)
        from cookbook_core.backend.local.checkpoints import metadata_of

        return metadata_of(usable_path("path", path, CheckpointError))

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The models a service names; here the bundled one, any Hugging Face causal LM besides."""
        if self._service is not None:
            names = [m.model_name for m in self._service.models()]
            return GetServerCapabilitiesResponse([SupportedModel(name) for name in names])
        return GetServerCapabilitiesResponse([SupportedModel("tiny")])

    def close(
        self,
        status: Literal["success", "errored", "interrupted"] = "success",
        detail: str | None = None,
    ) -> APIFuture[None]:
        """Finish what is queued and let go of the models; done when it returns.

        `with ServiceClient() as service:` does so at the end of the block.
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
        """Refused: no service, so none of its records of runs and checkpoints.

        Raises:
            ConfigError: always; a ValueError, which callers of the SDK's are prepared for.
        """
        what, rule = "there is no service to ask", "a folder of checkpoints, read as files"
        raise ConfigError("create_rest_client", what, expected=rule, got="a call")

    # ---- async names: each awaits to the client itself -------------------------------------------

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """Awaits to the TrainingClient itself."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """Awaits to the TrainingClient itself."""
        return await self.create_training_client_from_state(
            path, base_model, user_metadata, weights_access_token, optimizer
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Awaits to the TrainingClient itself."""
        return await self.create_training_client_from_state_with_optimizer(
            path, base_model, user_metadata, weights_access_token
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Awaits to the SamplingClient itself."""
        return await self.create_sampling_client(
            model_path, base_model, retry_config, record_stability_info
        )

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """Same as `get_server_capabilities`."""
        return self.get_server_capabilities()

    # ---- within ----------------------------------------------------------------------------------

    def _backend_of(self, path: str | None, base_model: str | None) -> Backend:
        """The backend for a base model, or for the one that the weights at `path` are of."""
        if base_model is None and self._service is not None:
            return self._remote(None)
        return self._backend(_base_of(path) if base_model is None else base_model)

    def _remote(self, base_model: str | None) -> Backend:
        from cookbook_core.backend.remote.backend import RemoteBackend

        assert self._service is not None, "a base_url was given"
        key = base_model or f"of checkpoint {len(self._backends)}"
        if key not in self._backends:
            self._backends[key] = RemoteBackend(self._service, base_model, trusted=self._trust)
        return self._backends[key]

    def _backend(self, base_model: str) -> Backend:
        """The backend for a base model, made once; torch and transformers are imported here."""
        from cookbook_core.backend.local.backend import LocalBackend
        from cookbook_core.backend.local.model.loading import resolve_model
        from cookbook_core.backend.local.model_ids import ModelIds

        if not isinstance(base_model, str) or not base_model:
            raise ConfigError(
                "base_model",
                "missing",
                expected='a folder, a hub name or "tiny"',
                got=repr(base_model),
            )
        if self._service is not None:
            return self._remote(base_model)
        key = resolve_model(base_model)
        self._model_ids = self._model_ids or ModelIds(self._checkpoint_dir)
        if key not in self._backends:
            self._backends[key] = LocalBackend(
                base_model, self._checkpoint_dir, model_ids=self._model_ids, **self._options
            )
        return self._backends[key]

    def _restore(
        self, path: str, base_model: str | None, *, with_optimizer: bool
    ) -> ClientFuture[TrainingClient]:
        backend = self._backend_of(path, base_model)
        created = backend.restore_training(path, with_optimizer=with_optimizer)
        return ClientFuture(mapped(created, TrainingClient), "create_training_client_from_state")


def _base_of(path: Any) -> str:
    from cookbook_core.backend.local.checkpoints import base_model_of

    return base_model_of(usable_path("path", path, CheckpointError))
