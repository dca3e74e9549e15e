"""Environments that episodes are played against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cookbook_core import chat
from cookbook_core.errors import LossError, check_text, is_finite


class Environment(Protocol):
    """What an episode is played against; it lives for one episode."""

    def step(self, answer: str, /) -> tuple[str, float, bool]:
        """Take the policy's answer, without special tokens; return (reply, reward, done).

        The rewards of an episode's steps add up. After done, the reply is not used.
        """
        ...


class CheckedEnvironment:
    """One episode's environment, whose faults are errors that name the row.

    Args:
        make: called with the row; returns the environment.
        row: of the dataset, with a column prompt.
    Raises:
        LossError: `make` raised.
    """

    def __init__(self, make: Callable[[Any], Environment], row: Mapping[str, Any]) -> None:
        place, prompt = getattr(row, "where", ""), chat.last_text(row["prompt"])
        self._where = f"{place + ', ' if place else ''}environment for the prompt {prompt!r:.80}"
        self._steps = 0
        try:
            self._environment = make(row)
        except Exception as error:
            raise LossError.caused_by(self._where, error) from error

    def step(self, answer: str) -> tuple[str, float, bool]:
        """Hand the environment an answer; return its reply, the reward and whether it is over.

        Raises:
            LossError: it raised, or returned no text, a reward that is not finite, or no bool.
        """
        self._steps += 1
        where = f"{self._where}, step {self._steps}"
        try:
            result: Any = self._environment.step(answer)
        except Exception as error:
            raise LossError.caused_by(where, error) from error
        rule = "(reply, reward, done): text, a finite number, True or False"
        if not isinstance(result, tuple) or len(result) != 3:
            raise LossError(where, "wrong return value", expected=rule, got=repr(result))
        reply, reward, done = result
        check_text(LossError, f"{where}, reply", reply)
        if not is_finite(reward) or not isinstance(done, bool):
            raise LossError(where, "wrong return value", expected=rule, got=repr(result))
        return reply, float(reward), done
