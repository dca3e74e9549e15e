"""Micro-batches: datums that go through the model together, packed into a row or in padded rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from cookbook_core.backend.local.scoring import packing
from cookbook_core.backend.local.scoring.entries import Entries, position_entries, target_entries
from cookbook_core.types import Datum

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Datums that go through the model together; all of it is on the host.

    indices: of the datums in the batch they were taken from.
    ids: `(B, L)` token ids, padding included.
    rows: of each datum `(N,)`: the index of its positions among the states, rows concatenated.
    layout: of a packed row; None if rows are padded.
    """

    indices: list[int]
    data: list[Datum]
    ids: torch.Tensor
    rows: list[torch.Tensor]
    layout: packing.Layout | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that go through the model, padding included."""
        return self.ids.numel()

    @cached_property
    def targets(self) -> Entries:
        """What `Scorer.score_batch` computes."""
        return target_entries(self.data, self.rows)

    @cached_property
    def positions(self) -> Entries:
        """What `Scorer.hidden_batch` computes."""
        return position_entries(self.rows)


def packed(data: Sequence[Datum], lists: Sequence[list[int]], indices: list[int]) -> MicroBatch:
    """The datums with these indices in one row, shared prefixes once."""
    layout = packing.lay_out([lists[i] for i in indices])
    return MicroBatch(indices, [data[i] for i in indices], layout.tokens[None], layout.rows, layout)


def padded(data: Sequence[Datum], lists: Sequence[list[int]], indices: list[int]) -> MicroBatch:
    """The datums with these indices, each in a row."""
    longest = max(len(lists[i]) for i in indices)
    # any id is right; a row's own last token avoids transformers' warning of a missing mask
    ids = [lists[i] + lists[i][-1:] * (longest - len(lists[i])) for i in indices]
    rows = [torch.arange(len(lists[i])) + n * longest for n, i in enumerate(indices)]
    return MicroBatch(indices, [data[i] for i in indices], torch.tensor(ids), rows)


def idle(*, in_a_row: bool) -> MicroBatch:
    """One token of which nothing is scored: what a process computes to keep step with others.

    in_a_row: packed.
    """
    layout = packing.lay_out([[0]]) if in_a_row else None
    return MicroBatch([], [], torch.zeros(1, 1, dtype=torch.int64), [], layout)


def by_length(lists: Sequence[list[int]], budget: int) -> Iterator[list[int]]:
    """Groups of indices, longest first, each within the budget of padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lists)), key=lambda i: (-len(lists[i]), i)):
        if batch and (len(batch) + 1) * len(lists[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
