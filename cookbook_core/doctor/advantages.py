"""Examine an advantage estimator: a function from the rewards of a group to their advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.custom_loss import name_of
from cookbook_core.doctor.report import Finding, defect
from cookbook_core.errors import is_finite

CHECK = "advantages"
GROUPS = ([1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.5, 0.1], [1.0, 0.0], [-3.0, 5.0, 1000.0])
EQUAL = ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0])


def examine_advantages(estimator: Callable[[list[float]], Sequence[Any]]) -> list[Finding]:
    """Higher rewards get higher advantages, also reordered; equal rewards stay finite.

    Args:
        estimator: `advantages(rewards) -> advantages`, one for each completion of a group.
    Returns:
        The first defect, or "ok" and notes on what is unusual.
    """
    where, found = f"{name_of(estimator)}()", []
    for rewards in (*GROUPS, *EQUAL):
        try:
            values = [float(value) for value in estimator(list(rewards))]
            turned = [float(value) for value in estimator(rewards[::-1])][::-1]
        except Exception as error:
            rule, got = f"{len(rewards)} numbers", f"{type(error).__name__}: {error}"
            return [defect(CHECK, where, f"raised for rewards {rewards}", rule, got)]
        if len(values) != len(rewards) or not all(map(is_finite, values)):
            what, rule = f"rewards {rewards}", f"{len(rewards)} finite numbers"
            fix = "Where all rewards are equal, their deviation is 0: do not divide by it."
            return [defect(CHECK, where, what, rule, values, fix)]
        pairs = [(a, b) for a in range(len(rewards)) for b in range(len(rewards))]
        wrong = [(a, b) for a, b in pairs if rewards[a] > rewards[b] and values[a] <= values[b]]
        if wrong:
            rule = "a higher advantage for a higher reward"
            fix = "Subtract the baseline from the reward: reward - mean."
            return [defect(CHECK, where, f"rewards {rewards}", rule, values, fix)]
        if not _close(values, turned):
            what = f"depends on the order of the completions, for rewards {rewards}"
            return [defect(CHECK, where, what, values, turned)]
        found.append(values)
    notes = []
    if not all(_close(values, [0.0] * len(values)) for values in found[-len(EQUAL) :]):
        notes.append("not 0 where all rewards are equal: all completions are pushed one way")
    if not all(_close([sum(values)], [0.0]) for values in found[: len(GROUPS)]):
        notes.append("do not sum to 0 in a group: more variance than with a baseline")
    ok = Finding(CHECK, "ok", "higher rewards get higher advantages; equal rewards are finite")
    return [ok, *(Finding(CHECK, "note", note) for note in notes)]


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(a)) for a, b in zip(one, other, strict=True))
