"""What a server has: sessions, adapters in training, samplers, promises.

One event loop's thread runs all of this, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError, RequestError
from cookbook_core.serve import fields
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.models import Base, Model
from cookbook_core.serve.replies import (
    Promise,
    Promises,
    Refused,
    Result,
    copy_outcome,
    missing,
)
from cookbook_core.serve.samplers import Sampler, Samplers
from cookbook_core.serve.saved_runs import SavedRuns
from cookbook_core.serve.turns import Turns

SMALL_BODY = 1 << 14
"""Bytes that are decoded in the event loop's thread; larger bodies would delay heartbeats."""
SILENT_SECONDS = 120.0
"""Programs send a heartbeat every 10 s: where there is no room, one silent for so long is over."""

log = logging.getLogger("cookbook_core.serve")


@dataclass
class Session:
    """One client program: what it made ends with it."""

    session_id: str
    metadata: Mapping[str, str] | None
    agent: str
    seen_at: float = field(default_factory=time.time)
    graphs: dict[str, GraphLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Limits of a server.

    max_adapters: adapters in training at a time.
    max_samplers: sampling weights in memory; others are on disk, up to max_spilled.
    max_waiting: sampling requests that may wait.
    idle_minutes: a program that sent nothing for so long is over: its adapters are saved.
    """

    max_adapters: int = 32
    max_samplers: int = 8
    max_spilled: int = 64
    max_waiting: int = 4096
    idle_minutes: float = 60.0


@dataclass(frozen=True)
class Call:
    """One HTTP request: its body, and whether that is protobuf; parts of its path; its client."""

    raw: bytes
    proto: bool = False
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    agent: str = ""

    @property
    def digest(self) -> bytes:
        """Identifies the body."""
        return hashlib.sha256(self.raw).digest()

    async def fields(self) -> Fields:
        """The fields of a JSON body."""
        if len(self.raw) > SMALL_BODY:
            return Fields(await asyncio.to_thread(fields.parse_json, self.raw))
        return Fields(fields.parse_json(self.raw))


class State:
    """Sessions, models, samplers and promises of one server.

    Args:
        bases: the base models, by name.
        root: where checkpoints are written.
        options: limits.
    """

    def __init__(self, bases: Mapping[str, Base], root: Path, options: Options) -> None:
        self.bases, self.options = bases, options
        self.promises = Promises()
        self.saved = SavedRuns(root, {base.path: name for name, base in bases.items()})
        self.models: dict[str, Model] = {}
        self.sessions: dict[str, Session] = {}
        self.samplers = Samplers(
            self.promises, root / ".snapshots", options.max_samplers, options.max_spilled,
            options.max_waiting,
        )  # fmt: skip
        self._made: dict[tuple[Any, ...], tuple[bytes, dict[str, Any]]] = {}
        """Replies of requests that make something, by its name."""
        self.started_at = time.time()

    # ---- look-ups --------------------------------------------------------------------------------

    def model(self, model_id: str) -> Model:
        """The model of this id.

        Raises:
            Refused: 404; says where to resume if the model was of an earlier run of the server.
        """
        model = self.models.get(model_id)
        if model is None:
            raise missing("model_id", model_id, self.resume_hint(model_id))
        model.used_at = time.time()
        self.touch(model.session)
        return model

    def resume_hint(self, model_id: str) -> str:
        """What a client can do whose model is gone."""
        row = self.saved.latest(model_id)
        if row is None:
            return "It was unloaded, or the server has been restarted; nothing of it was saved."
        return (
            "It was unloaded, or the server has been restarted. Resume from step "
            f"{row['_step']}: create_training_client_from_state_with_optimizer"
            f"({row['tinker_path']!r})."
        )

    def base(self, name: str) -> Base:
        """The base model of this name.

        Raises:
            Refused: 404; lists those that are served.
        """
        if name not in self.bases:
            raise missing("base_model", name, f"This server has {', '.join(self.bases)}.")
        return self.bases[name]

    def session(self, session_id: str) -> Session:
        """The session of this id.

        Raises:
            Refused: 404.
        """
        if session_id not in self.sessions:
            fix = "It has ended, or the server was restarted: make a new ServiceClient."
            raise missing("session_id", session_id, fix)
        return self.touch(session_id)

    def touch(self, session_id: str) -> Any:
        """The session, which has just been heard of; None if it is over."""
        session = self.sessions.get(session_id)
        if session is not None:
            session.seen_at = time.time()
        return session

    def sampler(self, sampler_id: str) -> Sampler:
        """The sampler of this id.

        Raises:
            Refused: 404.
        """
        sampler = self.samplers.get(sampler_id)
        if sampler is None:
            fix = "Only the latest snapshots are kept, and none over a restart: sample from a "
            fix += "checkpoint, save_weights_for_sampler(NAME)."
            raise missing("sampling_session_id", sampler_id, fix)
        self.touch(sampler.session)
        return sampler

    def once(self, call: Call, *key: Any) -> dict[str, Any] | None:
        """The reply to an earlier request that made what `key` names, None if it is the first.

        Raises:
            Refused: 422; the earlier request was another.
        """
        before = self._made.get(key)
        if before is not None and before[0] != call.digest:
            fix = "Number each once."
            error = RequestError(f"{key[0]} {key[2]}", "was made by another request", fix=fix)
            raise Refused(422, error)
        return None if before is None else before[1]

    def remember(self, call: Call, reply: dict[str, Any], *key: Any) -> dict[str, Any]:
        """Keep the reply to a request that made what `key` names; returns the reply."""
        self._made[key] = call.digest, reply
        return reply

    # ---- what is made, and dropped ---------------------------------------------------------------

    async def once_or_room(self, call: Call, *key: Any) -> dict[str, Any] | None:
        """`once`; for the first request, that there is room for one more adapter.

        Raises:
            Refused: 404, no such session; 422, as many adapters as there may be.
        """
        before = self.once(call, *key)
        if before is not None:
            return before
        self.session(key[1])
        if len(self.models) >= self.options.max_adapters:
            await self._end_silent(SILENT_SECONDS)
            before = self.once(call, *key)  # the same request may have come meanwhile
        if before is None and len(self.models) >= self.options.max_adapters:
            error = RequestError(
                "create_model",
                "too many adapters in training",
                expected=f"at most {self.options.max_adapters}",
                got=len(self.models),
                fix="End other programs, or start the server with a larger --max_adapters.",
            )
            raise Refused(422, error)
        return before

    def add_model(
        self, model_id: str, session: str, base: Base, rank: int | None, metadata: Any,
        made: Future[Any],
    ) -> Promise:  # fmt: skip
        """Register an adapter that is being made; its requests may queue behind it at once."""
        promise = self.promises.add(Promise(model_id, lambda _: typed("create_model")))
        turns = Turns(self.promises, model_id)
        model = Model(model_id, session, base, rank, turns, metadata, promise.future)
        self.models[model_id] = model
        loop = asyncio.get_running_loop()

        def settle(future: Future[Any]) -> None:
            if future.exception() is None:
                model.training = future.result()
                model.rank = model.training.info.lora_rank
                model.saved_step = model.steps
                turns.ready = True
                copy_outcome(future, promise.future, value=False)  # it would keep the adapter alive
                turns.advance()
            else:
                copy_outcome(future, promise.future)
                self.drop(model)

        made.add_done_callback(lambda future: loop.call_soon_threadsafe(settle, future))
        return promise

    def drop(self, model: Model) -> None:
        """Drop an adapter; what waits for its turn fails."""
        self.models.pop(model.model_id, None)
        model.turns.fail(RequestError(model.model_id, "was unloaded"))
        if model.training is not None:
            model.training.release()

    def open_sampler(
        self, sampler_id: str, session: str, path: str | None, base_name: str | None
    ) -> Sampler:
        """A sampler of a checkpoint, or of a bare base model.

        Raises:
            Refused: no such checkpoint or model.
        """
        folder = self.saved.folder_of(path) if path else None
        if folder is not None:
            base_name = base_name or self.saved.info(folder)["base_model"]
        if base_name is None:
            fix = "Pass one of them."
            raise Refused(
                422, RequestError("model_path", "model_path and base_model both missing", fix=fix)
            )
        base = self.base(base_name)
        made = None if folder is not None else base.backend.create_sampler(None)
        return self.samplers.add(Sampler(sampler_id, session, base, path, made, folder))

    def end_session(self, session_id: str) -> None:
        """Drop what a session made."""
        self.sessions.pop(session_id, None)
        for model in [m for m in self.models.values() if m.session == session_id]:
            self.drop(model)
        for sampler_id in self.samplers.of_session(session_id):
            self.samplers.remove(sampler_id)
        for key in [key for key in self._made if key[1] == session_id]:
            del self._made[key]

    # ---- ends ------------------------------------------------------------------------------------

    async def end_idle(self) -> None:
        """Every minute, end the programs that were silent for `Options.idle_minutes`."""
        while True:
            await asyncio.sleep(60)
            await self._end_silent(60 * self.options.idle_minutes)

    async def _end_silent(self, seconds: float) -> None:
        """Save and drop the adapters of programs that sent nothing for so long."""
        limit = time.time() - seconds
        for session in [s for s in self.sessions.values() if s.seen_at < limit]:
            log.info("session %s sent nothing for %.0f s: ended", session.session_id, seconds)
            await self.save_unsaved(lambda model, s=session: model.session == s.session_id)
            self.end_session(session.session_id)

    async def save_unsaved(self, chosen: Callable[[Model], bool] = lambda _: True) -> None:
        """Save the adapters with steps that are not on disk, after what they have queued."""
        saving: list[tuple[Model, Future[Any]]] = []
        for model in [m for m in self.models.values() if chosen(m) and m.training is not None]:
            await asyncio.wrap_future(model.training.release())  # behind what is queued
            if model.steps > model.saved_step:
                name = f"autosave-{model.steps}"
                saving.append((model, model.training.save(name, for_sampler=False, overwrite=True)))
        for model, future in saving:
            try:
                await asyncio.wrap_future(future)
            except CheckpointError as error:
                log.error("%s: %s", model.model_id, error)
            else:
                model.saved_step = model.steps
                log.info("%s: saved at step %d", model.model_id, model.steps)


def typed(kind: str, **values: Any) -> Result:
    """A result in JSON alone; clients recognise it by its type."""
    return Result(lambda: {"type": kind, **values})
