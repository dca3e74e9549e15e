"""Attention over a row laid out by `packing`, registered with transformers; no model code changes.

`kernels` says which of the modules beside it computes a row: on the CPU fused kernels over pieces
of the row, on CUDA torch's flash attention for plain causal models and flex attention for windows
and soft caps.
"""

from __future__ import annotations

from typing import Any

from cookbook_core.backend.local.scoring import flex, kernels
from cookbook_core.backend.local.scoring.packing import Layout

import torch
from transformers import AttentionInterface

NAME = "cookbook_packed"
"""The name of `packed_attention` in transformers. No mask function is registered under it, so
transformers builds no mask."""


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one row.

    Args:
        module: the layer; not used.
        query: `(1, heads, T, head_dim)`.
        key: like query, of as many heads or fewer.
        value: like key.
        attention_mask: none is needed.
        layout: of the row.
        scaling: of the scores; None is 1/sqrt(head_dim).
        sliding_window: how many tokens back a query sees, itself included; None: all.
        softcap: scores s become softcap * tanh(s / softcap).
    Returns:
        `(1, T, heads, head_dim)` and no attention weights.
    """
    del module, attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.squeeze(0) for x in (query, key, value))  # x[0] would fill zeros in the backward
    if sliding_window is not None and layout.longest <= sliding_window:
        sliding_window = None  # no two tokens are that far apart
    kind = kernels.Kind(
        q.device,
        q.dtype,
        q.shape[0],
        k.shape[0],
        q.shape[-1],
        v.shape[-1],
        window=sliding_window is not None,
        softcap=softcap is not None,
    )
    arguments = (q, k, v, scale, layout, sliding_window, softcap)
    name = kernels.kernel_for(kind)
    try:
        out = kernels.KERNELS[name].attend(*arguments)
    except flex.UnfusedError as error:
        name = kernels.refuse(kind, error.what)
        out = kernels.KERNELS[name].attend(*arguments)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
