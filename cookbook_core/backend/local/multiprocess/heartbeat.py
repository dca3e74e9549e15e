"""Signs of life of the processes of a run, so that one that hangs ends the run.

Each process counts up a number of its own in the run's store. It does so from its own thread, so
that a process that computes for long, or pauses in a debugger, counts as alive. Whoever waits for a
process looks at its number. Results do not depend on any of this.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from cookbook_core.errors import ConfigError, ProcessError

VARIABLE = "COOKBOOK_HANG_TIMEOUT"
"""Environment variable with another limit, in seconds."""
LIMIT = 600.0
"""Seconds without a sign of life after which a process counts as hung. A native call that does not
release Python's interpreter lock stops the signs for as long as it takes."""
SIGNS = 40
"""Signs of life within the limit."""
LATER = 4
"""Signs of life that the other ranks wait for beyond the limit."""

T = TypeVar("T")


class Heartbeat:
    """This process's signs of life, and what it knows of those of the others.

    Args:
        store: torch's, of the run.
        rank: of this process.
        size: number of processes.

    Attributes:
        limit: seconds after which a silent process counts as hung.
        interval: seconds between two signs of life.

    Raises:
        ConfigError: COOKBOOK_HANG_TIMEOUT is not a number of seconds.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.limit = _limit()
        self.interval = self.limit / SIGNS
        self._shared = store
        self._store, self._rank = store.clone(), rank  # a connection of its own
        self._signs = [0] * size
        # rank 0 first, whose error names the step: another that ends would be taken for the cause
        self._patience = SIGNS + (LATER if rank else 0)
        self.places: list[str] = []
        """By rank: process id and machine."""
        self._ended = threading.Event()
        self._store.set(f"place/{rank}", f"pid {os.getpid()} on {platform.node()}")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to give signs of life; call it when all processes have joined."""
        places = [self._store.get(f"place/{rank}") for rank in range(len(self._signs))]
        self.places = [place.decode() for place in places]
        self._thread.start()

    def stop(self) -> None:
        """Give no more signs of life."""
        self._ended.set()

    def wait(self, done: threading.Event, ranks: Collection[int]) -> list[int]:
        """Wait until `done` is set, or some of these processes have been silent for the limit.

        Time counts in intervals that this process was awake for, so a machine that was suspended
        finds nobody hung when it wakes.

        Returns:
            The silent ranks; none where `done` is set.
        """
        last, missed = list(self._signs), [0] * len(self._signs)
        while not done.wait(self.interval):
            for rank in ranks:
                missed[rank] = missed[rank] + 1 if self._signs[rank] == last[rank] else 0
                last[rank] = self._signs[rank]
            if silent := [rank for rank in ranks if missed[rank] >= self._patience]:
                return silent
        return []

    def run(self, ranks: Collection[int], operation: Callable[[], T]) -> T:
        """Return the result of an operation that ends when these processes have done their part.

        It runs in a thread, which blocks for good where this one gives up: gloo can neither cancel
        an operation nor time out without closing every connection.

        Raises:
            ProcessError: one of them hangs. What the operation raises.
        """
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def complete() -> None:
            try:
                results.append(operation())
            except BaseException as error:  # raised below
                errors.append(error)
            done.set()

        threading.Thread(target=complete, name="message", daemon=True).start()
        if silent := self.wait(done, ranks):
            raise self.hung(silent[0])
        if errors:
            raise errors[0]
        return results[0]

    def hung(self, rank: int) -> ProcessError:
        """The error that a process hangs."""
        return ProcessError(
            f"process {rank} of {len(self._signs)}",
            f"hangs, or its machine cannot be reached ({self.places[rank]})",
            expected=f"a sign of life every {self.interval:g} seconds",
            got=f"none for {self.limit:g} seconds",
            fix="Give the same command to resume from the last checkpoint.",
        )

    def _beat(self) -> None:
        """Count until stopped. Where the store is gone, with its machine, all others are silent."""
        while not self._ended.wait(self.interval):
            try:
                for rank in range(len(self._signs)):
                    self._signs[rank] = self._store.add(f"sign/{rank}", int(rank == self._rank))
            except RuntimeError:  # its connection broke
                with contextlib.suppress(RuntimeError):
                    self._store = self._shared.clone()


def _limit() -> float:
    text = os.environ.get(VARIABLE, str(LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        rule, fix = "a number of seconds above 0", f"Without it the limit is {LIMIT:g} seconds."
        raise ConfigError(VARIABLE, "unusable", expected=rule, got=text, fix=fix)
    return limit
