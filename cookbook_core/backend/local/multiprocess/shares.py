"""Divide sequences among processes: common prefixes together, about equal tokens for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from cookbook_core.backend.local.scoring.packing import MIN_SHARED, common_prefix, tree_order

import numpy as np

TRIES = 8
"""Number of prefix lengths tried as the threshold for keeping sequences together."""


def share_out(
    sequences: Sequence[Sequence[int]], size: int, *, reuse_prefixes: bool
) -> list[list[int]]:
    """Indices of the sequences for each of `size` processes; a function of the tokens alone.

    A shared prefix is computed once per process that has it. So sequences that share at least t
    tokens stay together, with the t that minimizes the largest share: groups with different prompts
    stay whole, and a system prompt common to all does not put everything in one process.

    Args:
        sequences: token ids.
        size: number of shares; share 0 is non-empty unless there are no sequences.
        reuse_prefixes: whether the model computes shared prefixes once.
    """
    order = tree_order(sequences)
    arrays = [np.asarray(sequences[i], dtype=np.int64) for i in order]
    lengths = [len(a) for a in arrays]
    common = [common_prefix(a, b) if reuse_prefixes else 0 for a, b in itertools.pairwise(arrays)]
    worth = sorted({c for c in common if c >= MIN_SHARED})
    some = {worth[len(worth) * n // TRIES] for n in range(TRIES)} if worth else set()
    best: list[list[int]] = []
    longest = math.inf
    for min_prefix in (*sorted(some), math.inf):
        units = _units(common, len(order), min_prefix)
        spread_units = spread([distinct_tokens(unit, lengths, common) for unit in units], size)
        parts = [sorted(i for n in each for i in units[n]) for each in spread_units]
        cost = max(distinct_tokens(each, lengths, common) for each in parts)
        if cost < longest:
            best, longest = parts, cost
    return [sorted(order[i] for i in each) for each in best]


def spread(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of the costs for each of `size` processes: largest first, to the least loaded."""
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        lightest = loads.index(min(loads))
        parts[lightest].append(n)
        loads[lightest] += costs[n]
    return parts


def distinct_tokens(members: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """Count the tokens of `members`, shared prefixes once.

    Args:
        members: indices in tree order, ascending.
        lengths: tokens of every sequence, in tree order.
        common: tokens that each shares with the next.
    """
    total = sum(lengths[i] for i in members)
    for before, after in itertools.pairwise(members):
        shared = min(common[before:after])
        total -= shared if shared >= MIN_SHARED else 0
    return total


def _units(common: Sequence[int], count: int, min_prefix: float) -> list[list[int]]:
    """Group adjacent sequences whose common prefix has at least min_prefix tokens."""
    units = [[0]] if count else []
    for i in range(1, count):
        if common[i - 1] >= min_prefix:
            units[-1].append(i)
        else:
            units.append([i])
    return units
