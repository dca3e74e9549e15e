"""One team of OpenMP helper threads at a time."""

from __future__ import annotations

import threading
from pathlib import Path

from cookbook_core.backend import threads
from cookbook_core.backend.worker import Worker

import pytest
import torch

pytestmark = pytest.mark.skipif(threads._gomp() is None, reason="torch runs without libgomp here")


def compute() -> None:
    torch.ones(1 << 20).exp()


def live_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(autouse=True)
def three_threads():
    """Three, so that there are helpers on a machine of one core too."""
    before = torch.get_num_threads()
    settle()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    threads.release_helpers()


def test_helpers_go_and_the_number_of_threads_stays() -> None:
    threads.release_helpers()
    alone = live_threads()
    compute()
    assert live_threads() == alone + 2
    threads.release_helpers()
    threads.release_helpers()
    wait_for(alone)
    assert torch.get_num_threads() == 3
    compute()
    assert live_threads() == alone + 2


def test_a_worker_and_its_caller_never_keep_two_teams() -> None:
    worker = Worker("test")
    worker.submit("start", lambda: None).result()
    threads.release_helpers()
    alone = live_threads()
    compute()  # the caller's team
    seen: list[int] = []

    def request() -> None:
        compute()
        seen.append(live_threads())

    worker.submit("compute", request).result()
    assert seen == [alone + 2]  # the worker's two, none of the caller's
    wait_for(alone)  # idle: its helpers too are let go
    worker.close()


def settle() -> None:
    """Wait until threads that other tests have left to end are gone."""
    done = threading.Event()
    count, since = live_threads(), 0
    while since < 20:
        done.wait(0.05)
        since = since + 1 if live_threads() == count else 0
        count = live_threads()


def wait_for(count: int) -> None:
    """Threads end a moment after they are let go."""
    done = threading.Event()
    for _ in range(500):
        if live_threads() == count:
            return
        done.wait(0.01)
    assert live_threads() == count
