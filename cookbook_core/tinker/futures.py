"""Futures of requests: wait for them, await them, and log errors that nobody read."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from cookbook_core.backend.threads import in_worker_thread
from cookbook_core.errors import ProcessError, RequestError

T = TypeVar("T")
P = ParamSpec("P")
Client = TypeVar("Client")
logger = logging.getLogger("cookbook_core")


class Outcome:
    """The outcome of one request, and whether its caller knows it.

    Attributes:
        read: the caller has received the result or the error.
        mentioned: a later call of the client has logged that the error is unread.
        reported: the unread error has been logged with its traceback.
        after: requests whose failure makes this one fail; if theirs is known, this is not logged.
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
        """Whether the caller has read the error, or it or its cause has been logged."""
        return self.read or self.mentioned or self.reported or self._follows_known_error()

    def error(self) -> BaseException | None:
        """The exception of a finished, failed request; None otherwise."""
        if not self.future.done() or self.future.cancelled():
            return None
        return self.future.exception()

    def _follows_known_error(self) -> bool:
        error = self.error()
        if error is None:
            return False
        return any(o.error() is error.__cause__ and (o.read or o.reported) for o in self.after)

    def drop(self) -> None:
        """The caller has dropped its last reference to the future."""
        self._dropped = True
        self._report()

    def _report(self) -> None:
        """Log the unread error of a dropped future, as asyncio does; a second call does nothing."""
        with self._lock:
            if self.read or self.reported or not self._dropped:
                return
            error = None if self._follows_known_error() else self.error()
            self.reported = error is not None
        # whatever is computed next raises a ProcessError again
        if error is not None and not isinstance(error, ProcessError):
            logger.error(
                "%s failed and its result was never read: %s", self.label, error, exc_info=error
            )


class APIFuture(Generic[T]):
    """A result to come: call `.result()` in plain code, `await` it in async code.

    Names and behaviour of the `tinker` SDK's APIFuture. If a failed future is dropped unread, its
    error is logged with its traceback.
    """

    def __init__(self, future: Future[T], label: str = "request") -> None:
        self._future = future
        self.outcome = Outcome(label, future)

    def result(self, timeout: float | None = None) -> T:
        """Wait up to `timeout` seconds (None: without limit) and return the result.

        Raises:
            TimeoutError: no result in time; the request continues.
            RequestError: called inside a loss function on a request that has not finished.
            Exception: whatever the request raised.
        """
        self._check_deadlock()
        try:
            value = self._future.result(timeout)
        except BaseException as error:
            self.outcome.read = self.outcome.read or self._future.done()
            raise _builtin(error) from error.__cause__
        self.outcome.read = True
        return value

    async def result_async(self, timeout: float | None = None) -> T:
        """`result` for async code; other tasks run while it waits."""
        self._check_deadlock()
        wrapped = asyncio.wrap_future(self._future)
        try:
            # shield: a timeout ends the waiting, not the request
            value = await asyncio.wait_for(asyncio.shield(wrapped), timeout)
        except BaseException as error:
            self.outcome.read = self.outcome.read or self._future.done()
            raise _builtin(error) from error.__cause__
        self.outcome.read = True
        return value

    def _check_deadlock(self) -> None:
        if in_worker_thread() and not self._future.done():
            raise RequestError(
                f"{self.outcome.label}.result()",
                "waiting for a request inside a loss function is a deadlock: requests run one "
                "after another",
                fix="Compute what the loss needs before the call and put it on the datums "
                "(with_inputs).",
            )

    def future(self) -> Future[T]:
        """The plain `concurrent.futures.Future`; its errors are no longer logged here."""
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
    """A client to come: call `.result()` or await it, or use the future as the client.

    Reading any attribute of the client waits for it, as in the SDK's own futures of clients.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "outcome":
            raise AttributeError(name)
        return getattr(self.result(), name)


def _builtin(error: BaseException) -> BaseException:
    """Python 3.10's other timeouts as the built-in TimeoutError, as from 3.11 on."""
    timeouts = (concurrent.futures.TimeoutError, asyncio.TimeoutError)
    if isinstance(error, timeouts) and not isinstance(error, TimeoutError):
        return TimeoutError(*error.args)
    return error


def mapped(future: Future[Any], convert: Any) -> Future[Any]:
    """A future of `convert(result)`; cancelling it cancels the original."""
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
            except BaseException as raised:  # raised by out.result()
                out.set_exception(raised)

    out.add_done_callback(lambda _: out.cancelled() and future.cancel())
    future.add_done_callback(done)
    return out


class JointCalls:
    """Requests of coroutines that an event loop runs in one iteration, made as one unit.

    `asyncio.gather` starts its coroutines in one iteration: what they ask for together is computed
    together, whatever the timing.

    Args:
        unit: a context manager in which requests become a unit.
    """

    def __init__(self, unit: Callable[[], AbstractContextManager[None]]) -> None:
        self._unit = unit
        self._calls: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[], Any], Any]]] = {}

    async def make(self, request: Callable[[], APIFuture[T]]) -> APIFuture[T]:
        """Call `request()` in the loop's next iteration, with those of other coroutines."""
        loop = asyncio.get_running_loop()
        made = loop.create_future()
        if loop not in self._calls:
            self._calls[loop] = []
            loop.call_soon(self._make_all, loop)
        self._calls[loop].append((request, made))
        return await made

    def _make_all(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._unit():
            for request, made in self._calls.pop(loop):
                if made.cancelled():
                    continue
                try:
                    made.set_result(request())
                except Exception as error:  # raised to the coroutine that made the request
                    made.set_exception(error)


def async_version(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]:
    """Make the `*_async` variant: awaiting it returns the method's return value."""

    async def call(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        return getattr(self, method.__name__)(*args, **kwargs)

    return _named_async(method, call, "the same value")


def async_result(
    method: Callable[Concatenate[Client, P], APIFuture[T]], *, joined: bool = False
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]:
    """Make the `*_async` variant: awaiting it returns the result of the method's future.

    joined: coroutines that are started together make their requests as one unit: see `JointCalls`.
    """

    async def call(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        request = functools.partial(getattr(self, method.__name__), *args, **kwargs)
        future = await self._joint_calls.make(request) if joined else request()  # type: ignore
        return await future

    signature = inspect.signature(method)
    result = str(signature.return_annotation).partition("[")[2].removesuffix("]")
    call = _named_async(method, call, "its future's result")
    call.__signature__ = signature.replace(return_annotation=result)  # what help() shows
    return call


def _named_async(method: Any, call: Any, returned: str) -> Any:
    call = functools.wraps(method)(call)
    call.__name__, call.__qualname__ = f"{method.__name__}_async", f"{method.__qualname__}_async"
    text = inspect.getdoc(method)
    call.__doc__ = (
        f"Async version of `{method.__name__}`; awaiting it returns {returned}.\n\n{text}"
    )
    return call
