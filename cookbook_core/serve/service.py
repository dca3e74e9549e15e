"""What each endpoint does: requests in, promises and replies out; docs/serve.md lists them.

Decoding of large bodies runs in other threads and touches no state.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from cookbook_core.errors import CookbookError, RequestError
from cookbook_core.serve import fields
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.models import Model, adam_in, follow, scored_result, stepped_result
from cookbook_core.serve.replies import Promise, Refused, Result, copy_outcome, settled
from cookbook_core.serve.samplers import Sampler
from cookbook_core.serve.saved_runs import folder_name
from cookbook_core.serve.scoring import Scoring, decode, json_head, proto_head
from cookbook_core.serve.state import SMALL_BODY, Call, Session, State, typed
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
MOST_GRAPHS = 64
"""Uploaded losses of one session."""


class Service(State):
    """The endpoints, over the state of one server."""

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
        if self.touch(session_id) is None:
            raise Refused(410, RequestError("session_id", "the session is over", got=session_id))
        return {"type": "session_heartbeat"}

    async def finish_session(self, call: Call) -> dict[str, Any]:
        self.end_session(call.path["session"])
        return {}

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
        if (before := await self.once_or_room(call, *key)) is not None:
            return before
        model_id = f"{session}:train:{number}"
        made = base.backend.create_training(config, metadata, folder_name(model_id))
        promise = self.add_model(model_id, session, base, config.rank, metadata, made)
        promise.encode = lambda _: typed("create_model", model_id=model_id)
        return self.remember(call, promise.reply(), *key)

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
            self.drop(self.models[model_id])
        promise = Promise(model_id, lambda _: typed("unload_model", model_id=model_id))
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
        promise = self.promises.add(Promise(None, lambda made: typed(
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
            return typed("save_weights_for_sampler", path=None, sampling_session_id=sampler_id)

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
        encode = partial(lambda reply, _: reply, typed(kind_of_reply, path=path, **more))
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

        encode = partial(lambda reply, _: reply, typed("load_weights", path=path))
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
        if (before := await self.once_or_room(call, *key)) is not None:
            return before
        folder = self.saved.folder_of(path)
        base = self.base(named or self.saved.info(folder)["base_model"])
        model_id = f"{session}:train:{number}"
        made = base.backend.restore_training(
            str(folder), with_optimizer=optimizer, user_metadata=metadata,
            model_id=folder_name(model_id),
        )  # fmt: skip
        promise = self.add_model(model_id, session, base, None, metadata, made)
        promise.encode = lambda _: typed("load_weights", path=path, model_id=model_id)
        return self.remember(call, promise.reply(), *key)

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
        if (before := self.once(call, *key)) is not None:
            return before
        self.session(session)
        sampler_id = f"{session}:sampler:{number}"
        self.open_sampler(sampler_id, session, path, named)
        reply = {"type": "create_sampling_session", "sampling_session_id": sampler_id}
        return self.remember(call, reply, *key)

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

        def start(weights: Any) -> Future[Any]:
            return weights.sample(prompt, count, params, *wanted, **more)

        promise = self.samplers.submit(sampler, seq, call.digest, start)
        names = [f"{promise.request_id}{i}" for i in range(min(count, 65_536))]
        return promise.reply(sample_sequence_ids=names)

    async def cancel_future(self, call: Call) -> dict[str, Any]:
        body = await call.fields()
        promise = self.promises.get(body.text("request_id"))
        if promise is None or promise.model_id is not None:  # training requests stay in their turn
            return {"cancelled": False}
        return {"cancelled": promise.future.cancel()}


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
