"""A cache of keys and values for decoding: allocated ahead, rows compacted in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head_dim)`, allocated ahead.

    Sliding-window layers keep all columns too: transformers' mask hides the old ones.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int, length: int) -> None:
        super().__init__()
        self.capacity, self.length, self.rows = capacity, length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the rows of these states. Zeros: padding is masked but must be finite."""
        self.rows = key_states.shape[0]
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all columns of the live rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.capacity:
            self.reserve(max(self.length, 2 * self.capacity))
        self.keys[: self.rows, :, start : self.length] = key_states
        self.values[: self.rows, :, start : self.length] = value_states
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def reserve(self, capacity: int) -> None:
        """Move the live rows to a longer allocation."""
        more = (0, 0, 0, capacity - self.capacity)
        self.keys = torch.nn.functional.pad(self.keys[: self.rows], more)
        self.values = torch.nn.functional.pad(self.values[: self.rows], more)
        self.capacity = capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after the next update, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns filled."""
        return self.length

    def get_max_length(self) -> int:
        """No limit: it grows."""
        return -1


class RowCache(Cache):
    """A `RowLayer` per layer of the model."""

    layers: Any

    def __init__(self, num_layers: int, capacity: int, length: int = 0) -> None:
        super().__init__(layers=[RowLayer(capacity, length) for _ in range(num_layers)])

    def adopt(self, other: RowCache, row: int, into: list[int], total: int, start: int) -> None:
        """Copy one prompt to rows of this cache.

        Args:
            other: a cache filled by one prefill.
            row: the row of it to copy.
            into: the rows of this cache that continue this prompt.
            total: rows of this cache in all.
            start: its first column; the columns from there on are copied.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not theirs.is_initialized:  # a layer that reads another layer's cache
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(
                    *(x[:1].expand(total, -1, -1, -1) for x in (theirs.keys, theirs.values))
                )
            columns = mine.length - start
            mine.keys[into, :, start : mine.length] = theirs.keys[row, :, :columns]
            mine.values[into, :, start : mine.length] = theirs.values[row, :, :columns]

    def keep(self, order: list[int]) -> None:
        """Keep `len(order)` rows, row i being what row order[i] >= i was."""
        moved = [i for i, source in enumerate(order) if source != i]
        for layer in self.layers:
            if layer.is_initialized:
                layer.rows = len(order)
                if moved:
                    source = [order[i] for i in moved]
                    layer.keys[moved, :, : layer.length] = layer.keys[source, :, : layer.length]
                    layer.values[moved, :, : layer.length] = layer.values[source, :, : layer.length]
