"""Decoding many completions of few prompts: each prompt's keys and values are kept, and read, once.

A row's query attends to its prompt, together with the queries of all rows of that prompt in one
call, and to its own completion; the two results are merged by their log-sum-exp as in `attention`.
Completions start at column 0 in every row, so prompts of unequal length need no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from cookbook_core.backend.local.row_cache import RowCache

NAME = "cookbook_decode"
"""Under which transformers knows `decode_attention`; it builds no mask for it."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class SharedCache(RowCache):
    """Completions in a `RowCache`; beside it the prompts, and which rows belong to which."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(num_layers, capacity)
        self.prompts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        """Of each prompt, for each layer: keys and values `(1, heads, length, head_dim)`."""
        self.owners: list[int] = []
        self.rows: list[torch.Tensor] = []
        """Of each prompt: the rows that continue it."""

    def add_prompt(self, other: RowCache, row: int, length: int) -> None:
        """Take over the first `length` columns of a row of a cache filled by prefill."""
        self.prompts.append(
            [
                (
                    layer.keys[row : row + 1, :, :length].contiguous(),
                    layer.values[row : row + 1, :, :length].contiguous(),
                )
                for layer in other.layers
            ]
        )

    def assign(self, owners: list[int]) -> None:
        """Row i continues prompt owners[i]; -1: a prompt with nothing before its last token."""
        self.owners = owners
        self.rows = [
            torch.tensor([row for row, owner in enumerate(owners) if owner == prompt])
            for prompt in range(len(self.prompts))
        ]

    def keep(self, order: list[int]) -> None:
        """Keep `len(order)` rows, row i being what row order[i] >= i was."""
        super().keep(order)
        self.assign([self.owners[i] for i in order])


def decode_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    shared: SharedCache,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token per row.

    Args:
        module: the layer; its `layer_idx` says which prompts' keys to read.
        query: `(rows, heads, 1, head_dim)`.
        key: `(rows, key heads, columns, head_dim)`, the completions.
        value: like key.
        attention_mask: none is needed.
        shared: the prompts.
        scaling: of the scores; None is 1/sqrt(head_dim).
    Returns:
        `(rows, 1, heads, head_dim)` and no attention weights.
    """
    del attention_mask
    rows, heads, width = query.shape[0], query.shape[1], query.shape[3]
    groups = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    q = query.view(rows, key.shape[1], groups, width)  # the heads that share a key side by side
    out, lse = _flash(q, key, value, scale=scale)
    for prompt, members in zip(shared.prompts, shared.rows, strict=True):
        if not len(members):
            continue
        keys, values = prompt[module.layer_idx]
        # (members, key heads, groups, width) -> (1, key heads, members * groups, width)
        asked = q[members].transpose(0, 1).reshape(1, key.shape[1], -1, width)
        found, level = _flash(asked, keys, values, scale=scale)
        found = found.view(-1, len(members), groups, width).transpose(0, 1)
        level = level.view(-1, len(members), groups).transpose(0, 1)
        share = torch.sigmoid(level - lse[members]).to(found.dtype)
        out[members] = torch.lerp(out[members], found, share[..., None])
    return out.reshape(rows, 1, heads, width), None


AttentionInterface.register(NAME, decode_attention)
