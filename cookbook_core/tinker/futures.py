"""Futures of requests: wait, await, and hear of errors that nobody looked at."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from cookbook_core.backend.threads import in_worker_thread
from cookbook_core.errors import RequestError

T = TypeVar("T")
logger = logging.getLogger("cookbook_core")


class Outcome:
    """What became of one request, and whether anybody looked.

    read: the caller has had the result or the error in hand.
    mentioned: a later call of the client has said that nobody has read it.
    reported: the error has been logged with its traceback, because nobody had read it.
    after: requests whose failure alone makes this one fail; once that is known, this says nothing.
    """

    def __init__(self, label: str, future: Future[Any]) -> None:
        self.label = label
        self.future = future
        self.read = False
        self.mentioned = False
        self.reported = False
        self.after: list[Outcome] = []
        self._dropped = False
        self._lock = threading.Lock()
        future.add_done_callback(lambda _: self._report())

    @property
    def known(self) -> bool:
        """Whether the caller has heard of the error, or of its cause, in any way."""
        return self.read or self.mentioned or self.reported or self._only_follows()

    def error(self) -> BaseException | None:
        """The exception of a finished, failed request; None otherwise."""
        if not self.future.done() or self.future.cancelled():
            return None
        return self.future.exception()

    def _only_follows(self) -> bool:
        error = self.error()
        if error is None:
            return False
        return any(o.error() is error.__cause__ and (o.read or o.reported) for o in self.after)

    def drop(self) -> None:
        """The caller let go of the future."""
        self._dropped = True
        self._report()

    def _report(self) -> None:
        """Log the error of a dropped future once, as asyncio does."""
        with self._lock:
            if self.read or self.reported or not self._dropped:
                return
            error = None if self._only_follows() else self.error()
            self.reported = error is not None
        if error is not None:
            logger.error(
                "%s failed and its result was never read: %s", self.label, error, exc_info=error
            )


class APIFuture(Generic[T]):
    """A result that will come: `.result()` in plain code, `await` in async code.

    Names and behaviour of the `tinker` SDK's APIFuture. When a failed future is dropped without
    anybody having looked, its error is logged with its traceback.
    """

    def __init__(self, future: Future[T], label: str = "request") -> None:
        self._future = future
        self.outcome = Outcome(label, future)

    def result(self, timeout: float | None = None) -> T:
        """Wait up to `timeout` seconds (None: for ever) and return the result.

        Raises:
            TimeoutError: not there in time; the request goes on.
            RequestError: called inside a loss function on a request that has yet to run.
            Exception: whatever the request raised.
        """
        self._refuse_to_wait_for_itself()
        try:
            value = self._future.result(timeout)
        except BaseException as error:
            self.outcome.read = self.outcome.read or self._future.done()
            raise _builtin(error) from error.__cause__
        self.outcome.read = True
        return value

    async def result_async(self, timeout: float | None = None) -> T:
        """The same for async code; other tasks run while it waits."""
        self._refuse_to_wait_for_itself()
        wrapped = asyncio.wrap_future(self._future)
        try:
            # shield: a time-out ends the waiting, not the request
            value = await asyncio.wait_for(asyncio.shield(wrapped), timeout)
        except BaseException as error:
            self.outcome.read = self.outcome.read or self._future.done()
            raise _builtin(error) from error.__cause__
        self.outcome.read = True
        return value

    def _refuse_to_wait_for_itself(self) -> None:
        if in_worker_thread() and not self._future.done():
            raise RequestError(
                f"{self.outcome.label}.result()",
                "waiting inside a loss function would wait for itself",
                expected="a result that is there, since requests run one after another",
                got="one that has yet to run",
                fix="Compute what the loss needs before the call and put it on the datums "
                "(with_inputs).",
            )

    def future(self) -> Future[T]:
        """The plain `concurrent.futures.Future`; from here on its errors are yours to look at."""
        self.outcome.read = True
        return self._future

    async def coroutine(self) -> T:
        """This future as a coroutine, for `asyncio.create_task`."""
        return await self

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        state = "pending" if not self._future.done() else "done"
        if self.outcome.error() is not None:
            state = f"failed: {self.outcome.error()!r}"
        return f"<{type(self).__name__} {self.outcome.label}: {state}>"

    def __del__(self) -> None:
        outcome = getattr(self, "outcome", None)
        if outcome is not None:
            outcome.drop()


class ClientFuture(APIFuture[T]):
    """A client that is being made. Call `.result()` or await it; or use it as the client at once:
    any attribute is read from the finished client, as the SDK's own futures of clients allow."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "outcome":
            raise AttributeError(name)
        return getattr(self.result(), name)


def _builtin(error: BaseException) -> BaseException:
    """Time-outs as the built-in TimeoutError, which they are only from Python 3.11 on."""
    late = (concurrent.futures.TimeoutError, asyncio.TimeoutError)
    if isinstance(error, late) and not isinstance(error, TimeoutError):
        return TimeoutError(*error.args)
    return error


def mapped(future: Future[Any], convert: Any) -> Future[Any]:
    """A future of `convert(result)`; cancelling it cancels what it waits for."""
    out: Future[Any] = Future()

    def done(finished: Future[Any]) -> None:
        if finished.cancelled():
            out.cancel()
        if not out.set_running_or_notify_cancel():
            return
        if error := finished.exception():
            out.set_exception(error)
        else:
            try:
                out.set_result(convert(finished.result()))
            except BaseException as raised:  # handed to whoever waits for the result
                out.set_exception(raised)

    out.add_done_callback(lambda _: out.cancelled() and future.cancel())
    future.add_done_callback(done)
    return out
