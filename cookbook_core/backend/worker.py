"""One thread that serves the requests of one engine, in the order they were submitted."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.backend.threads import (
    LoadWatch,
    in_worker_thread,
    mark_worker_thread,
    release_helpers,
)
from cookbook_core.errors import RequestError


@dataclass
class _Job:
    """A request and the future of its result.

    group None: the result is `function(*args)`. Otherwise `args` is one item, and neighbours of the
    same group in the queue run as one call, `function(items)`, which has one result for each.
    """

    label: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    group: Hashable | None = None
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """A queue and the thread that empties it. Requests never overlap: the model needs no lock.

    Args:
        name: of the thread.
        gathers: run grouped requests with all of their group that wait anywhere in the queue, not
            with those of their unit or with neighbours alone: for servers, whose clients' requests
            mix.
    """

    def __init__(self, name: str, *, gathers: bool = False) -> None:
        self._name = name
        self._gathers = gathers
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._collecting = threading.local()
        self._watch = LoadWatch()
        _workers.add(self)

    def submit(self, label: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call `function(*args)` after everything submitted before it.

        Raises:
            RequestError: called from inside a request (a loss function), or after `close`.
        """
        job = _Job(label, function, args)
        self._put([job])
        return job.future

    def submit_grouped(
        self,
        label: str,
        function: Callable[[list[Any]], Sequence[Any]],
        item: Any,
        group: Hashable,
        *,
        alone: bool = False,
    ) -> Future[Any]:
        """Call `function([item, ...])`, which returns one result for each item.

        Args:
            label: what errors call the request.
            function: what to call.
            item: of this request.
            group: requests of one group run in one call: those of a `unit`, or, outside of one,
                those that are already waiting side by side (anywhere, where the worker `gathers`).
                Which those are depends on timing.
            alone: outside of a unit, run by itself, unless the worker `gathers`.
        """
        unit: list[_Job] | None = getattr(self._collecting, "unit", None)
        if unit is None:
            own = (object(), group) if alone and not self._gathers else group
            job = _Job(label, function, (item,), own)
            self._put([job])
        else:
            own = group if self._gathers else (self._collecting.key, group)
            job = _Job(label, function, (item,), own)
            unit.append(job)
        return job.future

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Collect the grouped requests that this thread makes inside, and queue them as one unit.

        If the block raises, none of them is queued.
        """
        self._collecting.unit = jobs = []
        self._collecting.key = object()  # its own: neighbouring units must not run together
        try:
            yield
        finally:
            self._collecting.unit = None
        try:
            if jobs:
                self._put(jobs)
        except RequestError as error:  # raised to whoever waits for the results
            for job in jobs:
                job.future.set_exception(error)

    def close(self) -> None:
        """Serve everything that is queued, then end the thread; waits until it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._watch.end()

    def _put(self, jobs: list[_Job]) -> None:
        if in_worker_thread():
            raise RequestError(
                jobs[0].label,
                "requests cannot be made from inside a loss function, which occupies the queue",
                fix="Make the call first and put its result on the datums with with_inputs().",
            )
        release_helpers()  # the caller blocks next: end its idle helper threads
        with self._changed:
            if self._closed:
                raise RequestError(
                    jobs[0].label, "this client has been closed", fix="Make a new ServiceClient."
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.extend(jobs)
            self._changed.notify()

    def _serve(self) -> None:
        mark_worker_thread()
        while (jobs := self._next()) is not None:
            self._watch.resume()
            if jobs[0].group is None:
                _run(jobs[0])
            else:
                _run_batch(jobs)
            del jobs  # release the job's tensors before waiting

    def _next(self) -> list[_Job] | None:
        """The next job with the neighbours it runs with; None once closed and empty."""
        with self._changed:
            if not self._jobs:
                release_helpers()
                self._watch.pause()
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            jobs = [self._jobs.popleft()]
            group = jobs[0].group
            while group is not None and self._jobs and self._jobs[0].group == group:
                jobs.append(self._jobs.popleft())
            if group is not None and self._gathers:
                jobs += [job for job in self._jobs if job.group == group]
                self._jobs = deque(job for job in self._jobs if job.group != group)
            return jobs


def _run(job: _Job) -> None:
    """Call the job's function and settle its future."""
    if not job.future.set_running_or_notify_cancel():
        return
    try:
        result = job.function(*job.args)
    except BaseException as error:  # re-raised to whoever waits for the result
        job.future.set_exception(error)
    else:
        job.future.set_result(result)


def _run_batch(jobs: list[_Job]) -> None:
    """Run jobs of one group as one call, without the cancelled ones, and settle their futures."""
    running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
    if not running:
        return
    try:
        results = running[0].function([job.args[0] for job in running])
    except BaseException as error:  # re-raised to whoever waits for the results
        for job in running:
            job.future.set_exception(error)
    else:
        for job, result in zip(running, results, strict=True):
            job.future.set_result(result)


def refuse_after_failure(requests: Sequence[Future[Any]]) -> None:
    """Wait for these requests, and raise RequestError for the first that failed (optim_step)."""
    errors = [e for f in requests if not f.cancelled() and (e := f.exception())]
    if errors:
        raise RequestError(
            "optim_step",
            "a forward_backward before it failed, and its result was never read",
            got=errors[0],
            fix="Nothing was stepped; accumulated gradients are kept. Read the failed future's "
            ".result(), then decide.",
        ) from errors[0]


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close all workers at exit; a daemon thread killed inside torch can crash the interpreter."""
    for worker in list(_workers):
        worker.close()
