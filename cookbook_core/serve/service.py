"""The state of the server, and what each endpoint does to it.

One event loop's thread runs all of this, so nothing is locked; decoding and encoding of large
bodies run in other threads and touch no state.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError, CookbookError, RequestError
from cookbook_core.serve import fields
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.models import (
    Base,
    Model,
    adam_in,
    follow,
    scored_result,
    stepped_result,
)
from cookbook_core.serve.replies import (
    Promise,
    Promises,
    Refused,
    Result,
    copy_outcome,
    missing,
    settled,
)
from cookbook_core.serve.samplers import Sampler, Samplers
from cookbook_core.serve.saved_runs import SavedRuns, folder_name
from cookbook_core.serve.scoring import Scoring, decode, json_head, proto_head
from cookbook_core.serve.turns import Turns
from cookbook_core.types import AdamParams, LoraConfig, SamplingParams

UNLIMITED = 2**31 - 1
CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "custom_loss_server_side": True,
    "sample_enable_stuck_detection": False,
    # a batch is one request, which is computed whole or not at all
    "fwdbwd_max_chunk_len": UNLIMITED,
    "fwdbwd_max_chunk_bytes_count": UNLIMITED,
    "fwdbwd_dispatch_bytes_semaphore_size": UNLIMITED,
}
"""What the SDK is told to do. Uploaded losses and unchunked batches are what it has flags for."""
SMALL_BODY = 1 << 14
"""Bytes that are decoded in the event loop's thread; larger bodies would delay heartbeats."""
SILENT_SECONDS = 120.0
"""Programs send a heartbeat every 10 s: where there is no room, one silent for so long is over."""
MOST_GRAPHS = 64
"""Uploaded losses of one session."""

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


class Service:
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
        self._seen(model.session)
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
        return self._seen(session_id)

    def _seen(self, session_id: str) -> Any:
        session = self.sessions.get(session_id)
        if session is not None:
            session.seen_at = time.time()
        return session

    def _once(self, call: Call, *key: Any) -> dict[str, Any] | None:
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

    def _remember(self, call: Call, reply: dict[str, Any], *key: Any) -> dict[str, Any]:
        self._made[key] = call.digest, reply
        return reply

    # ---- sessions --------------------------------------------------------------------------------

    async def create_session(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        metadata = body.metadata()
        body.ignore("tags", "sdk_version", "project_id", "display_name")
        body.end()
        session_id = secrets.token_hex(4)
        self.sessions[session_id] = Session(session_id, metadata, call.agent)
        nothing = dict.fromkeys(("info_message", "warning_message", "error_message"))
        return {"type": "create_session", "session_id": session_id, **nothing}

    async def session_heartbeat(self, call: Call) -> dict[str, Any]:
        session_id = (await call.fields()).text("session_id")
        if self._seen(session_id) is None:
            raise Refused(410, RequestError("session_id", "the session is over", got=session_id))
        return {"type": "session_heartbeat"}

    async def finish_session(self, call: Call) -> dict[str, Any]:
        self.end_session(call.path["session"])
        return {}

    def end_session(self, session_id: str) -> None:
        """Drop what a session made."""
        self.sessions.pop(session_id, None)
        for model in [m for m in self.models.values() if m.session == session_id]:
            self._drop(model)
        for sampler_id in self.samplers.of_session(session_id):
            self.samplers.remove(sampler_id)
        for key in [key for key in self._made if key[1] == session_id]:
            del self._made[key]

    def _drop(self, model: Model) -> None:
        self.models.pop(model.model_id, None)
        model.turns.fail(RequestError(model.model_id, "was unloaded"))
        if model.training is not None:
            model.training.release()

    # ---- models ----------------------------------------------------------------------------------

    async def create_model(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        session, number = body.text("session_id"), body.integer("model_seq_id")
        base, metadata = self.base(body.text("base_model")), body.metadata()
        lora = Fields(body.mapping("lora_config", {}), "lora_config")
        config = LoraConfig(
            lora.integer("rank", 32, least=1),
            lora.integer("seed", None, least=-(2**63)),
            *(lora.flag(f"train_{part}", True) for part in ("unembed", "mlp", "attn")),
        )
        lora.end()
        _check_optimizer(body)
        body.end()
        key = ("model", session, number)
        if (before := await self._once_or_room(call, *key)) is not None:
            return before
        model_id = f"{session}:train:{number}"
        made = base.backend.create_training(config, metadata, folder_name(model_id))
        promise = self._add_model(model_id, session, base, config.rank, metadata, made)
        promise.encode = lambda _: _typed("create_model", model_id=model_id)
        return self._remember(call, promise.reply(), *key)

    async def _once_or_room(self, call: Call, *key: Any) -> dict[str, Any] | None:
        """`_once`; for the first request, that there is room for one more adapter.

        Raises:
            Refused: 404, no such session; 422, as many adapters as there may be.
        """
        before = self._once(call, *key)
        if before is not None:
            return before
        self.session(key[1])
        if len(self.models) >= self.options.max_adapters:
            await self._end_silent(SILENT_SECONDS)
            before = self._once(call, *key)  # the same request may have come meanwhile
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

    def _add_model(
        self, model_id: str, session: str, base: Base, rank: int | None, metadata: Any,
        made: Future[Any],
    ) -> Promise:  # fmt: skip
        promise = self.promises.add(Promise(model_id, lambda _: _typed("create_model")))
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
                self._drop(model)

        made.add_done_callback(lambda future: loop.call_soon_threadsafe(settle, future))
        return promise

    async def get_info(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        model = self.model(body.text("model_id"))
        body.end()
        try:
            await asyncio.shield(asyncio.wrap_future(model.made))
        except CookbookError as error:
            raise Refused(422, error) from error
        data = model.base.data
        about = {
            "arch": data.arch, "model_name": model.base.name, "tokenizer_id": data.tokenizer_id,
        }  # fmt: skip
        return {
            "type": "get_info", "model_data": about, "model_id": model.model_id, "is_lora": True,
            "lora_rank": model.rank, "model_name": model.base.name,
        }  # fmt: skip

    async def unload_model(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        model_id = body.text("model_id")
        body.end()
        if model_id in self.models:
            self._drop(self.models[model_id])
        promise = Promise(model_id, lambda _: _typed("unload_model", model_id=model_id))
        promise.future = settled(None)
        return self.promises.add(promise).reply()

    # ---- forward, backward, step -----------------------------------------------------------------

    async def forward(self, call: Call) -> dict[str, Any]:
        return await self._score(call, forward_only=True)

    async def forward_backward(self, call: Call) -> dict[str, Any]:
        return await self._score(call, forward_only=False)

    async def _score(self, call: Call, *, forward_only: bool) -> dict[str, Any]:
        def read() -> tuple[Model, Scoring]:
            head = (proto_head if call.proto else json_head)(call.raw, forward_only)
            model = self.model(head.model_id)
            session = self.sessions.get(model.session)
            graphs = session.graphs if session else {}
            return model, decode(head, graphs, model.base.data)

        small = len(call.raw) < SMALL_BODY
        model, scoring = read() if small else await asyncio.to_thread(read)
        what = "forward" if scoring.forward_only else "forward_backward"

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            future = scoring.start(model.training)
            future.add_done_callback(follow(model, what))
            return future

        promise = model.turns.submit(
            scoring.seq, call.digest, start, scored_result, gradient=not scoring.forward_only
        )
        return promise.reply()

    async def optim_step(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        model, seq = self.model(body.text("model_id")), body.integer("seq_id", None)
        given = body.mapping("adam_params", None) or body.mapping("optim_params", None)
        given = given or body.mapping("optimizer_params", {})
        body.ignore("adam_params", "optim_params", "optimizer_params")
        params: AdamParams | CookbookError
        try:
            body.end()
            params = adam_in(given)
        except CookbookError as error:
            params = error

        def start(after: Sequence[Future[Any]]) -> Future[Any]:
            if not isinstance(params, AdamParams):
                raise params
            return model.training.optim_step(params, after)

        return model.turns.submit(seq, call.digest, start, stepped_result, steps=True).reply()

    async def create_custom_loss(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        session = self.session(body.text("session_id"))
        body.ignore("custom_loss_seq_id")
        promise = self.promises.add(Promise(None, lambda made: _typed(
            "create_custom_loss", loss_id=made)))  # fmt: skip
        loss_id = hashlib.sha256(call.raw).hexdigest()[:16]
        try:
            loss = GraphLoss(body)
            body.end()
            if len(session.graphs) >= MOST_GRAPHS:
                what = "too many losses in this session"
                rule, got, fix = f"at most {MOST_GRAPHS}", len(session.graphs), "Upload each once."
                raise RequestError("create_custom_loss", what, expected=rule, got=got, fix=fix)
        except CookbookError as error:
            promise.future.set_exception(error)
        else:
            session.graphs[loss_id] = loss
            promise.future.set_result(loss_id)
        return promise.reply()

    # ---- saving and loading ----------------------------------------------------------------------

    async def save_weights(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        name, overwrite = body.text("path"), body.flag("overwrite")
        return self._save(call, body, "weights", name, overwrite)

    async def save_weights_for_sampler(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        name, number = body.text("path", None), body.integer("sampling_session_seq_id", None)
        body.unsupported(kind="snapshot")
        if name:
            return self._save(call, body, "sampler_weights", name, overwrite=False)
        model, seq = self._requested(body)
        sampler_id = f"{model.model_id}:sample:{seq if number is None else number}"

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            made = model.training.snapshot()
            self.samplers.add(
                Sampler(
                    sampler_id, model.session, model.base, f"snapshot of {model.model_id}", made
                )
            )
            done: Future[None] = Future()  # without the sampler, which it would keep alive
            made.add_done_callback(lambda future: copy_outcome(future, done, value=False))
            return done

        def encode(_: Any) -> Result:
            return _typed("save_weights_for_sampler", path=None, sampling_session_id=sampler_id)

        return model.turns.submit(seq, call.digest, start, encode).reply()

    def _requested(self, body: Fields) -> tuple[Model, int | None]:
        """The model and number of a request that saves or loads; refuses unknown fields."""
        model, seq = self.model(body.text("model_id")), body.integer("seq_id", None)
        body.ignore("ttl_seconds", "user_metadata")
        body.end()
        return model, seq

    def _save(
        self, call: Call, body: Fields, kind: str, name: str, overwrite: bool
    ) -> dict[str, Any]:
        metadata = body.metadata()
        model, seq = self._requested(body)
        sampler = kind == "sampler_weights"

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            future = model.training.save(
                name, for_sampler=sampler, overwrite=overwrite, user_metadata=metadata
            )
            future.add_done_callback(follow(model, f"save_{kind}"))
            return future

        kind_of_reply = "save_weights_for_sampler" if sampler else "save_weights"
        path = self.saved.path_of(model.model_id, kind, name)
        more = {"sampling_session_id": None} if sampler else {}
        encode = partial(lambda reply, _: reply, _typed(kind_of_reply, path=path, **more))
        return model.turns.submit(seq, call.digest, start, encode).reply()

    async def load_weights(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        path, optimizer = body.text("path"), body.flag("optimizer")
        body.ignore("weights_access_token")
        _check_optimizer(body)
        if body.text("model_id", None) is None:
            return await self._make_from(call, body, path, optimizer)
        model, seq = self._requested(body)

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            folder = self.saved.folder_of(path)
            future = model.training.load(str(folder), with_optimizer=optimizer)
            future.add_done_callback(follow(model, "save_weights"))
            return future

        encode = partial(lambda reply, _: reply, _typed("load_weights", path=path))
        return model.turns.submit(seq, call.digest, start, encode).reply()

    async def _make_from(
        self, call: Call, body: Fields, path: str, optimizer: bool
    ) -> dict[str, Any]:
        """Make a model from a checkpoint."""
        session, number = body.text("session_id"), body.integer("model_seq_id")
        metadata, named = body.metadata(), body.text("base_model", None)
        body.ignore("seq_id")
        body.end()
        key = ("model", session, number)
        if (before := await self._once_or_room(call, *key)) is not None:
            return before
        folder = self.saved.folder_of(path)
        base = self.base(named or self.saved.info(folder)["base_model"])
        model_id = f"{session}:train:{number}"
        made = base.backend.restore_training(
            str(folder), with_optimizer=optimizer, user_metadata=metadata,
            model_id=folder_name(model_id),
        )  # fmt: skip
        promise = self._add_model(model_id, session, base, None, metadata, made)
        promise.encode = lambda _: _typed("load_weights", path=path, model_id=model_id)
        return self._remember(call, promise.reply(), *key)

    async def weights_info(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        folder = self.saved.folder_of(body.text("tinker_path"))
        body.end()
        return self.saved.info(folder)

    # ---- sampling --------------------------------------------------------------------------------

    async def create_sampling_session(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        session, number = body.text("session_id"), body.integer("sampling_session_seq_id")
        path, named = body.text("model_path", None), body.text("base_model", None)
        body.end()
        key = ("sampler", session, number)
        if (before := self._once(call, *key)) is not None:
            return before
        self.session(session)
        sampler_id = f"{session}:sampler:{number}"
        self.open_sampler(sampler_id, session, path, named)
        reply = {"type": "create_sampling_session", "sampling_session_id": sampler_id}
        return self._remember(call, reply, *key)

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
        self._seen(sampler.session)
        return sampler

    async def get_sampler(self, call: Call) -> dict[str, Any]:
        sampler = self.sampler(call.path["sampler"])
        path = sampler.model_path if str(sampler.model_path).startswith("tinker:") else None
        about = {"sampler_id": sampler.sampler_id, "base_model": sampler.base.name}
        return {**about, "model_path": path}

    async def asample(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        prompt = fields.prompt_in(body.mapping("prompt"), "prompt")
        params = _sampling_params(body.inner("sampling_params"))
        count, seq = body.integer("num_samples", 1, least=1), body.integer("seq_id", None)
        wanted = body.flag("prompt_logprobs", False), body.integer("topk_prompt_logprobs", 0)
        body.unsupported(
            topk_sample_logprobs=0, target_prompt_logprobs=None, prompt_alt_tokens_k=0,
            prompt_logprobs_last_n=None, record_stability_info=False,
        )  # fmt: skip
        sampler_id = body.text("sampling_session_id", None)
        path, base_name = body.text("model_path", None), body.text("base_model", None)
        body.end()
        if sampler_id is None:  # clients older than sampling sessions
            sampler_id = f"of {path or base_name}"
            if self.samplers.get(sampler_id) is None:
                self.open_sampler(sampler_id, "", path, base_name)
        sampler = self.sampler(sampler_id)

        def start(weights: Any) -> Future[Any]:
            return weights.sample(prompt, count, params, *wanted)

        promise = self.samplers.submit(sampler, seq, call.digest, start)
        names = [f"{promise.request_id}{i}" for i in range(min(count, 65_536))]
        return promise.reply(sample_sequence_ids=names)

    async def cancel_future(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        promise = self.promises.get(body.text("request_id"))
        if promise is None or promise.model_id is not None:  # training requests stay in their turn
            return {"cancelled": False}
        return {"cancelled": promise.future.cancel()}

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


def _typed(kind: str, **values: Any) -> Result:
    """A result in JSON alone; clients recognise it by its type."""
    return Result(lambda: {"type": kind, **values})


def _check_optimizer(body: Fields) -> None:
    config = Fields(body.mapping("optimizer_config", {}), "optimizer_config")
    config.unsupported(type="adamw")
    config.end()


def _sampling_params(body: Fields) -> SamplingParams:
    """Sampling parameters from JSON; the backend checks their ranges."""
    params = SamplingParams(
        max_tokens=body.integer("max_tokens", None),
        seed=body.integer("seed", None, least=-(2**63)),
        stop=body.take("stop", "text, or a list", lambda v: isinstance(v, (str, list)), None),
        temperature=body.number("temperature", 1.0),
        top_k=body.integer("top_k", -1, least=-1),
        top_p=body.number("top_p", 1.0),
    )
    body.end()
    return params
