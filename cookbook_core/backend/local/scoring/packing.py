"""Pack datums into one row without padding, with prefixes that several datums share laid out once.

Sequences with a common prefix form a tree: a segment of the tokens they share, below it the
continuation of each. The tree is laid out depth first in one row, each segment at the positions it
has in its sequences,

    [prompt 0..P-1] [completion 1: P..] [completion 2: P..] ... [next prompt 0..] ...

and a token attends to its own segment up to itself and to the whole of every segment above it. That
is what each sequence attends to by itself, so its hidden states are the same, and the gradient of a
shared token is the sum over the sequences that share it. Prefixes are found from the token ids.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MIN_SHARED = 16
"""Shortest shared prefix, in tokens, that is laid out once: attention in pieces has a cost."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the row; its descendants follow, up to `subtree_stop`.

    above: the (start, stop) of every segment above it, the outermost first.
    """

    start: int
    stop: int
    subtree_stop: int
    above: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """Queries [q_start, q_stop) over keys [k_start, k_stop).

    causal: the two ranges are one, `count` segments of equal length, each attending causally to
    itself. Otherwise every query attends to every key.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    count: int = 1


@dataclass(frozen=True)
class Layout:
    """One row of T tokens.

    tokens, positions: `(T,)` int64.
    rows: of sequence i, `(N_i,)`: the index of its tokens in the row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: list[torch.Tensor]
    segments: list[Segment]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict)
    """Masks and indices of this layout, shared by all layers."""

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.positions.max()) + 1

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """`(T,)`: for each token, the end of its segment's subtree."""
        ends = torch.empty_like(self.positions)
        for s in self.segments:
            ends[s.start : s.stop] = s.subtree_stop
        return ends

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """Which tokens attend to which, every token's causal piece before its other pieces."""
        causal: list[Piece] = []
        for s in self.segments:
            last = causal[-1] if causal else None
            if last and last.q_stop == s.start:
                length = (last.q_stop - last.q_start) // last.count
                if length == s.stop - s.start:
                    span = (last.q_start, s.stop)
                    causal[-1] = Piece(*span, *span, causal=True, count=last.count + 1)
                    continue
            if s.stop > s.start:
                causal.append(Piece(s.start, s.stop, s.start, s.stop, causal=True))
        full = [
            Piece(s.stop, s.subtree_stop, s.start, s.stop, causal=False)
            for s in self.segments
            if s.subtree_stop > s.stop
        ]
        return causal + full

    def window_mask(self, piece: Piece, window: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The mask of a piece that a sliding window cuts into.

        Returns:
            None where every query is within `window` tokens of every key it could see. Else bool
            tensors: allowed `(Lq, Lk)`, for one segment of the piece, causality included, and
            seeing `(Lq,)`, the queries that see any key at all.
        """
        key = (piece, window)
        if key not in self.memo:
            self.memo[key] = self._window_mask(piece, window)
        return self.memo[key]

    def _window_mask(self, piece: Piece, window: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        length = (piece.q_stop - piece.q_start) // piece.count
        queries = self.positions[piece.q_start : piece.q_start + length]
        keys = queries if piece.causal else self.positions[piece.k_start : piece.k_stop]
        distance = queries[:, None] - keys[None, :]
        if int(distance.max()) < window:
            return None
        allowed = distance < window
        if piece.causal:
            allowed &= distance >= 0
        return allowed, allowed.any(dim=1)


def lay_out(sequences: Sequence[Sequence[int]], *, share: bool = True) -> Layout:
    """Lay sequences out in one row.

    Args:
        sequences: token ids, each at least one.
        share: False lays every sequence out whole.
    """
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    order = tree_order(sequences) if share else list(range(len(arrays)))
    common = [common_prefix(arrays[a], arrays[b]) for a, b in itertools.pairwise(order)]
    builder = _Builder(arrays, order, common if share else [0] * len(common))
    builder.grow(0, len(order), 0, ())
    return Layout(
        torch.from_numpy(np.concatenate(builder.tokens)),
        torch.from_numpy(np.concatenate(builder.positions)),
        [torch.from_numpy(np.concatenate(rows)) for rows in builder.rows],
        builder.segments,
    )


class _Builder:
    """Lays out the tree of sorted sequences, depth first."""

    def __init__(self, arrays: list[np.ndarray], order: list[int], common: list[int]) -> None:
        self.arrays, self.order, self.common = arrays, order, common
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.rows: list[list[np.ndarray]] = [[] for _ in arrays]
        self.at = 0

    def grow(self, first: int, last: int, depth: int, above: tuple[tuple[int, int], ...]) -> None:
        """Lay out sequences order[first:last], of which `depth` tokens are laid out above."""
        runs = []
        for end in range(first + 1, last + 1):
            if end == last or self.common[end - 1] < depth + MIN_SHARED:
                runs.append((first, end))
                first = end
        # adjacent leaves of equal length are one call of the kernel
        runs.sort(key=lambda run: (run[1] - run[0] > 1, len(self.arrays[self.order[run[0]]])))
        for start, end in runs:
            members = self.order[start:end]
            if end - start == 1:
                self.add(members, depth, len(self.arrays[members[0]]), above)
                continue
            shared = min(self.common[start : end - 1])
            index, own = len(self.segments), self.add(members, depth, shared, above)
            self.grow(start, end, shared, (*above, own))
            self.segments[index] = Segment(*own, self.at, above)

    def add(
        self, members: list[int], begin: int, end: int, above: tuple[tuple[int, int], ...]
    ) -> tuple[int, int]:
        """Lay out tokens [begin, end) that the members share."""
        span = (self.at, self.at + end - begin)
        self.at = span[1]
        self.tokens.append(self.arrays[members[0]][begin:end])
        self.positions.append(np.arange(begin, end))
        self.segments.append(Segment(*span, span[1], above))
        for member in members:
            self.rows[member].append(np.arange(*span))
        return span


def micro_batches(sequences: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Groups of indices, each a row of about `budget` tokens; sequences that share a prefix are
    adjacent. A function of the tokens alone."""
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    batch: list[int] = []
    filled = 0
    for i in tree_order(sequences):
        shared = common_prefix(arrays[batch[-1]], arrays[i]) if batch else 0
        cost = len(arrays[i]) - (shared if shared >= MIN_SHARED else 0)
        if batch and filled + cost > budget:
            yield batch
            batch, filled, cost = [], 0, len(arrays[i])
        batch.append(i)
        filled += cost
    if batch:
        yield batch


def tree_order(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the sequences, those with a common prefix adjacent."""
    return sorted(range(len(sequences)), key=lambda i: (list(sequences[i]), i))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of `(Na,)` and `(Nb,)` int64 token ids."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
