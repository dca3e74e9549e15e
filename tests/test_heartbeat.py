"""How processes find each other at a start and a restart, and which of them count as hung."""

from __future__ import annotations

import os
import platform
import threading
from datetime import timedelta
from typing import Any

from cookbook_core.backend.local.multiprocess import heartbeat, joining
from cookbook_core.backend.local.multiprocess.heartbeat import Heartbeat
from cookbook_core.errors import ConfigError, ProcessError

import pytest
from torch.distributed import HashStore

LIMIT = 2.0


class Store:
    """A run's store, which can stop answering, or be gone."""

    def __init__(self) -> None:
        self.kept, self.lost, self.answers = HashStore(), False, threading.Event()
        self.answers.set()
        self.beats: list[Heartbeat] = []

    def clone(self) -> Store:
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.answers.wait()
            if self.lost:
                raise RuntimeError("the connection broke")
            return getattr(self.kept, name)(*args)

        return call


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(heartbeat.VARIABLE, str(LIMIT))
    made = Store()
    yield made
    for each in made.beats:
        each.stop()
    made.lost = True
    made.answers.set()


def of(store: Store, size: int = 2) -> list[Heartbeat]:
    beats = [Heartbeat(store, rank, size) for rank in range(size)]
    store.beats += beats
    for each in beats:
        each.start()
    return beats


def test_a_process_that_beats_may_take_as_long_as_it_likes(store: Store) -> None:
    """Four limits, in which it has nothing to say but that it lives."""
    done = threading.Event()
    threading.Timer(4 * LIMIT, done.set).start()
    assert of(store)[0].wait(done, [1]) == []


def test_the_silent_one_is_named_among_those_waited_for(store: Store) -> None:
    first, second, third = of(store, 3)
    second.stop()
    assert first.wait(threading.Event(), [1, 2]) == [1]
    assert third.wait(threading.Event(), [1]) == [1]
    assert first.places[1] == f"pid {os.getpid()} on {platform.node()}"


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_a_lost_store_is_silence_of_all(store: Store, how: str) -> None:
    """That of a machine out of reach answers nothing; that of a dead one breaks the connection."""
    first = of(store)[0]
    if how == "silent":
        store.answers.clear()
    store.lost = how == "gone"
    assert first.wait(threading.Event(), [1]) == [1]


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "nan", "inf"])
def test_an_unusable_limit(store: Store, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(heartbeat.VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{heartbeat.VARIABLE}: .*above 0"):
        Heartbeat(store, 0, 2)


# ---- joining -------------------------------------------------------------------------------------


def test_a_restart_reads_no_addresses_of_dead_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has found what rank 1 left in its first life by the time its second one starts."""
    store, opened = HashStore(), {}
    store.set("here/1", "of the first life")

    of_thread = threading.local()
    monkeypatch.setattr(joining, "rendezvous", lambda *_, **__: iter([(store, of_thread.rank, 2)]))

    def start(rank: int) -> None:
        of_thread.rank = rank
        opened[rank] = joining.open_store(timedelta(seconds=30))[0]
        opened[rank].set(f"address/{rank}", "new")

    threads = [threading.Thread(target=start, args=[rank]) for rank in (0, 1)]
    threads[0].start()
    store.get("start/of the first life")
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert opened[0].get("address/1") == opened[1].get("address/1") == b"new"
    assert not store.check(["address/1"])


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 3)]))
    with pytest.raises(ProcessError, match=r"not all processes started. Expected 3, got 1"):
        joining.open_store(timedelta(seconds=0.1))


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one process of two machines; addresses of this one by name."""
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(joining.VARIABLE, "")
    monkeypatch.delenv(joining.VARIABLE)
    monkeypatch.setattr(joining, "_device_of", {"10.0.0.2": "ib0"}.get)
    monkeypatch.setattr(joining.socket, "gethostname", lambda: "me")
    return monkeypatch


@pytest.mark.parametrize(
    ("addresses", "device"),
    [
        ({"a": "10.0.0.2", "me": "127.0.1.1"}, "ib0"),
        ({"a": "10.0.0.9", "me": "127.0.1.1"}, None),
        ({"a": "127.0.1.1", "me": "10.0.0.2"}, None),
        ({}, None),
    ],
)
def test_the_device_of_the_route_to_the_master(
    several: pytest.MonkeyPatch, addresses: dict[str, str], device: str | None
) -> None:
    several.setattr(joining, "_own_address", addresses.get)
    joining.choose_interface()
    assert os.environ.get(joining.VARIABLE) == device


def test_a_master_known_by_a_loopback_address_is_refused(several: pytest.MonkeyPatch) -> None:
    """Unless the user has named the device."""
    several.setattr(joining, "_own_address", lambda _: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: a and .*, me, .*127\.0\.1\.1.*GLOO_SOCK"):
        joining.choose_interface()
    several.setenv(joining.VARIABLE, "eth7")
    joining.choose_interface()
    assert os.environ[joining.VARIABLE] == "eth7"


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")])
def test_on_one_machine_it_is_the_loopback_device(
    several: pytest.MonkeyPatch, name: str, value: str
) -> None:
    several.setenv(name, value)
    several.setattr(joining.sys, "platform", "linux")
    joining.choose_interface()
    assert os.environ[joining.VARIABLE] == "lo"


@pytest.mark.skipif(not os.path.exists("/proc/net/dev"), reason="not Linux")
def test_the_loopback_device_has_its_address() -> None:
    assert joining._own_address("127.0.0.1") == "127.0.0.1"
    assert joining._device_of("127.0.0.1") == "lo"
    assert joining._own_address("no.such.name.invalid") is None
