"""One thread that serves the requests of one engine, in the order they were submitted."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.backend.threads import (
    in_worker_thread,
    mark_worker_thread,
    release_helpers,
)
from cookbook_core.errors import RequestError

LINGER_SECONDS = 0.002
"""How long a request that can be grouped waits for another one like it."""


@dataclass
class _Job:
    label: str
    run: Callable[[list[Any]], Sequence[Any]]
    """Takes the items of one or more jobs, gives one result for each."""
    item: Any = None
    group: Hashable | None = None
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """A queue and the thread that empties it.

    `submit` runs a function; `submit_grouped` lets consecutive requests with the same group key
    run as one call. Nothing runs concurrently, so nothing here needs a lock on the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        _workers.add(self)

    def submit(self, label: str, run: Callable[[], Any]) -> Future[Any]:
        """Run `run()` after everything submitted before it.

        Raises:
            RequestError: called from inside a request (a loss function), or after `close`.
        """
        return self._put(_Job(label, lambda items: [run() for _ in items]))

    def submit_grouped(
        self, label: str, group: Hashable, item: Any, run: Callable[[list[Any]], Sequence[Any]]
    ) -> Future[Any]:
        """Run `run([item, ...])` together with neighbours of the same group in the queue."""
        return self._put(_Job(label, run, item, group))

    def close(self) -> None:
        """Serve what is queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _put(self, job: _Job) -> Future[Any]:
        if in_worker_thread():
            raise RequestError(
                job.label,
                "requests cannot be made from inside a loss function",
                expected="a call outside of it",
                got="one in the slot of the queue that this request would wait in",
                fix="Make the call first and put its result on the datums with with_inputs().",
            )
        release_helpers()  # of the caller, who is about to wait
        with self._changed:
            if self._closed:
                what = "this client has been closed"
                raise RequestError(job.label, what, expected="an open one", got="a closed one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def _serve(self) -> None:
        mark_worker_thread()
        while (jobs := self._next()) is not None:
            _run_together(jobs)
            del jobs  # what a job holds must not live until the next one comes

    def _next(self) -> list[_Job] | None:
        """The next job with the neighbours it can run with; None once closed and empty."""
        with self._changed:
            if not self._jobs:
                release_helpers()
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            jobs = [self._jobs.popleft()]
            while jobs[0].group is not None:
                arrived = self._jobs or self._changed.wait_for(
                    lambda: self._jobs or self._closed, LINGER_SECONDS
                )
                if not arrived or not self._jobs or self._jobs[0].group != jobs[0].group:
                    break
                jobs.append(self._jobs.popleft())
            return jobs


def refuse_after_failure(requests: Sequence[Future[Any]]) -> None:
    """Wait for these requests, and raise RequestError for the first that failed (optim_step)."""
    errors = [e for f in requests if not f.cancelled() and (e := f.exception())]
    if errors:
        raise RequestError(
            "optim_step",
            "a forward_backward before it failed, and nobody had read its result",
            expected="no failure since the last step",
            got=errors[0],
            fix="Nothing was stepped; accumulated gradients are kept. Read the failed future's "
            ".result(), then decide.",
        ) from errors[0]


def _run_together(jobs: list[_Job]) -> None:
    jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
    if not jobs:
        return
    try:
        results = jobs[0].run([job.item for job in jobs])
    except BaseException as error:  # handed to whoever waits for the result
        for job in jobs:
            job.future.set_exception(error)
    else:
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Daemon threads inside torch must not be cut off in the middle of interpreter shutdown."""
    for worker in list(_workers):
        worker.close()
