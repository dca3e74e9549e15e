"""The endpoints: HTTP to `Service`, and errors to statuses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cookbook_core.errors import CookbookError, RequestError
from cookbook_core.serve import chat, page
from cookbook_core.serve.guard import Guard
from cookbook_core.serve.models import Base
from cookbook_core.serve.replies import Promise, Refused, failure_body, missing, refusal_body, told
from cookbook_core.serve.saved_runs import public, run_row
from cookbook_core.serve.service import CLIENT_CONFIG, Service
from cookbook_core.serve.state import Call, Options

API = "/api/v1"
PROTO = "application/x-protobuf"
NOT_OFFERED = (
    "save_weights_external", "copy_weights", "sample", "stream_sample", "join_sampling_session",
    "auth/token",
)  # fmt: skip
"""Endpoints of the hosted service that this one answers with a sentence."""

Handler = Callable[[Call], Awaitable[Any]]


def make_app(
    bases: Mapping[str, Base],
    checkpoint_dir: Path,
    *,
    host: str = "127.0.0.1",
    key: str | None = None,
    names: Iterable[str] = (),
    most_bytes: int = 256 << 20,
    options: Options | None = None,
) -> Any:
    """The ASGI application.

    Args:
        bases: the base models, by the name that clients use.
        checkpoint_dir: where checkpoints are written.
        host: the address that the server listens on.
        key: clients must send it; None: anyone on this machine may use the server.
        names: further names of this machine, for the header Host.
        most_bytes: of a request's body, decompressed.
        options: limits.
    """

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        app.state.service = service = Service(bases, checkpoint_dir, options or Options())
        endpoints.service = service
        idle = asyncio.create_task(service.end_idle())
        yield
        idle.cancel()
        await service.save_unsaved()
        service.samplers.clear()
        for base in bases.values():
            await asyncio.to_thread(base.backend.close)

    endpoints = Endpoints()
    app = Starlette(lifespan=life, routes=endpoints.routes(), exception_handlers={
        Refused: _refused, CookbookError: _refused, Exception: _refused, HTTPException: _refused,
    })  # fmt: skip
    return Guard(app, host, key, names, most_bytes)


async def _refused(request: Request, error: Exception) -> Response:
    """The closed list of statuses; see `replies`."""
    if isinstance(error, HTTPException):
        status, fix = error.status_code, "docs/serve.md lists the endpoints."
        got = f"{request.method} {request.url.path}"
        shown: CookbookError = RequestError("endpoint", "not offered", got=got, fix=fix)
    else:
        status, shown = getattr(error, "status", 422), told(error)
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(refusal_body(shown), status, headers)


def call_of(request: Request) -> Call:
    """A request without its HTTP."""
    headers = request.headers
    proto = headers.get("content-type", "").startswith(PROTO)
    return Call(
        request.scope["cookbook.body"], proto, request.path_params, request.query_params,
        headers.get("user-agent", ""),
    )  # fmt: skip


class Endpoints:
    """The routes, over a service that exists once the server has started."""

    service: Service

    def routes(self) -> list[Route]:
        """All routes; unknown ones are 404."""
        made = ("create_model", "unload_model", "forward", "forward_backward", "optim_step",
                "save_weights", "save_weights_for_sampler", "load_weights", "asample",
                "create_custom_loss")  # fmt: skip
        plain = ("create_session", "session_heartbeat", "get_info", "weights_info",
                 "create_sampling_session", "cancel_future")  # fmt: skip
        routes = [self._post(f"{API}/{name}", name, 202) for name in made]
        routes += [self._post(f"{API}/{name}", name, 200) for name in plain]
        routes += [Route(f"{API}/{name}", _not_offered, methods=["POST"]) for name in NOT_OFFERED]
        run, one = f"{API}/training_runs/{{run}}", "/checkpoints/{kind}/{name}"
        return [
            *routes,
            self._post(f"{API}/sessions/{{session}}/finish", "finish_session", 200),
            self._post(f"{API}/samplers/{{sampler}}", "get_sampler", 200, "GET"),
            Route(f"{API}/client/config", _client_config, methods=["POST"]),
            Route(f"{API}/client/dynamic_config", _dynamic_config, methods=["POST"]),
            Route(f"{API}/telemetry", _telemetry, methods=["POST"]),
            Route(f"{API}/healthz", _health),
            Route(f"{API}/get_server_capabilities", self.capabilities),
            Route(f"{API}/retrieve_future", self.retrieve, methods=["POST"]),
            Route(f"{API}/checkpoints", self.checkpoints),
            Route(f"{API}/training_runs", self.training_runs),
            Route(run, self.training_run),
            Route(f"{run}/checkpoints", self.checkpoints),
            Route(f"{run}{one}", self.delete, methods=["DELETE"]),
            Route(f"{run}{one}/archive", self.archive_link),
            Route(f"{run}{one}/download", self.archive),
            Route(f"{run}{one}/{{what:path}}", _not_offered, methods=["POST", "PUT", "DELETE"]),
            Route(f"{API}/sessions", self.sessions),
            Route(f"{API}/sessions/{{session}}", self.session),
            Route("/", self.page),
            *chat.routes(lambda: self.service),
        ]

    def _post(self, path: str, name: str, status: int, method: str = "POST") -> Route:
        async def endpoint(request: Request) -> Response:
            reply = await getattr(self.service, name)(call_of(request))
            return JSONResponse(reply, status)

        return Route(path, endpoint, methods=[method])

    async def retrieve(self, request: Request) -> Response:
        """Wait for a result, in the form that the client accepts."""
        call = call_of(request)
        body = await call.fields()
        request_id = body.text("request_id")
        body.ignore("allow_metadata_only", "model_id")
        body.end()
        promises = self.service.promises
        promise = promises.get(request_id)
        if promise is None:
            model_id = request_id.partition(".")[2]
            raise missing("request_id", request_id, self.service.resume_hint(model_id))
        if not await promises.wait(promise):
            waiting = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return JSONResponse(waiting, 408)
        try:
            reply = await _outcome(promise, PROTO in request.headers.get("accept", ""))
        except Exception as error:
            reply = JSONResponse(failure_body(told(error), call.agent))
        promise.read, promise.read_at = True, time.monotonic()
        return reply

    async def capabilities(self, request: Request) -> Response:
        """The models that are served."""
        models = [
            {
                "model_name": base.name, "max_context_length": base.data.max_context_length,
                "trainable": True, "sampleable": True,
            }
            for base in self.service.bases.values()
        ]  # fmt: skip
        return JSONResponse({"supported_models": models})

    async def page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(await asyncio.to_thread(page.render, self.service))

    # ---- runs and checkpoints --------------------------------------------------------------------

    async def checkpoints(self, request: Request) -> Response:
        """Saved checkpoints, of one run or of all."""
        run = request.path_params.get("run")
        rows = await asyncio.to_thread(self.service.saved.checkpoints, run)
        return JSONResponse(_page_of("checkpoints", [public(row) for row in rows], request))

    async def training_runs(self, request: Request) -> Response:
        """Runs that are in training or have checkpoints."""
        runs = await asyncio.to_thread(self.service.saved.runs)
        live = {m.model_id: self._live(m.model_id) for m in self.service.models.values()}
        rows = list({**{k: v for k, v in live.items() if k not in runs}, **runs}.values())
        return JSONResponse(_page_of("training_runs", rows, request))

    async def training_run(self, request: Request) -> Response:
        """One run."""
        run = request.path_params["run"]
        runs = await asyncio.to_thread(self.service.saved.runs)
        row = runs.get(run) or self._live(run)
        if row is None:
            raise missing("training_run_id", run, f"List them: GET {API}/training_runs.")
        return JSONResponse(row)

    def _live(self, model_id: str) -> dict[str, Any] | None:
        model = self.service.models.get(model_id)
        if model is None:
            return None
        about = model.base.name, model.rank, model.used_at, model.user_metadata
        return run_row(model_id, *about)

    def _path(self, request: Request) -> str:
        parts = request.path_params
        return f"tinker://{parts['run']}/{parts['kind']}/{parts['name']}"

    async def delete(self, request: Request) -> Response:
        """Delete a checkpoint."""
        await asyncio.to_thread(self.service.saved.delete, self._path(request))
        return Response(status_code=204)

    async def archive_link(self, request: Request) -> Response:
        """Where a checkpoint's archive is."""
        self.service.saved.folder_of(self._path(request))
        link = str(request.url.replace(query="")).removesuffix("archive") + "download"
        headers = {"location": link, "expires": "Thu, 01 Jan 2037 00:00:00 GMT"}
        return Response(status_code=302, headers=headers)

    async def archive(self, request: Request) -> Response:
        """A checkpoint as a tar file."""
        tar = await asyncio.to_thread(self.service.saved.archive, self._path(request))
        return Response(tar, media_type="application/x-tar")

    async def sessions(self, request: Request) -> Response:
        """Ids of the sessions that have not ended."""
        return JSONResponse(_page_of("sessions", list(self.service.sessions), request))

    async def session(self, request: Request) -> Response:
        """What one session made."""
        service, session = self.service, request.path_params["session"]
        service.session(session)
        models = [m.model_id for m in service.models.values() if m.session == session]
        samplers = service.samplers.of_session(session)
        metadata = service.sessions[session].metadata
        about = {"training_run_ids": models, "sampler_ids": samplers}
        return JSONResponse({**about, "user_metadata": metadata})


def _page_of(name: str, rows: list[Any], request: Request) -> dict[str, Any]:
    """A slice of a list, by the query's limit and offset."""
    wanted = {}
    for key, default in (("limit", 100), ("offset", 0)):
        text = request.query_params.get(key, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise RequestError(f"?{key}", "not usable", expected="an integer >= 0", got=text)
        wanted[key] = int(text)
    offset, limit = wanted["offset"], wanted["limit"]
    cursor = {"offset": offset, "limit": limit, "total_count": len(rows)}
    return {name: rows[offset : offset + limit], "cursor": cursor}


async def _outcome(promise: Promise, proto: bool) -> Response:
    """The result of a promise that is done; raises its error."""
    if promise.future.cancelled():
        raise RequestError("request", "was cancelled")
    result = promise.encode(promise.future.result())
    if result.proto is not None and proto:
        return Response(await asyncio.to_thread(result.proto), media_type=PROTO)
    return JSONResponse(await asyncio.to_thread(result.json))


async def _client_config(request: Request) -> Response:
    return JSONResponse(CLIENT_CONFIG)


async def _dynamic_config(request: Request) -> Response:
    return JSONResponse({"sample_cancel_enabled": True})


async def _telemetry(request: Request) -> Response:
    """Accept and drop: it holds tracebacks of users' programs."""
    return JSONResponse({"status": "accepted"})


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _not_offered(request: Request) -> Response:
    got = f"{request.method} {request.url.path}"
    fix = "Checkpoints are folders on the server's machine: `cookbook export` converts them."
    raise Refused(422, RequestError("endpoint", "not offered by this server", got=got, fix=fix))
