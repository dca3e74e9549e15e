"""One team of OpenMP helper threads at a time, and a second one on a busy machine."""

from __future__ import annotations

import os
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
def three_threads(monkeypatch: pytest.MonkeyPatch):
    """Three, so that there are helpers on a machine of one core too."""
    monkeypatch.setattr(threads, "_times", dict)  # workers' own watches: the load is the tests'
    for name in threads.CHOICES:
        monkeypatch.delenv(name, raising=False)
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


def test_a_second_team_exists_while_threads_wait_for_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, share = Load(monkeypatch), 0.0
    watch, alone = threads.LoadWatch(), live_threads()
    # beside the three that compute, one more than the machine has
    team = max(2, len(os.sched_getaffinity(0)) - 1) - 1
    watch.resume()
    for share, expected in ((0.05, 0), (0.3, team), (0.15, team), (0.05, 0), (0.15, 0)):
        load.share = share
        wait_for(alone + 1 + expected)
        threading.Event().wait(0.1)
        assert live_threads() == alone + 1 + expected, share
    load.share = 0.3
    wait_for(alone + 1 + team)
    load.nanoseconds = threads.LEAST // 2  # too little time to tell
    load.share = 0.0
    threading.Event().wait(0.1)
    assert live_threads() == alone + 1 + team
    watch.pause()
    wait_for(alone + 1)  # nobody works beside it
    watch.resume()
    wait_for(alone + 1 + team)
    watch.pause()
    wait_for(alone + 1)
    watch.end()
    wait_for(alone)


def watches() -> int:
    return sum(thread.name == "load" for thread in threading.enumerate())


@pytest.mark.parametrize("why", ["", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "one thread"])
def test_a_worker_watches_the_load(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the user has chosen, nor where there is nobody to wait for."""
    Load(monkeypatch)
    if why == "one thread":
        torch.set_num_threads(1)
    elif why:
        monkeypatch.setenv(why, "1")
    worker, before = Worker("test"), watches()
    assert worker.submit("count", watches).result() == before + (not why)
    worker.close()
    assert watches() == before


class Load:
    """Stands for the kernel's account of one thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.share, self.nanoseconds = 0.0, 10 * threads.LEAST
        self.ran = self.waited = 0
        monkeypatch.setattr(threads, "_times", self.times)
        monkeypatch.setattr(threads, "INTERVAL", 0.01)
        monkeypatch.setattr(threads, "LINGER", 0.02)

    def times(self) -> dict[str, tuple[int, int]]:
        self.waited += int(self.share * self.nanoseconds)
        self.ran += int((1 - self.share) * self.nanoseconds)
        return {"1": (self.ran, self.waited)}


def test_the_share_is_that_of_threads_seen_twice() -> None:
    much = threads.LEAST
    before = {"1": (100, 0), "2": (50, 50), "ended": (9 * much, 9 * much)}
    after = {"1": (100 + 6 * much, much), "2": (50 + 2 * much, 50 + much), "new": (much, much)}
    assert threads._share_waited(before, after) == 0.2
    assert threads._share_waited(before, before) is None


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
