"""Results that clients poll for, and refusals in the form that a client's language can show.

The statuses are a closed list, since clients retry 408, 409, 429 and 5xx for minutes:

    401 key   403 Host, Origin   404 no such thing   405 method   410 session is over
    413 too large   415 content type   422 all else that will not get better
    408 not ready: poll again   429 too many waiting samples: send again
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.errors import CookbookError, RequestError

HOLD_SECONDS = 20.0
"""How long a poll is held open; clients give up after 45."""
KEEP_SECONDS = 60.0
"""How long a result stays after it was read: a client that lost the reply polls again."""
MOST_RESULTS = 4096
"""Finished results kept; beyond it the oldest are dropped."""

log = logging.getLogger("cookbook_core.serve")


class Refused(Exception):
    """A request that is answered with an HTTP error.

    Args:
        status: one of the closed list.
        error: what the client is told.
    """

    def __init__(self, status: int, error: CookbookError) -> None:
        super().__init__(str(error))
        self.status, self.error = status, error


def missing(what: str, got: object, fix: str) -> Refused:
    """The 404 of a name that this server does not have."""
    return Refused(404, RequestError(what, "not on this server", got=got, fix=fix))


def told(error: BaseException) -> CookbookError:
    """The error that a client is told; unexpected ones are logged with their traceback."""
    if isinstance(error, Refused):
        return error.error
    if isinstance(error, CookbookError):
        return error
    log.error("internal error", exc_info=error)
    fix = "This is a defect of the server; its log has the traceback."
    return RequestError("server", "internal error", got=f"{type(error).__name__}: {error}", fix=fix)


def refusal_body(error: CookbookError) -> dict[str, Any]:
    """The JSON body of an HTTP error: the whole message, and its slots."""
    return {"detail": _plain(str(error)), "error": _slots(error)}


def failure_body(error: CookbookError, agent: str) -> dict[str, Any]:
    """The result of a request that failed, for the client that a User-Agent names.

    The category is always "user": Tinkex polls for ever at any other.
    """
    if "tinkex" in agent.lower():
        failed = {"message": _plain(str(error)), "category": "user", **_slots(error)}
        return {"status": "failed", "error": failed}
    return {"error": _plain(str(error)), "category": "user", "slots": _slots(error)}


def _slots(error: CookbookError) -> dict[str, str]:
    return {name: _plain(value) for name, value in error.slots().items()}


def _plain(text: str) -> str:
    """Text that UTF-8 can encode: paths of requests may hold other bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class Result:
    """What a client will be told of one request.

    json: a JSON object with the key "type".
    proto: the same as protobuf, for clients that accept that; None where there is no such form.
    """

    json: Callable[[], dict[str, Any]]
    proto: Callable[[], bytes] | None = None


@dataclass
class Promise:
    """A request whose result a client polls for.

    request_id: ends in the model's id, so that a restarted server knows whose it was.
    encode: makes the Result of what the future holds.
    read: whether the client has been sent the outcome.
    """

    model_id: str | None
    encode: Callable[[Any], Result]
    future: Future[Any] = field(default_factory=Future)
    request_id: str = ""
    read: bool = False
    read_at: float = 0.0

    def reply(self, **more: Any) -> dict[str, Any]:
        """The answer to the request itself."""
        return {"request_id": self.request_id, "model_id": self.model_id, **more}


class Promises:
    """All promises by request_id. The event loop's thread alone uses it."""

    def __init__(self) -> None:
        self._all: dict[str, Promise] = {}
        self._added = 0

    def add(self, promise: Promise) -> Promise:
        """Register a promise, which gets its request_id."""
        promise.request_id = f"{secrets.token_hex(8)}.{promise.model_id or ''}"
        self._all[promise.request_id] = promise
        self._added += 1
        if self._added % 64 == 0:
            self._forget_old()
        return promise

    def get(self, request_id: str) -> Promise | None:
        """The promise of this id."""
        return self._all.get(request_id)

    def waiting(self) -> int:
        """Number of requests that have not finished."""
        return sum(1 for promise in self._all.values() if not promise.future.done())

    async def wait(self, promise: Promise) -> bool:
        """Wait until a promise is done, HOLD_SECONDS at most; returns whether it is."""
        if not promise.future.done():
            inner = asyncio.wrap_future(promise.future)
            inner.add_done_callback(lambda f: f.cancelled() or f.exception())  # read it: no warning
            await asyncio.wait({inner}, timeout=HOLD_SECONDS)
        return promise.future.done()

    def _forget_old(self) -> None:
        now = time.monotonic()
        done = [p for p in self._all.values() if p.future.done()]
        old = [p for p in done if p.read and now - p.read_at > KEEP_SECONDS]
        for promise in [*old, *done[: max(0, len(done) - MOST_RESULTS)]]:
            self._all.pop(promise.request_id, None)
            if promise.future.cancelled() or promise.future.exception() is None:
                promise.future, promise.encode = settled(None), _forgotten


def _forgotten(_: Any) -> Result:
    """Stands for a result that is no longer kept."""
    fix = "Results stay for a minute after they were read. Send the request under a new number."
    raise RequestError("retrieve_future", "this result was dropped", fix=fix)


def copy_outcome(source: Future[Any], target: Future[Any], *, value: bool = True) -> None:
    """Settle `target` as `source`, which is done, was settled; with None without its `value`."""
    if target.done():
        return
    if source.cancelled():
        target.cancel()
    elif (error := source.exception()) is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result() if value else None)


def settled(value: Any) -> Future[Any]:
    """A future that holds a value."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future
