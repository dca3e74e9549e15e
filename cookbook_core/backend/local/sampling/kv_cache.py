"""Keys and values of all rows and layers, allocated in advance and compacted in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head_dim)`, allocated in advance.

    Sliding-window layers keep all columns too; transformers' mask hides the old ones.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int, length: int) -> None:
        super().__init__()
        self.capacity, self.length, self.rows = capacity, length, 0
        self.column: Tensor | None = None
        """Set by `RowCache.fix`: a 0-d tensor on the device, the column of the next update."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the rows of these states, filled with 0: masked padding must be finite.

        The states are `(rows, heads, new columns, head_dim)`.
        """
        self.rows = key_states.shape[0]
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states `(rows, heads, new columns, head_dim)`.

        Returns:
            Keys and values in all columns of the live rows, `(rows, heads, length, head_dim)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.column is not None:
            filled = self.keys[: self.rows, :, : self.length]
            filled.index_copy_(2, self.column.view(1), key_states)
            values = self.values[: self.rows, :, : self.length]
            return filled, values.index_copy_(2, self.column.view(1), value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[: self.rows, :, start : self.length] = key_states
        self.values[: self.rows, :, start : self.length] = value_states
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns after the next update, and the index of the first."""
        return self.length + (query_length if self.column is None else 0), 0

    def get_seq_length(self) -> Any:
        """Number of filled columns."""
        return self.length if self.column is None else self.column

    def get_max_length(self) -> int:
        """-1: no limit, the allocation grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


class RowCache(Cache):
    """A `RowLayer` per layer of the model.

    `allocate` makes the layers' tensors views of `stores`, one per head_dim: `(rows, heads of all
    layers' keys and values, capacity, head_dim)`. So moving a row is one operation for all layers.
    """

    layers: Any

    def __init__(self, num_layers: int, capacity: int, length: int = 0) -> None:
        super().__init__(layers=[RowLayer(capacity, length) for _ in range(num_layers)])
        self.capacity = capacity
        self.stores: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Number of filled columns."""
        return max(layer.length for layer in self.layers)

    def allocate(self, like: RowCache, rows: int) -> None:
        """Make stores of zeros for `rows` rows of the layers that another cache has filled."""
        for mine, theirs in zip(self.layers, like.layers, strict=True):
            # a layer that reads another layer's cache has none of its own
            mine.is_initialized, mine.rows = theirs.is_initialized, rows
            mine.keys, mine.values = theirs.keys, theirs.values
        self.stores = {
            width: parts[0].new_zeros(rows, sum(x.shape[1] for x in parts), self.capacity, width)
            for width, parts in self._parts().items()
        }
        self._attach()

    def _parts(self) -> dict[int, list[Tensor]]:
        """Keys and values of all layers by head_dim."""
        parts: dict[int, list[Tensor]] = {}
        for layer in self.layers:
            for x in (layer.keys, layer.values) if layer.is_initialized else ():
                parts.setdefault(x.shape[3], []).append(x)
        return parts

    def _attach(self) -> None:
        """Point the layers at their heads of the stores."""
        used = dict.fromkeys(self.stores, 0)

        def take(old: Tensor) -> Tensor:
            heads, width = old.shape[1], old.shape[3]
            used[width] += heads
            return self.stores[width][:, used[width] - heads : used[width]]

        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = take(layer.keys), take(layer.values)

    def reserve(self, capacity: int) -> None:
        """Copy the rows to a longer allocation."""
        more = (0, 0, 0, capacity - self.capacity)
        self.stores = {w: torch.nn.functional.pad(x, more) for w, x in self.stores.items()}
        self.capacity = capacity
        self._attach()

    def stack(self) -> dict[int, Tensor]:
        """Copy the layers' tensors to one like `stores` of each head_dim."""
        return {width: torch.cat(parts, dim=1) for width, parts in self._parts().items()}

    def copy_prompts(
        self, prompts: dict[int, Tensor], source: Tensor, rows: Tensor, columns: int
    ) -> None:
        """Copy prefilled prompts of one length to the last filled columns.

        Args:
            prompts: `stack()` of a prefill's cache.
            source: `(N,)` rows of it.
            rows: `(N,)` rows of this cache to fill.
            columns: number of columns to copy.
        """
        end = self.length
        for width, store in self.stores.items():
            prompt = prompts[width][:, :, :columns].index_select(0, source)
            store[rows, :, end - columns : end] = prompt

    def fix(self, rows: int, columns: int, column: Tensor) -> None:
        """Make updates overwrite one column of the first `rows` rows and `columns` columns.

        `column`: 0-d tensor on the device. Shapes and addresses are then the same in every step.
        """
        for layer in self.layers:
            layer.rows, layer.length, layer.column = rows, columns, column
            layer.is_compileable = True  # transformers then reads nothing back to make its masks

    def keep(self, rows: int, moved: Tensor, source: Tensor) -> None:
        """Keep `rows` rows, after copying row source[i] to row moved[i]."""
        for layer in self.layers:
            layer.rows = rows
        for store in self.stores.values() if len(moved) else ():
            filled = store[:, :, : self.length]
            filled[moved] = filled[source]


def move_indices(order: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """`order`, and the rows that move in it with their sources, in one copy to the device."""
    moved = [i for i, source in enumerate(order) if source != i]
    indices = [*order, *moved, *(order[i] for i in moved)]
    sizes = [len(order), len(moved), len(moved)]
    return torch.tensor(indices, device=device).split(sizes)
