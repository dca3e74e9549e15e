"""Which states of a micro-batch are scored, and where the scores belong among the datums'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cookbook_core.datums import SCORE_MASK, temperature_of
from cookbook_core.types import Datum

import numpy as np
import torch


@dataclass(frozen=True)
class Entries:
    """The scores that the datums of a micro-batch want, sorted by row of the states.

    A row of a shared prefix has an entry for each datum that shares it. It is computed once (for
    each temperature), and as the entries of a row are adjacent, its gradient is their sum in one
    order on every device.

    rows: `(U,)` int64, ascending: the rows that have entries, none twice at one temperature.
    starts: `(U,)` int64: the number of each row's first entry.
    row_of: `(E,)` int64: each entry's index into `rows`.
    targets: `(E,)` int64 token ids; empty where an entry is a whole row.
    places: `(E,)` int64: the place of each entry among the datums' scores, flattened, in order.
    shapes: of each datum's scores.
    temperatures: `(U,)` float64, of each of `rows`; None where all are 1.
    """

    rows: np.ndarray
    starts: np.ndarray
    row_of: np.ndarray
    targets: np.ndarray
    places: np.ndarray
    shapes: list[tuple[int, ...]]
    temperatures: np.ndarray | None = None

    def spread(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """Scores `(E,)` on the CPU -> each datum's, in its shape; 0.0 where it has no entry."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        flat = scores.new_zeros(sum(sizes))
        flat[torch.from_numpy(self.places)] = scores
        pieces = flat.split(sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def collect(self, each: Sequence[torch.Tensor]) -> torch.Tensor:
        """A tensor on the CPU for each datum, in the shape of its scores -> `(E,)`."""
        flat = [x.flatten() for x in each] or [torch.empty(0)]
        return torch.cat(flat)[torch.from_numpy(self.places)]


def target_entries(data: Sequence[Datum], rows: Sequence[torch.Tensor]) -> Entries:
    """An entry for each target token; none where a datum's score_mask is 0.

    Args:
        data: D datums with target_tokens `(N,)` or `(N, K)`.
        rows: of each datum `(N,)`: the row of the states of each of its positions.
    """
    nothing = np.empty(0, np.int64)
    at, targets, places, temperatures = [nothing], [nothing], [nothing], [nothing]
    shapes, offset = [], 0
    for datum, own in zip(data, rows, strict=True):
        ids = datum.loss_fn_inputs["target_tokens"].to_numpy()
        shapes.append(ids.shape)
        wide = ids.reshape(len(ids), -1)
        place = offset + np.arange(ids.size).reshape(wide.shape)
        offset += ids.size
        on: np.ndarray | slice = slice(None)
        if (mask := datum.loss_fn_inputs.get(SCORE_MASK)) is not None:
            on = mask.to_numpy() != 0
        at.append(np.repeat(own.numpy()[on], wide.shape[1]))
        targets.append(wide[on].flatten())
        places.append(place[on].flatten())
        temperatures.append(np.full(len(at[-1]), temperature_of(datum)))
    joined = map(np.concatenate, (at, targets, places, temperatures))
    return _sorted(next(joined), next(joined), next(joined), next(joined), shapes)


def position_entries(rows: Sequence[torch.Tensor]) -> Entries:
    """An entry for each position of each datum: a whole row of the states.

    Args:
        rows: as in `target_entries`.
    """
    at = torch.cat([torch.empty(0, dtype=torch.int64), *rows]).numpy()
    shapes = [tuple(own.shape) for own in rows]
    return _sorted(at, np.empty(0, np.int64), np.arange(len(at)), np.ones(len(at)), shapes)


def _sorted(
    at: np.ndarray,
    targets: np.ndarray,
    places: np.ndarray,
    temperatures: np.ndarray,
    shapes: list[tuple[int, ...]],
) -> Entries:
    order = np.lexsort((temperatures, at))  # stable
    at, temperatures = at[order], temperatures[order]
    first = (np.diff(at, prepend=-1) != 0) | (np.diff(temperatures, prepend=0.0) != 0)
    starts = np.flatnonzero(first)
    row_of = np.cumsum(first) - 1
    targets = targets[order] if len(targets) else targets
    own = None if (temperatures == 1).all() else temperatures[starts]
    return Entries(at[starts], starts, row_of, targets, places[order], shapes, own)
