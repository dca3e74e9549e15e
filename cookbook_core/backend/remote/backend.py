"""backend/interface.py over the `tinker` SDK.

A built-in loss is sent by name. A custom loss takes two passes: forward at the service, the loss
and its gradient here, then forward and backward of the linear surrogate at the service.
"""

from __future__ import annotations

from concurrent.futures import Future

from cookbook_core.backend.interface import SamplingBackend, TrainingBackend
from cookbook_core.backend.remote import convert, sampler, training
from cookbook_core.backend.remote.connection import Connection
from cookbook_core.backend.remote.session import Session
from cookbook_core.types import LoraConfig


class RemoteBackend:
    """One base model of a service; the arguments are those of `Session`."""

    def __init__(
        self, connection: Connection, base_model: str | None, *, trusted: bool = False
    ) -> None:
        self._session = Session(connection, base_model, trusted=trusted)

    def create_training(
        self,
        lora: LoraConfig,
        user_metadata: dict[str, str] | None = None,
        model_id: str | None = None,
    ) -> Future[TrainingBackend]:
        del model_id  # the service names its adapters
        return training.create_training(self._session, lora, user_metadata)

    def restore_training(self, path: str, *, with_optimizer: bool) -> Future[TrainingBackend]:
        return training.restore_training(self._session, path, with_optimizer=with_optimizer)

    def create_sampler(self, path: str | None) -> Future[SamplingBackend]:
        return sampler.create_sampler(self._session, path)

    def checkpoint_metadata(self, path: str) -> Future[dict[str, str]]:
        convert.check_path(path)
        session, label = self._session, "get_checkpoint_metadata"
        where = f"{label} at {session.connection.url}"

        def send() -> Future[dict[str, str]]:
            run = path.removeprefix("tinker://").split("/")[0]
            sent = session.connection.client().create_rest_client().list_checkpoints(run)
            return session.connection.answer(
                label, sent, lambda listed: convert.metadata_in(where, listed.checkpoints, path)
            )

        return session.submit(label, send)

    def close(self) -> None:
        self._session.close()
