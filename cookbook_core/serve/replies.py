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
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.errors import CookbookError, RequestError
from cookbook_core.types import ForwardBackwardOutput, SampleResponse

HOLD_SECONDS = 20.0
"""How long a poll is held open; clients give up after 45."""
KEEP_SECONDS = 60.0
"""How long a result stays after it was read: a client that lost the reply polls again."""
MOST_RESULTS = 4096
"""Finished results kept; beyond it the oldest are dropped."""
REMEMBERED = 4096
"""Requests of one model, sampler or session, the latest, of which a repetition is recognised."""
SMALL_REPLY = 1024
"""Sampled tokens whose reply the event loop's thread encodes itself."""

Encode = Callable[[Any, bool], Any]
"""Makes the reply of what a future holds: JSON, or bytes if the flag is set and there is such a
form."""

log = logging.getLogger("cookbook_core.serve")


class Refused(RequestError):
    """A refusal with another status than 422, which all other errors have."""

    def __init__(self, status: int, where: str, what: str, **slots: Any) -> None:
        super().__init__(where, what, **slots)
        self.status = status


def missing(what: str, got: object, fix: str) -> Refused:
    """The 404 of a name that this server does not have."""
    return Refused(404, what, "not on this server", got=got, fix=fix)


def told(error: BaseException) -> CookbookError:
    """The error that a client is told; unexpected ones are logged with their traceback."""
    if isinstance(error, CookbookError):
        return error
    log.error("internal error", exc_info=error)
    fix = "This is a defect of the server; its log has the traceback."
    return RequestError("server", "internal error", got=f"{type(error).__name__}: {error}", fix=fix)


def refusal(error: BaseException) -> tuple[int, CookbookError]:
    """The status and the error of a request that is answered with an HTTP error."""
    return (error.status if isinstance(error, Refused) else 422), told(error)


def refusal_body(error: CookbookError) -> dict[str, Any]:
    """The JSON body of an HTTP error: the whole message, and its slots."""
    return {"detail": plain(str(error)), "error": _slots(error)}


def failure_body(error: CookbookError, agent: str) -> dict[str, Any]:
    """The result of a request that failed, for the client that a User-Agent names.

    The category is always "user": Tinkex polls for ever at any other.
    """
    message, slots = plain(str(error)), _slots(error)
    if "tinkex" in agent.lower():
        return {"status": "failed", "error": {"message": message, "category": "user", **slots}}
    return {"error": message, "category": "user", "slots": slots}


def _slots(error: CookbookError) -> dict[str, str]:
    return {name: plain(value) for name, value in error.slots().items()}


def plain(text: str) -> str:
    """Text that UTF-8 can encode: paths of requests may hold other bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_small(result: Any) -> bool:
    """Whether encoding a result takes less time than handing it to another thread."""
    if isinstance(result, SampleResponse):
        more = (
            result.prompt_logprobs, result.topk_prompt_logprobs,
            result.target_prompt_logprobs, result.prompt_alt_tokens,
            *(sequence.topk_logprobs_np for sequence in result.sequences),
        )  # fmt: skip
        tokens = sum(len(sequence.tokens) for sequence in result.sequences)
        return tokens <= SMALL_REPLY and all(x is None for x in more)
    return not isinstance(result, ForwardBackwardOutput)


def typed(kind: str, **values: Any) -> Encode:
    """A reply that does not depend on the result; clients recognise it by its type."""
    return lambda *_: {"type": kind, **values}


class Repeats:
    """The replies to numbered requests: one that is sent again gets the same reply."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[bytes, Any]] = {}

    def find(self, where: str, number: Hashable, digest: bytes) -> Any:
        """The reply to this request if it has come before; None if it is the first of its number.

        Raises:
            RequestError: other bytes had this number.
        """
        before, reply = self._known.get(number, (digest, None))
        if before != digest:
            what, fix = "another request had this number", "Number each once."
            raise RequestError(f"{where}: seq_id", what, got=number, fix=fix)
        return reply

    def keep(self, number: Hashable, digest: bytes, reply: Any) -> None:
        """Remember a reply, and forget the oldest."""
        self._known[number] = digest, reply
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]


@dataclass
class Promise:
    """A request whose result a client polls for.

    request_id: ends in the model's id, so that a restarted server knows whose it was.
    read: whether the client has been sent the outcome.
    """

    model_id: str | None
    encode: Encode
    future: Future[Any] = field(default_factory=Future)
    request_id: str = ""
    read: bool = False
    read_at: float = 0.0

    def reply(self, **more: Any) -> dict[str, Any]:
        """The answer to the request itself."""
        return {"request_id": self.request_id, "model_id": self.model_id, **more}

    def start(self, submit: Callable[[], Future[Any]]) -> Future[Any] | None:
        """Submit the work, whose outcome becomes this promise's; None if that raises."""
        try:
            inner = submit()
        except Exception as error:
            self.future.set_exception(error)
            return None
        inner.add_done_callback(lambda future: copy_outcome(future, self.future))
        return inner

    def fail(self, error: BaseException) -> None:
        """Settle it with an error, unless it has been cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Promises:
    """All promises by request_id. The event loop's thread alone uses it."""

    def __init__(self) -> None:
        self._all: dict[str, Promise] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._all)

    def add(self, model_id: str | None, encode: Encode) -> Promise:
        """Register a promise, which gets its request_id."""
        request_id = f"{secrets.token_hex(8)}.{model_id or ''}"
        promise = self._all[request_id] = Promise(model_id, encode, request_id=request_id)
        self._added += 1
        if self._added % 64 == 0:
            self.forget_old()
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

    def forget_old(self) -> None:
        """Drop results that were read a while ago, and the oldest beyond MOST_RESULTS."""
        now = time.monotonic()
        done = [p for p in self._all.values() if p.future.done()]
        old = [p for p in done if p.read and now - p.read_at > KEEP_SECONDS]
        for promise in [*old, *done[: max(0, len(done) - MOST_RESULTS)]]:
            self._all.pop(promise.request_id, None)
            if promise.future.cancelled() or promise.future.exception() is None:
                promise.future, promise.encode = Future(), _forgotten
                promise.future.set_result(None)


def _forgotten(*_: Any) -> Any:
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
