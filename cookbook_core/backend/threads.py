"""OpenMP's helper threads: one team at a time; and which thread serves requests.

Each Python thread that computes gets helper threads of its own, which outlive the work. With two
such teams there are more threads than processors, and libgomp then puts its helpers to sleep after
every operation: waking them costs more than a small product. On two cores a decoding step took 1.6
times as long after the main thread, too, had computed anything with torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any


@cache
def _gomp() -> Any:
    """The libgomp that torch loaded; None where torch uses another library."""
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


_worker = threading.local()


def mark_worker_thread() -> None:
    """Mark the calling thread as one that serves requests: waiting in it would deadlock."""
    _worker.active = True


def in_worker_thread() -> bool:
    """Whether this code runs inside a request (a loss function, for instance)."""
    return getattr(_worker, "active", False)
