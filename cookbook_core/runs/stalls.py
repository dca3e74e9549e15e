"""Signs in a run's metrics that it learns nothing, or gets worse: warnings in log and summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PATIENCE = 5
"""Steps without any difference in reward before a warning."""


class Stalls:
    """Watches rows of metrics for steps that cannot teach the model anything.

    gradient    "grad_norm" is exactly 0: the outputs are saturated (after a learning rate that is
                far too large) or the loss does not depend on the logprobs it is given.
    reward      "zero_variance" is 1 from the first step on: all completions of each prompt have
                the same reward, so all advantages are 0.
    held-out    no "test_" metric moved, in six digits, over three evaluations (or all, if two).
    """

    def __init__(self) -> None:
        self._steps = self._no_gradient = self._no_variance = 0
        self._evaluations: list[dict[str, float]] = []  # the last three
        self._warned: set[str] = set()

    def add(self, row: Mapping[str, Any]) -> list[str]:
        """Take in one row of metrics.jsonl; return the warnings that are new."""
        warnings = {}
        if "grad_norm" in row or "zero_variance" in row:
            self._steps += 1
            self._no_gradient += row.get("grad_norm") == 0
            self._no_variance += row.get("zero_variance") == 1
        if self._no_gradient:
            warnings["gradient"] = self._of_gradient()
        if self._no_variance == self._steps == PATIENCE:
            warnings["reward"] = self._of_reward()
        tests = {k: v for k, v in row.items() if k.startswith("test_") and v is not None}
        if tests:
            self._evaluations = [*self._evaluations[-2:], tests]
            if len(self._evaluations) == 3 and self._unmoved():
                warnings["held-out"] = self._of_evaluations()
        due = [text for sign, text in warnings.items() if sign not in self._warned]
        self._warned |= warnings.keys()
        return due

    def summary(self) -> list[str]:
        """A sentence for each sign that holds for the whole run so far."""
        lines = [self._of_gradient()] if self._no_gradient else []
        lines += [self._of_reward()] if self._steps and self._no_variance == self._steps else []
        return lines + ([self._of_evaluations()] if self._unmoved() else [])

    def _unmoved(self) -> bool:
        first, *others = self._evaluations or [{}]
        return bool(others) and all(_same(first, other) for other in others)

    def _of_gradient(self) -> str:
        return (
            f"the gradient was exactly 0 at {self._no_gradient} of {self._steps} steps, which "
            "taught the model nothing. Lower --learning_rate, or check the loss with the doctor."
        )

    def _of_reward(self) -> str:
        return (
            "every completion of a prompt had the same reward at each of the "
            f"{self._steps} steps: there is nothing to learn from. Check the reward function on "
            "samples.md, raise --group_size, or choose easier prompts."
        )

    def _of_evaluations(self) -> str:
        values = ", ".join(f"{k} {v:.6g}" for k, v in list(self._evaluations[-1].items())[:2])
        return (
            f"no held-out metric moved over the last {len(self._evaluations)} evaluations "
            f"({values}). --learning_rate may be far too small or far too large."
        )


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(
        math.isclose(one[name], other[name], rel_tol=1e-6, abs_tol=1e-12) for name in one
    )


def got_worse(
    best: str, before: Mapping[str, float], after: Mapping[str, float], loss: str
) -> list[str]:
    """A sentence if a run made its best metric worse.

    Args:
        best: the metric's name, "-" before it where less is better.
        before: held-out metrics before the run.
        after: the same after it.
        loss: FILE:LOSS, for the doctor.
    """
    name = best.removeprefix("-")
    if name not in before or name not in after:
        return []
    was, now = before[name], after[name]
    if not (now > was if best.startswith("-") else now < was):
        return []
    moved = f"{'rose' if now > was else 'fell'} from {was:.3g} to {now:.3g}"
    command = f"cookbook doctor {loss}"
    return [f"{name} {moved}: is the sign of the loss right? {command}"]
