"""The KV cache, and the model that decodes with it: prefill prompts, then one token per step.

Two caches. Models whose layers are all plain or sliding-window attention use `RowCache`, allocated
in advance and compacted in place. Other models that transformers can cache (state-space,
convolution and hybrid layers) use its DynamicCache, with prompts of one length at a time, unpadded.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from cookbook_core.backend.local.sampling.draw import score
from cookbook_core.backend.local.scoring.target_logprobs import Head
from cookbook_core.errors import ModelError

OPEN_ENDED = 1024  # tokens assumed for max_tokens=None when rows are batched
_PREFILL_TOKENS = 8192  # most prompt tokens in one forward
_SCORE_ELEMENTS = 2**25  # most logits alive while prompts are scored


@dataclass
class Prompt:
    """A distinct prompt: its ids and, after prefill, its logprobs if they were requested."""

    tokens: list[int]
    scored: bool = False
    top_k: int = 0
    logprobs: list[float] = field(default_factory=list)  # of tokens[1:]
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop the logprobs of a prefill that was not completed."""
        self.logprobs, self.top = [], []


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


# ---- decoding ------------------------------------------------------------------------------------


class Decoder:
    """A model with its KV cache and the layout of the rows in it.

    Args:
        core: the causal LM.
        head: see `find_head`; computes the logits of a model in 16 bits, which would round them.
    Attributes:
        pads: whether this model's layers allow prompts of different lengths in one cache.
    """

    def __init__(self, core: Any, head: Head | None = None) -> None:
        self.core = core
        self._head = head if core.dtype.itemsize < 4 else None
        self._model = getattr(core, core.base_model_prefix) if self._head else core
        self.config = core.config.get_text_config(decoder=True)
        self.device = core.get_input_embeddings().weight.device
        known = inspect.signature(self._model.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in known]
        if not names:
            raise ModelError(
                "sample",
                f"{type(core).__name__}.forward() takes neither cache nor past_key_values",
                fix="Use a decoder-only causal LM.",
            )
        self._cache_name = names[0]  # transformers 5.24 renamed past_key_values to cache
        self._takes_position_ids = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known
        layers = DynamicCache(config=self.config).layers
        self._num_layers = len(layers)
        self.pads = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)

    def prefill(
        self, prompts: list[Prompt], limits: Sequence[int], shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Read all but the last token of each distinct prompt; return the last ones, `(R,)`.

        They are the first tokens to `step` with: from there on all rows are at the same column.

        Args:
            prompts: one per row, the same object for rows that share it.
            limits: the largest number of tokens each row may get.
            shape: rows x columns of the cache, at least those needed; None: those needed.
        """
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        self.width = max(len(prompt.tokens) for prompt in prompts) - 1
        longest = max(limits)
        self._pads = [self.width + 1 - len(prompt.tokens) for prompt in prompts]
        last = [prompt.tokens[-1] for prompt in prompts]
        self.pad, tokens = torch.tensor([self._pads, last], device=self.device)
        self.mask = None
        if any(self._pads):
            columns = torch.arange(self.width + longest, device=self.device)
            self.mask = columns >= self.pad[:, None]
        size, capacity = shape or (len(prompts), self.width + min(longest, OPEN_ENDED))
        if self.pads:
            self.cache = RowCache(self._num_layers, capacity, self.width)
        for group in self._groups(distinct):
            cache, place = self._read(group), {id(prompt): i for i, prompt in enumerate(group)}
            if self.pads:
                if not self.cache.stores:
                    self.cache.allocate(cache, size)
                self._copy(cache, place, prompts)
            else:
                order = [place[id(prompt)] for prompt in prompts]
                cache.reorder_cache(torch.tensor(order, device=self.device))
                self.cache = cache
        if self.pads and not self.cache.stores:  # no prompt has a second token
            self.cache.allocate(self._read([Prompt([0, 0])]), size)
        if self.pads:
            for layer in self.cache.layers:
                layer.rows = len(prompts)
        self._choose_mask()
        return tokens

    def _copy(self, cache: RowCache, place: dict[int, int], prompts: list[Prompt]) -> None:
        """Copy the prompts in a prefill's cache to their rows.

        `place` is their row in it by id; one copy per length.
        """
        rows = [(len(p.tokens), place[id(p)], i) for i, p in enumerate(prompts) if id(p) in place]
        rows.sort()
        lengths, *pairs = zip(*rows, strict=True)
        source, into = torch.tensor(pairs, device=self.device)
        stacked, start = cache.stack(), 0
        for length, same in itertools.groupby(lengths):
            end = start + len(list(same))
            self.cache.copy_prompts(stacked, source[start:end], into[start:end], length - 1)
            start = end

    def _choose_mask(self) -> None:
        """Give the model a mask only while a live row has padding.

        A cache marked as static keeps transformers from asking the device whether it has.
        """
        if not any(self._pads):
            self.mask = None
        if self.pads:
            for layer in self.cache.layers:
                layer.is_compileable = self.mask is not None

    def _groups(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        """Group prompts of similar length for one prefill.

        Prompts with requested logprobs form their own groups.
        """
        if not self.pads:
            yield prompts
            return
        group: list[Prompt] = []
        for prompt in sorted(prompts, key=lambda p: (p.scored, len(p.tokens))):
            length = len(prompt.tokens)
            if length == 1:
                continue
            if group and (
                prompt.scored != group[0].scored
                or 4 * len(group[0].tokens) < 3 * length
                or (len(group) + 1) * length > _PREFILL_TOKENS
            ):
                yield group
                group = []
            group.append(prompt)
        if group:
            yield group

    def _read(self, group: list[Prompt]) -> Any:
        """Read all but the last token of each prompt and score where requested; return the cache.

        Right-padded: under causal attention a prompt does not see the padding after it. With a
        RowCache the columns are read in pieces, to bound memory.
        """
        width = max(len(prompt.tokens) for prompt in group) - 1
        cache: Any = DynamicCache(config=self.config)
        scored, piece = any(prompt.scored for prompt in group), max(width, 1)
        if self.pads:
            cache = RowCache(self._num_layers, width)
            most = _PREFILL_TOKENS
            if scored:
                most = min(most, _SCORE_ELEMENTS // self.config.vocab_size)
            piece = max(1, most // len(group))
        ids = torch.tensor([p.tokens + [0] * (width + 1 - len(p.tokens)) for p in group])
        ids = ids.to(self.device)
        first = torch.zeros(len(group), dtype=torch.int64, device=self.device)
        for start in range(0, width, piece):
            end = min(start + piece, width)
            logits = self.forward(cache, ids[:, start:end], first + start, None, scored)
            if scored:
                _keep_scores(group, logits, ids[:, start + 1 : end + 1])
        for prompt in group:
            del prompt.logprobs[len(prompt.tokens) - 1 :], prompt.top[len(prompt.tokens) - 1 :]
        return cache

    def release(self) -> None:
        """Free the KV cache."""
        self.cache: Any = None

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, `(R,)`; return the next `(R, V)` logits."""
        position = self.width - self.pad
        self.width += 1
        if self.pads and self.width > self.cache.capacity:
            self.cache.reserve(2 * self.cache.capacity)
        mask = None if self.mask is None else self.mask[:, : self.width]
        return self.forward(self.cache, tokens[:, None], position, mask, False)[:, -1]

    def keep(self, order: list[int]) -> Tensor:
        """Row i becomes the former row order[i] >= i; return `order` on the device."""
        index, into, source = move_indices(order, self.device)
        if self.pads:
            self.cache.keep(len(order), into, source)
        else:
            self.cache.reorder_cache(index)
        self._pads = [self._pads[i] for i in order]
        self.pad = self.pad[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        self._choose_mask()
        return index

    def forward(
        self, cache: Any, ids: Tensor, first: Tensor, mask: Tensor | None, whole: bool
    ) -> Tensor:
        """One forward of the model.

        Args:
            cache: keys and values so far; it grows by N columns.
            ids: `(R, N)`.
            first: `(R,)`, position of column 0.
            mask: `(R, columns so far)` bool, False at padding; None without any.
            whole: return the logits of all N positions, not only of the last.
        """
        extra: dict[str, Any] = {self._cache_name: cache}
        if self._takes_position_ids:
            extra["position_ids"] = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = 0 if whole else 1
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
        if self._head is None:
            return output.logits
        hidden = output.last_hidden_state if whole else output.last_hidden_state[:, -1:]
        return self._head.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def _keep_scores(group: list[Prompt], logits: Tensor, targets: Tensor) -> None:
    """Store the logprobs of `targets` `(P, N)`, from `logits` `(P, N, V)`, with their prompts."""
    top_k = max(prompt.top_k for prompt in group)
    columns = (x.tolist() for x in score(logits, targets, top_k))
    for prompt, logprobs, ids, values in zip(group, *columns, strict=True):
        prompt.logprobs += logprobs
        prompt.top += [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
