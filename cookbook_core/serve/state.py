"""What a server has: sessions, adapters in training, samplers, promises.

One event loop's thread runs all of this, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError, RequestError
from cookbook_core.serve.fields import digest
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.models import Base, Model
from cookbook_core.serve.replies import Encode, Promises, Repeats, copy_outcome, missing
from cookbook_core.serve.samplers import Sampler, Samplers
from cookbook_core.serve.saved_runs import SavedRuns
from cookbook_core.serve.turns import Turns

from starlette.requests import Request

SILENT_SECONDS = 120.0
"""Programs send a heartbeat every 10 s: where there is no room, one silent for so long is over."""

log = logging.getLogger("cookbook_core.serve")


@dataclass
class Session:
    """One client program: what it made ends with it.

    made: replies to its requests that make models and samplers.
    graphs: its uploaded losses, by id.
    """

    session_id: str
    metadata: Mapping[str, str] | None
    agent: str
    seen_at: float = field(default_factory=time.time)
    made: Repeats = field(default_factory=Repeats)
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
        self.started_at = time.time()

    # ---- look-ups: each raises Refused, 404, with what the client can do -------------------------

    def model(self, model_id: str) -> Model:
        """The model of this id."""
        model = self.models.get(model_id)
        if model is None:
            raise missing("model_id", model_id, self.resume_hint(model_id))
        model.used_at = time.time()
        self.touch(model.session)
        return model

    def resume_hint(self, model_id: str) -> str:
        """What a client can do whose model is gone."""
        gone, row = "It was unloaded, or the server has been restarted", self.saved.latest(model_id)
        if row is None:
            return f"{gone}; nothing of it was saved."
        call = f"create_training_client_from_state_with_optimizer({row['tinker_path']!r})"
        return f"{gone}. Resume from step {row['_step']}: {call}."

    def base(self, name: str) -> Base:
        """The base model of this name."""
        if name not in self.bases:
            raise missing("base_model", name, f"This server has {', '.join(self.bases)}.")
        return self.bases[name]

    def session(self, session_id: str) -> Session:
        """The session of this id."""
        session = self.touch(session_id)
        if session is None:
            fix = "It has ended, or the server was restarted: make a new ServiceClient."
            raise missing("session_id", session_id, fix)
        return session

    def touch(self, session_id: str) -> Session | None:
        """The session, which has just been heard of; None if it is over."""
        session = self.sessions.get(session_id)
        if session is not None:
            session.seen_at = time.time()
        return session

    def sampler(self, sampler_id: str) -> Sampler:
        """The sampler of this id."""
        sampler = self.samplers.get(sampler_id)
        if sampler is None:
            fix = "Only the latest snapshots are kept, and none over a restart: sample from a "
            fix += "checkpoint, save_weights_for_sampler(NAME)."
            raise missing("sampling_session_id", sampler_id, fix)
        self.touch(sampler.session)
        return sampler

    # ---- what is made, and dropped ---------------------------------------------------------------

    async def once(
        self, request: Request, session_id: str, kind: str, number: int, make: Callable[[str], Any]
    ) -> Any:
        """The reply to a request that makes a model or sampler; `make` takes its id, once.

        Args:
            request: sent again, it gets the same reply.
            session_id: of the client.
            kind: "train" or "sampler".
            number: of the model or sampler within its session and kind.
            make: returns the reply.

        Raises:
            RequestError: another request had this number, or there are too many adapters.
            Refused: 404; no such session.
        """
        made = self.session(session_id).made
        name = f"{session_id}:{kind}:{number}"
        key = name, (kind, number), digest(request)
        full = len(self.models) >= self.options.max_adapters and kind == "train"
        if full and made.find(*key) is None:
            await self._end_silent(SILENT_SECONDS)
        reply = made.find(*key)
        if reply is None and kind == "train":
            self._check_room()
        if reply is None:
            reply = make(name)
            made.keep(*key[1:], reply)
        return reply

    def _check_room(self) -> None:
        most, fix = self.options.max_adapters, "End other programs, or raise --max_adapters."
        if (n := len(self.models)) >= most:
            what, rule = "too many adapters in training", f"at most {most}"
            raise RequestError("create_model", what, expected=rule, got=n, fix=fix)

    def add_model(
        self, model_id: str, session: str, base: Base, rank: int | None, metadata: Any,
        made: Future[Any], encode: Encode,
    ) -> dict[str, Any]:  # fmt: skip
        """Register an adapter that is being made; its requests may queue behind it at once."""
        promise, turns = self.promises.add(model_id, encode), Turns(self.promises, model_id)
        model = Model(model_id, session, base, rank, turns, metadata, promise.future)
        self.models[model_id] = model
        loop = asyncio.get_running_loop()

        def settle() -> None:
            if made.exception() is None:
                model.training = made.result()
                model.rank = model.training.info.lora_rank
                model.saved_step = model.steps
                model.turns.ready = True
                copy_outcome(made, promise.future, value=False)  # it would keep the adapter alive
                model.turns.advance()
            else:
                copy_outcome(made, promise.future)
                self.drop(model)

        made.add_done_callback(lambda _: loop.call_soon_threadsafe(settle))
        return promise.reply()

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
            CookbookError: no such checkpoint or model.
        """
        folder = made = None
        if path:
            folder = self.saved.folder_of(path)
            base_name = base_name or self.saved.info(folder)["base_model"]
        if base_name is None:
            raise RequestError("model_path", "and base_model both missing", fix="Pass one of them.")
        base = self.base(base_name)
        if folder is None:
            made = base.backend.create_sampler(None)
        return self.samplers.add(Sampler(sampler_id, session, base, path, made, folder))

    def end_session(self, session_id: str) -> None:
        """Drop what a session made."""
        self.sessions.pop(session_id, None)
        for model in [m for m in self.models.values() if m.session == session_id]:
            self.drop(model)
        for sampler_id in self.samplers.of_session(session_id):
            self.samplers.remove(sampler_id)

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
            await self._save_unsaved(
                [m for m in self.models.values() if m.session == session.session_id]
            )
            self.end_session(session.session_id)

    async def close(self) -> None:
        """Finish what is queued, save the adapters with steps that are not on disk, and end."""
        await self._save_unsaved(list(self.models.values()))
        self.samplers.clear()
        for base in self.bases.values():
            await asyncio.to_thread(base.backend.close)

    async def _save_unsaved(self, models: list[Model]) -> None:
        """Save the adapters with steps that are not on disk, after what they have queued."""
        for model in [m for m in models if m.training is not None]:
            await asyncio.wrap_future(model.training.release())  # behind what is queued
            if model.steps == model.saved_step:
                continue
            name = f"autosave-{model.steps}"
            saving = model.training.save(name, for_sampler=False, overwrite=True)
            try:
                await asyncio.wrap_future(saving)
            except CheckpointError as error:
                log.error("%s: %s", model.model_id, error)
            else:
                model.saved_step = model.steps
                log.info("%s: saved at step %d", model.model_id, model.steps)
