"""Divide sequences among processes: common prefixes together, about equal tokens for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cookbook_core.backend.local.scoring.packing import MIN_SHARED, common_prefix, tree_order

TRIES = 8
"""Number of prefix lengths tried as the threshold for keeping sequences together."""


def share_out(sequences: Sequence[Sequence[int]], size: int, *, share: bool) -> list[list[int]]:
    """Indices of the sequences for each of `size` processes; a function of the tokens alone.

    A shared prefix is computed once per process that has it. So sequences that share at least t
    tokens stay together, with the t that makes the largest share smallest: a group with a prompt of
    its own stays whole, a system prompt common to all does not keep everything in one process.

    Args:
        sequences: token ids.
        size: of the shares; the first is empty only when all are.
        share: whether the model computes shared prefixes once at all.
    """
    order = tree_order(sequences)
    arrays = [np.asarray(sequences[i], dtype=np.int64) for i in order]
    lengths = [len(a) for a in arrays]
    common = [common_prefix(a, b) if share else 0 for a, b in itertools.pairwise(arrays)]
    worth = sorted({c for c in common if c >= MIN_SHARED})
    some = {worth[len(worth) * n // TRIES] for n in range(TRIES)} if worth else set()
    best: list[list[int]] = []
    longest = math.inf
    for least in (*sorted(some), math.inf):
        units = _units(common, len(order), least)
        spread_units = spread([distinct_tokens(unit, lengths, common) for unit in units], size)
        shares = [sorted(i for n in each for i in units[n]) for each in spread_units]
        cost = max(distinct_tokens(each, lengths, common) for each in shares)
        if cost < longest:
            best, longest = shares, cost
    return [sorted(order[i] for i in each) for each in best]


def spread(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of the costs for each of `size` processes: largest first, to the least loaded."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        least = loads.index(min(loads))
        shares[least].append(n)
        loads[least] += costs[n]
    return shares


def distinct_tokens(members: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """Tokens computed for some of the sequences in tree order.

    Args:
        members: which, ascending.
        lengths: of all sequences, in tree order.
        common: tokens that each shares with the next.
    """
    total = sum(lengths[i] for i in members)
    for before, after in itertools.pairwise(members):
        shared = min(common[before:after])
        total -= shared if shared >= MIN_SHARED else 0
    return total


def _units(common: Sequence[int], count: int, least: float) -> list[list[int]]:
    """Runs of places in tree order of which each shares `least` tokens or more with the next."""
    units = [[0]] if count else []
    for place in range(1, count):
        if common[place - 1] >= least:
            units[-1].append(place)
        else:
            units.append([place])
    return units
