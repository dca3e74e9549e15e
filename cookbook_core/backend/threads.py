"""OpenMP's helper threads: one team at a time, how long they spin; which thread serves requests.

Each Python thread that computes gets helper threads of its own, which outlive the work. With two
such teams there are more threads than processors, and libgomp then lets its threads spin for 100
turns instead of 300,000 before they sleep (its manual, GOMP_SPINCOUNT). On an idle machine that is
slow: waking a thread costs more than a small product, and on two cores a decoding step took 1.6
times as long after the main thread, too, had computed anything with torch. On a busy machine it is
what is wanted: a thread that spins takes the processor that the thread it waits for needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from functools import cache
from typing import Any

INTERVAL, LINGER = 0.1, 1.0
"""Seconds between two looks at the load, and until a second team ends that nobody works beside."""
LEAST = 25_000_000
"""Nanoseconds that threads have run or waited between two looks for the second to count."""
BUSY, IDLE = 0.2, 0.1
"""Shares of a process's time that its threads wait for a processor: above BUSY their waits are
short, below IDLE long."""
CHOICES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
"""Variables by which users choose how long threads spin."""


def _gomp() -> Any:
    """The libgomp that torch loaded; None before that, and where torch uses another library."""
    return _loaded_gomp() if "torch" in sys.modules else None


@cache
def _loaded_gomp() -> Any:
    try:
        gomp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        return gomp if hasattr(gomp, "omp_pause_resource_all") else None
    except (OSError, AttributeError):  # not loaded; or not Linux
        return None


def release_helpers() -> None:
    """End the calling thread's idle helper threads; its next operation starts new ones.

    The number of threads it computes with stays as it was set.
    """
    gomp = _gomp()
    if gomp is None:
        return
    count = gomp.omp_get_max_threads()
    gomp.omp_pause_resource_all(1)  # omp_pause_soft; does nothing inside a parallel region
    gomp.omp_set_num_threads(count)


Times = dict[str, tuple[int, int]]
"""By thread of this process, nanoseconds it has run, and has waited for a processor."""


def _times() -> Times:
    times: Times = {}
    for thread in os.listdir("/proc/self/task") if sys.platform == "linux" else ():
        # OSError: the thread has ended, or the kernel keeps no account
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/task/{thread}/schedstat", "rb") as account,
        ):
            ran, waited, _ = map(int, account.read().split())
            times[thread] = ran, waited
    return times


def _share_waited(before: Times, after: Times) -> float | None:
    """Time that threads waited for a processor, as a share of the time they ran or waited.

    None where that was less than LEAST, too little to tell.
    """
    ran, waited = (
        sum(after[each][n] - before[each][n] for each in before.keys() & after.keys())
        for n in (0, 1)
    )
    return waited / (ran + waited) if ran + waited >= LEAST else None


class LoadWatch:
    """A thread that lets OpenMP's threads sleep early while other programs use the processors.

    It keeps a second team then, which does nothing. Teams that compute and their sizes stay as they
    are: results do not depend on the load. Nothing happens without libgomp or Linux's account of
    each thread's time, where torch computes with one thread, or where the user has set CHOICES.
    """

    def __init__(self) -> None:
        self._working, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._threads = 1

    def resume(self) -> None:
        """Watch from now on."""
        torch = sys.modules.get("torch")
        self._threads = torch.get_num_threads() if torch else 1
        if self._threads == 1 or CHOICES & os.environ.keys():
            return
        if self._thread is None and _gomp() is not None and _times():
            self._thread = threading.Thread(target=self._watch, name="load", daemon=True)
            self._thread.start()
        self._working.set()

    def pause(self) -> None:
        """Stop looking until `resume`."""
        self._working.clear()

    def end(self) -> None:
        """End the thread and its team."""
        self._ended.set()
        self._working.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        second_team, before, interval = False, _times(), INTERVAL
        while not self._ended.wait(interval):
            if not self._working.wait(LINGER):
                release_helpers()
                self._working.wait()
                if second_team and not self._ended.is_set():  # as it was, until the next look
                    _start_team(self._threads)
                before = _times()
                continue
            began = time.perf_counter()
            after = _times()
            interval = max(INTERVAL, 100 * (time.perf_counter() - began))
            share, before = _share_waited(before, after), after
            if share is None:
                continue
            if share > BUSY and not second_team:
                second_team = True
                _start_team(self._threads)
            elif share < IDLE and second_team:
                second_team = False
                release_helpers()
        release_helpers()


def _start_team(threads: int) -> None:
    """Give the calling thread a team that, beside one of `threads`, is more than the processors."""
    gomp, nothing = _gomp(), ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    size = max(2, gomp.omp_get_num_procs() - threads + 2)
    gomp.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))


_worker = threading.local()


def mark_worker_thread() -> None:
    """Mark the calling thread as one that serves requests: waiting in it would deadlock."""
    _worker.active = True


def in_worker_thread() -> bool:
    """Whether this code runs inside a request (a loss function, for instance)."""
    return getattr(_worker, "active", False)
