"""What each endpoint of the SDK does: requests in, promises and replies out; docs/serve.md.

Decoding of large bodies runs in other threads and touches no state.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from cookbook_core.errors import CookbookError, RequestError
from cookbook_core.serve import fields
from cookbook_core.serve.fields import SMALL_BODY, Fields, digest, fields_of, raw_body
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.guard import is_proto
from cookbook_core.serve.models import Model
from cookbook_core.serve.replies import Refused, copy_outcome, typed
from cookbook_core.serve.samplers import Sampler
from cookbook_core.serve.saved_runs import folder_name, wire_path
from cookbook_core.serve.scoring import json_scoring, proto_scoring, scored, wire_metrics
from cookbook_core.serve.state import Session, State
from cookbook_core.types import AdamParams, LoraConfig, SamplingParams

from starlette.requests import Request

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
MOST_GRAPHS = 64
"""Uploaded losses of one session."""

Reply = dict[str, Any]


class Service(State):
    """The endpoints, over the state of one server."""

    # ---- sessions --------------------------------------------------------------------------------

    async def create_session(self, request: Request) -> Reply:
        body = await fields_of(request)
        metadata = body.metadata()
        body.ignore("tags", "sdk_version", "project_id", "display_name")
        body.end()
        session_id, agent = secrets.token_hex(4), request.headers.get("user-agent", "")
        self.sessions[session_id] = Session(session_id, metadata, agent)
        nothing = dict.fromkeys(("info_message", "warning_message", "error_message"))
        return {"type": "create_session", "session_id": session_id, **nothing}

    async def session_heartbeat(self, request: Request) -> Reply:
        session_id = (await fields_of(request)).text("session_id")
        if self.touch(session_id) is None:
            raise Refused(410, "session_id", "the session is over", got=session_id)
        return {"type": "session_heartbeat"}

    async def finish_session(self, request: Request) -> Reply:
        self.end_session(request.path_params["session"])
        return {}

    # ---- models ----------------------------------------------------------------------------------

    async def create_model(self, request: Request) -> Reply:
        body = await fields_of(request)
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

        def make(model_id: str) -> Reply:
            made = base.backend.create_training(config, metadata, folder_name(model_id))
            encode = typed("create_model", model_id=model_id)
            return self.add_model(model_id, session, base, config.rank, metadata, made, encode)

        return await self.once(request, session, "train", number, make)

    async def get_info(self, request: Request) -> Reply:
        body = await fields_of(request)
        model = self.model(body.text("model_id"))
        body.end()
        await asyncio.shield(asyncio.wrap_future(model.made))
        data, name = model.base.data, model.base.name
        about = {"arch": data.arch, "model_name": name, "tokenizer_id": data.tokenizer_id}
        return {
            "type": "get_info", "model_data": about, "model_id": model.model_id, "is_lora": True,
            "lora_rank": model.rank, "model_name": name,
        }  # fmt: skip

    async def unload_model(self, request: Request) -> Reply:
        body = await fields_of(request)
        model_id = body.text("model_id")
        body.end()
        if model_id in self.models:
            self.drop(self.models[model_id])
        promise = self.promises.add(model_id, typed("unload_model", model_id=model_id))
        promise.future.set_result(None)
        return promise.reply()

    # ---- forward, backward, step -----------------------------------------------------------------

    async def forward(self, request: Request) -> Reply:
        return await self._score(request, forward_only=True)

    async def forward_backward(self, request: Request) -> Reply:
        return await self._score(request, forward_only=False)

    async def _score(self, request: Request, *, forward_only: bool) -> Reply:
        raw, parse = raw_body(request), proto_scoring if is_proto(request) else json_scoring

        def read() -> tuple[Any, Model, Any]:
            wanted = parse(raw, forward_only)
            model = self.model(wanted.model_id)
            session = self.sessions.get(model.session)
            try:
                batch = wanted.batch(session.graphs if session else {}, model.base.data)
            except Exception as error:  # fails in its turn: the client's numbers have no gap
                return wanted, model, error
            return wanted, model, batch

        small = len(raw) < SMALL_BODY
        wanted, model, batch = read() if small else await asyncio.to_thread(read)

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            if isinstance(batch, Exception):
                raise batch
            if wanted.forward_only:
                return model.training.forward(*batch, keep_graph=True)
            future = model.training.forward_backward(*batch)
            future.add_done_callback(model.scored)
            return future

        adds = not wanted.forward_only
        return model.turns.submit(wanted.seq, digest(request), start, scored, gradient=adds).reply()

    async def optim_step(self, request: Request) -> Reply:
        body = await fields_of(request)
        model, seq = self.model(body.text("model_id")), body.integer("seq_id", None)
        params = _adam_params(body)

        def start(after: Sequence[Future[Any]]) -> Future[Any]:
            if isinstance(params, CookbookError):  # fails in its turn
                raise params
            return model.training.optim_step(params, after)

        def encode(response: Any, _: bool) -> Reply:
            return {"type": "optim_step", "metrics": wire_metrics(response.metrics or {})}

        return model.turns.submit(seq, digest(request), start, encode, steps=True).reply()

    async def create_custom_loss(self, request: Request) -> Reply:
        body = await fields_of(request)
        session = self.session(body.text("session_id"))
        body.ignore("custom_loss_seq_id")
        loss_id = digest(request).hex()[:16]
        promise = self.promises.add(None, typed("create_custom_loss", loss_id=loss_id))
        try:
            loss = GraphLoss(body)
            body.end()
            if len(session.graphs) >= MOST_GRAPHS:
                what, rule = "too many losses in this session", f"at most {MOST_GRAPHS}"
                raise RequestError("create_custom_loss", what, expected=rule)
        except CookbookError as error:
            promise.fail(error)
        else:
            session.graphs[loss_id] = loss
            promise.future.set_result(None)
        return promise.reply()

    # ---- saving and loading ----------------------------------------------------------------------

    async def save_weights(self, request: Request) -> Reply:
        body = await fields_of(request)
        name, overwrite = body.text("path"), body.flag("overwrite")
        return self._save(request, body, "weights", name, overwrite)

    async def save_weights_for_sampler(self, request: Request) -> Reply:
        body = await fields_of(request)
        name, number = body.text("path", None), body.integer("sampling_session_seq_id", None)
        body.unsupported(kind="snapshot")
        if name:
            return self._save(request, body, "sampler_weights", name, overwrite=False)
        model, seq = self._requested(body)
        sampler_id = f"{model.model_id}:sample:{seq if number is None else number}"

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            made, of = model.training.snapshot(), f"snapshot of {model.model_id}"
            self.samplers.add(Sampler(sampler_id, model.session, model.base, of, made))
            done: Future[None] = Future()  # without the sampler, which it would keep alive
            made.add_done_callback(lambda future: copy_outcome(future, done, value=False))
            return done

        encode = typed("save_weights_for_sampler", path=None, sampling_session_id=sampler_id)
        return model.turns.submit(seq, digest(request), start, encode).reply()

    def _requested(self, body: Fields) -> tuple[Model, int | None]:
        """The model and number of a request that saves or loads; refuses unknown fields."""
        model, seq = self.model(body.text("model_id")), body.integer("seq_id", None)
        body.ignore("ttl_seconds", "user_metadata")
        body.end()
        return model, seq

    def _save(self, request: Request, body: Fields, kind: str, name: str, overwrite: bool) -> Reply:
        metadata = body.metadata()
        model, seq = self._requested(body)
        sampler = kind == "sampler_weights"

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            more = {"overwrite": overwrite, "user_metadata": metadata}
            future = model.training.save(name, for_sampler=sampler, **more)
            if not sampler:
                future.add_done_callback(model.saved)
            return future

        path = wire_path(model.model_id, kind, name)
        encode = typed("save_weights", path=path)
        if sampler:
            encode = typed("save_weights_for_sampler", path=path, sampling_session_id=None)
        return model.turns.submit(seq, digest(request), start, encode).reply()

    async def load_weights(self, request: Request) -> Reply:
        body = await fields_of(request)
        path, optimizer = body.text("path"), body.flag("optimizer")
        body.ignore("weights_access_token")
        _check_optimizer(body)
        if body.text("model_id", None) is None:
            return await self._make_from(request, body, path, optimizer)
        model, seq = self._requested(body)

        def start(_: Sequence[Future[Any]]) -> Future[Any]:
            folder = self.saved.folder_of(path)
            future = model.training.load(str(folder), with_optimizer=optimizer)
            future.add_done_callback(model.saved)
            return future

        encode = typed("load_weights", path=path)
        return model.turns.submit(seq, digest(request), start, encode).reply()

    async def _make_from(self, request: Request, body: Fields, path: str, optimizer: bool) -> Reply:
        """Make a model from a checkpoint."""
        session, number = body.text("session_id"), body.integer("model_seq_id")
        metadata, named = body.metadata(), body.text("base_model", None)
        body.ignore("seq_id")
        body.end()

        def make(model_id: str) -> Reply:
            folder = self.saved.folder_of(path)
            base = self.base(named or self.saved.info(folder)["base_model"])
            made = base.backend.restore_training(
                str(folder), with_optimizer=optimizer, user_metadata=metadata,
                model_id=folder_name(model_id),
            )  # fmt: skip
            encode = typed("load_weights", path=path, model_id=model_id)
            return self.add_model(model_id, session, base, None, metadata, made, encode)

        return await self.once(request, session, "train", number, make)

    async def weights_info(self, request: Request) -> Reply:
        body = await fields_of(request)
        folder = self.saved.folder_of(body.text("tinker_path"))
        body.end()
        return self.saved.info(folder)

    # ---- sampling --------------------------------------------------------------------------------

    async def create_sampling_session(self, request: Request) -> Reply:
        body = await fields_of(request)
        session, number = body.text("session_id"), body.integer("sampling_session_seq_id")
        path, named = body.text("model_path", None), body.text("base_model", None)
        body.end()

        def make(sampler_id: str) -> Reply:
            self.open_sampler(sampler_id, session, path, named)
            return {"type": "create_sampling_session", "sampling_session_id": sampler_id}

        return await self.once(request, session, "sampler", number, make)

    async def get_sampler(self, request: Request) -> Reply:
        sampler = self.sampler(request.path_params["sampler"])
        path = sampler.model_path if str(sampler.model_path).startswith("tinker:") else None
        about = {"sampler_id": sampler.sampler_id, "base_model": sampler.base.name}
        return {**about, "model_path": path}

    async def asample(self, request: Request) -> Reply:
        body = await fields_of(request)
        prompt = fields.prompt_in(body.mapping("prompt"), "prompt")
        params = _sampling_params(body.inner("sampling_params"))
        count, seq = body.integer("num_samples", 1, least=1), body.integer("seq_id", None)
        wanted = body.flag("prompt_logprobs", False), body.integer("topk_prompt_logprobs", 0)
        more = {
            "topk_sample_logprobs": body.integer("topk_sample_logprobs", 0),
            "target_prompt_logprobs": fields.targets_in(body, "target_prompt_logprobs"),
            "prompt_alt_tokens_k": body.integer("prompt_alt_tokens_k", 0),
            "prompt_logprobs_last_n": body.integer("prompt_logprobs_last_n", None),
        }
        body.unsupported(record_stability_info=False)
        sampler_id = body.text("sampling_session_id", None)
        path, base_name = body.text("model_path", None), body.text("base_model", None)
        body.end()
        if sampler_id is None:  # clients older than sampling sessions
            sampler_id = f"of {path or base_name}"
            if self.samplers.get(sampler_id) is None:
                self.open_sampler(sampler_id, "", path, base_name)
        sampler = self.sampler(sampler_id)
        if prompt.images:  # read here for the first time, outside of the event loop
            check = sampler.base.backend.engine().check_prompt
            await asyncio.to_thread(check, prompt, "sample")

        def start(weights: Any) -> Future[Any]:
            return weights.sample(prompt, count, params, *wanted, **more)

        promise = self.samplers.submit(sampler, seq, digest(request), start)
        names = [f"{promise.request_id}{i}" for i in range(min(count, 65_536))]
        return promise.reply(sample_sequence_ids=names)

    async def cancel_future(self, request: Request) -> Reply:
        body = await fields_of(request)
        promise = self.promises.get(body.text("request_id"))
        if promise is None or promise.model_id is not None:  # training requests stay in their turn
            return {"cancelled": False}
        return {"cancelled": promise.future.cancel()}


def _check_optimizer(body: Fields) -> None:
    config = Fields(body.mapping("optimizer_config", {}), "optimizer_config")
    config.unsupported(type="adamw")
    config.end()


def _adam_params(body: Fields) -> AdamParams | CookbookError:
    """AdamW's parameters from JSON, or what is wrong with them."""
    try:
        names = ("adam_params", "optim_params", "optimizer_params")
        found = [(name, given) for name in names if (given := body.mapping(name, None))]
        body.end()
        given = Fields(found[0][1], found[0][0]) if found else Fields({}, names[0])
        given.take("type", "adamw", lambda value: value in ("adam", "adamw"), "adamw")
        own = {f.name: given.number(f.name, f.default) for f in dataclasses.fields(AdamParams)}
        given.end()
        return AdamParams(**own)
    except CookbookError as error:
        return error


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
