"""The requests of one model: in the order of their numbers, once each, and none lost in silence.

Clients number a model's requests from 1 and send several at a time, so they arrive in any order;
they send one again when the reply was lost. The event loop's thread alone uses this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from cookbook_core.errors import RequestError
from cookbook_core.serve.replies import Encode, Promise, Promises, Repeats

GAP_SECONDS = 120.0
"""How long requests wait for one with a lower number, which a dead client never sends."""
MOST_WAITING = 1024
"""Requests of a model that may wait for their turn."""

Start = Callable[[Sequence[Future[Any]]], Future[Any]]
"""Submits a request when its turn has come.

It gets the gradients since the last step of which the client, when it sent this request, did not
know the outcome.
"""


@dataclass
class _Request:
    start: Start
    promise: Promise
    known: frozenset[str]
    """Ids of the gradients whose outcome the client had read when it sent this request."""
    gradient: bool
    steps: bool


class Turns:
    """The queue in front of one model.

    Args:
        promises: of the server.
        model_id: on the wire.
    """

    def __init__(self, promises: Promises, model_id: str) -> None:
        self._promises, self.model_id = promises, model_id
        self.ready = False
        """Whether the model has been made. Nothing starts before."""
        self._next = 1
        self._waiting: dict[int, _Request] = {}
        self._repeats = Repeats()
        self._gradients: list[Promise] = []
        """forward_backwards, and refused steps, since the last step."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(
        self, seq: int | None, digest: bytes, start: Start, encode: Encode, *,
        gradient: bool = False, steps: bool = False,
    ) -> Promise:  # fmt: skip
        """Queue a request; the promise of the same request if it was sent before.

        Args:
            seq: its number; None: after those that are here.
            digest: of its bytes.
            start: see `Start`.
            encode: see `Encode`.
            gradient: it adds to the gradient.
            steps: it uses the gradient up.

        Raises:
            RequestError: another request had this number, or its turn has passed.
        """
        if seq is None:
            seq = max([self._next - 1, *self._waiting]) + 1
        promise = self._repeats.find(self.model_id, seq, digest)
        if promise is not None:
            return promise
        where = f"{self.model_id}: seq_id"
        if seq < self._next:
            what = f"its turn has passed, the next is {self._next}"
            fix = "Continue with a new client from the last checkpoint."
            raise RequestError(where, what, got=seq, fix=fix)
        if len(self._waiting) >= MOST_WAITING:
            what, fix = "too many requests wait for their turn", "Wait for results."
            raise RequestError(where, what, expected=f"at most {MOST_WAITING}", fix=fix)
        promise = self._promises.add(self.model_id, encode)
        known = frozenset(g.request_id for g in self._gradients if g.read)
        self._waiting[seq] = _Request(start, promise, known, gradient, steps)
        self._repeats.keep(seq, digest, promise)
        self.advance()
        return promise

    def advance(self) -> None:
        """Start the requests whose turn has come, and watch for a gap."""
        while self.ready and self._next in self._waiting:
            request = self._waiting.pop(self._next)
            self._next += 1
            self._start(request)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.ready and self._waiting:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(GAP_SECONDS, self._give_up)

    def _start(self, request: _Request) -> None:
        promise = request.promise
        if not promise.future.set_running_or_notify_cancel():
            return
        unread = [g.future for g in self._gradients if g.request_id not in request.known]
        if request.steps:
            self._gradients = []
        if request.gradient or request.steps:
            self._gradients.append(promise)  # a refused step stops the next one too
        promise.start(lambda: request.start(unread))

    def _give_up(self) -> None:
        """Fail what waits behind a number that did not come."""
        fix = "Make a new client from the last checkpoint."
        what = f"request {self._next} of this model did not arrive in {GAP_SECONDS:.0f} s"
        self.fail(RequestError(self.model_id, what, got=f"{sorted(self._waiting)[:5]}", fix=fix))

    def fail(self, error: Exception) -> None:
        """Fail everything that waits; later requests start behind it."""
        if self._waiting:
            self._next = max(self._waiting) + 1
        waiting, self._waiting = self._waiting, {}
        for request in waiting.values():
            request.promise.fail(error)
            if request.gradient or request.steps:
                self._gradients.append(request.promise)
