"""The routes, the statuses of errors, runs and checkpoints over REST, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook_core.errors import CookbookError, RequestError
from cookbook_core.serve import chat, page
from cookbook_core.serve.fields import fields_of
from cookbook_core.serve.guard import PROTO, Guard
from cookbook_core.serve.models import Base
from cookbook_core.serve.replies import (
    failure_body,
    is_small,
    missing,
    refusal,
    refusal_body,
    told,
)
from cookbook_core.serve.saved_runs import public, run_row, wire_path
from cookbook_core.serve.service import CLIENT_CONFIG, Service
from cookbook_core.serve.state import Options

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

API = "/api/v1"
LIST_RUNS = f"List them: GET {API}/training_runs."
PROMISES = (
    "create_model", "unload_model", "forward", "forward_backward", "optim_step", "save_weights",
    "save_weights_for_sampler", "load_weights", "asample", "create_custom_loss",
)  # fmt: skip
"""Endpoints that answer 202 and have their result polled for."""
AT_ONCE = (
    "create_session", "session_heartbeat", "get_info", "weights_info", "create_sampling_session",
    "cancel_future",
)  # fmt: skip
CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"
REFUSED = {
    "auth/token": "No token is needed: this server's key, if it has one, is TINKER_API_KEY.",
    "auth/apikey/me": "This server has no accounts.",
    "audit": "This server has no accounts.",
    "billing/usage/events": "This server costs nothing.",
    "billing/usage/checkpoints/current": "This server costs nothing.",
    "copy_weights": "Checkpoints are folders on the server's machine: copy the folder.",
    "save_weights_external": "`cookbook export` converts a checkpoint, which is a folder.",
    f"{CHECKPOINT}/{{what:path}}": "A checkpoint is a folder, neither published nor expiring.",
    "sessions/search": "List them: GET /api/v1/sessions.",
    "sessions/{session}/project": "This server has no projects.",
    "sessions/{session}/trace_export": "This server records no traces.",
    "sample": "Use asample.",
    "stream_sample": "Use asample, or POST /v1/completions with stream.",
    "retrieve_futures": "Poll retrieve_future: this server's client/config asks for nothing else.",
    "join_sampling_session": "Choose a client id at random, as SDKs do by default.",
}
"""Endpoints of the hosted service that this one answers with a sentence."""


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
    service = Service(bases, checkpoint_dir, options or Options())

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        idle = asyncio.create_task(service.end_idle())
        yield
        idle.cancel()
        await service.close()

    handlers: Any = dict.fromkeys((CookbookError, Exception, HTTPException), _refused)
    app = Starlette(lifespan=life, routes=routes(service), exception_handlers=handlers)
    app.state.service = service
    return Guard(app, host, key, names, most_bytes)


async def _refused(request: Request, error: Exception) -> Response:
    """The closed list of statuses; see `replies`."""
    if isinstance(error, HTTPException):
        got, fix = f"{request.method} {request.url.path}", "docs/serve.md lists the endpoints."
        status, shown = error.status_code, RequestError("endpoint", "unknown", got=got, fix=fix)
    else:
        status, shown = refusal(error)
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(refusal_body(shown), status, headers)


def routes(service: Service) -> list[Route]:
    """All routes; unknown ones are 404."""
    rest = Rest(service)

    def route(method: str, path: str, answer: Any, status: int = 200) -> Route:
        async def endpoint(request: Request) -> Response:
            reply = await answer(request)
            return reply if isinstance(reply, Response) else JSONResponse(reply, status)

        return Route(f"{API}/{path}", endpoint, methods=[method])

    return [
        *(route("POST", name, getattr(service, name), 202) for name in PROMISES),
        *(route("POST", name, getattr(service, name)) for name in AT_ONCE),
        route("POST", "retrieve_future", rest.retrieve),
        route("POST", "sessions/{session}/finish", service.finish_session),
        route("GET", "samplers/{sampler}", service.get_sampler),
        route("POST", "client/config", _constant(CLIENT_CONFIG)),
        route("POST", "client/dynamic_config", _constant({"sample_cancel_enabled": True})),
        route("POST", "telemetry", _constant({"status": "accepted"})),  # users' tracebacks: dropped
        route("GET", "healthz", _constant({"status": "ok"})),
        route("GET", "get_server_capabilities", rest.capabilities),
        route("GET", "checkpoints", rest.checkpoints),
        route("GET", "training_runs", rest.training_runs),
        route("GET", "training_runs/{run}", rest.training_run),
        route("GET", "training_runs/{run}/checkpoints", rest.checkpoints),
        route("DELETE", CHECKPOINT, rest.delete),
        route("GET", f"{CHECKPOINT}/archive", rest.archive_link),
        route("GET", f"{CHECKPOINT}/download", rest.archive),
        route("GET", "sessions", rest.sessions),
        *(_refusing(path, fix) for path, fix in REFUSED.items()),
        route("GET", "sessions/{session}", rest.session),
        Route("/", rest.page),
        *chat.routes(service),
    ]  # fmt: skip


def _constant(reply: Any) -> Callable[[Request], Awaitable[Any]]:
    async def answer(_: Request) -> Any:
        return reply

    return answer


def _refusing(path: str, fix: str) -> Route:
    async def endpoint(request: Request) -> Response:
        got = f"{request.method} {request.url.path}"
        raise RequestError("endpoint", "not offered by this server", got=got, fix=fix)

    return Route(f"{API}/{path}", endpoint, methods=["GET", "POST", "PUT", "DELETE"])


class Rest:
    """Results that are polled for; lists of runs, checkpoints and sessions; the page."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def retrieve(self, request: Request) -> Response:
        """Wait for a result, in the form that the client accepts."""
        body = await fields_of(request)
        request_id = body.text("request_id")
        body.ignore("allow_metadata_only", "model_id")
        body.end()
        promises = self._service.promises
        promise = promises.get(request_id)
        if promise is None:
            hint = self._service.resume_hint(request_id.partition(".")[2])
            raise missing("request_id", request_id, hint)
        if not await promises.wait(promise):
            waiting = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return JSONResponse(waiting, 408)
        try:
            if promise.future.cancelled():
                raise RequestError("request", "was cancelled")
            binary = PROTO in request.headers.get("accept", "")
            result = promise.future.result()
            if is_small(result):
                reply = promise.encode(result, binary)
            else:
                reply = await asyncio.to_thread(promise.encode, result, binary)
            raw = isinstance(reply, bytes)
            response = Response(reply, media_type=PROTO) if raw else JSONResponse(reply)
        except Exception as error:
            agent = request.headers.get("user-agent", "")
            response = JSONResponse(failure_body(told(error), agent))
        promise.read, promise.read_at = True, time.monotonic()
        return response

    async def capabilities(self, request: Request) -> Any:
        """The models that are served."""
        models = [
            {
                "model_name": base.name, "max_context_length": base.data.max_context_length,
                "trainable": True, "sampleable": True,
            }
            for base in self._service.bases.values()
        ]  # fmt: skip
        return {"supported_models": models}

    async def page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(await asyncio.to_thread(page.render, self._service))

    async def checkpoints(self, request: Request) -> Any:
        """Saved checkpoints, of one run or of all."""
        run = request.path_params.get("run")
        rows = await asyncio.to_thread(self._service.saved.checkpoints, run)
        if run is not None and not rows and run not in self._service.models:
            raise missing("training_run_id", run, LIST_RUNS)
        return _page_of("checkpoints", [public(row) for row in rows], request)

    async def training_runs(self, request: Request) -> Any:
        """Runs that are in training or have checkpoints."""
        return _page_of("training_runs", list((await self._runs()).values()), request)

    async def training_run(self, request: Request) -> Any:
        """One run."""
        run, runs = request.path_params["run"], await self._runs()
        if run not in runs:
            raise missing("training_run_id", run, LIST_RUNS)
        return runs[run]

    async def _runs(self) -> dict[str, Any]:
        live = {
            m.model_id: run_row(m.model_id, m.base.name, m.rank, m.used_at, m.user_metadata)
            for m in self._service.models.values()
        }
        saved = await asyncio.to_thread(self._service.saved.runs)
        return {**{run: row for run, row in live.items() if run not in saved}, **saved}

    async def delete(self, request: Request) -> Response:
        """Delete a checkpoint."""
        await asyncio.to_thread(self._service.saved.delete, _path(request))
        return Response(status_code=204)

    async def archive_link(self, request: Request) -> Response:
        """Where a checkpoint's archive is."""
        self._service.saved.folder_of(_path(request))
        link = str(request.url.replace(query="")).removesuffix("archive") + "download"
        headers = {"location": link, "expires": "Thu, 01 Jan 2037 00:00:00 GMT"}
        return Response(status_code=302, headers=headers)

    async def archive(self, request: Request) -> Response:
        """A checkpoint as a tar file."""
        tar = await asyncio.to_thread(self._service.saved.archive, _path(request))
        return Response(tar, media_type="application/x-tar")

    async def sessions(self, request: Request) -> Any:
        """Ids of the sessions that have not ended."""
        return _page_of("sessions", list(self._service.sessions), request)

    async def session(self, request: Request) -> Any:
        """What one session made."""
        service = self._service
        session = service.session(request.path_params["session"])
        own = session.session_id
        return {
            "training_run_ids": [m.model_id for m in service.models.values() if m.session == own],
            "sampler_ids": service.samplers.of_session(own),
            "user_metadata": session.metadata,
        }


def _path(request: Request) -> str:
    parts = request.path_params
    return wire_path(parts["run"], parts["kind"], parts["name"])


def _page_of(name: str, rows: list[Any], request: Request) -> dict[str, Any]:
    """A slice of a list, by the query's limit and offset."""

    def number(key: str, default: str) -> int:
        text = request.query_params.get(key, default)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise RequestError(f"?{key}", "not usable", expected="an integer >= 0", got=text)
        return int(text)

    limit, offset = number("limit", "100"), number("offset", "0")
    cursor = {"offset": offset, "limit": limit, "total_count": len(rows)}
    return {name: rows[offset : offset + limit], "cursor": cursor}
