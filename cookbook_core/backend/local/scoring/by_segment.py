"""Attention of a packed row in plain torch, segment by segment: every device, every kind of score.

Used for soft-capped scores on the CPU and wherever no fused kernel runs; the others are checked
against it.
"""

from __future__ import annotations

from cookbook_core.backend.local.scoring.packing import Layout

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute attention of one row: each segment's queries over the keys above them, in one call.

    Args:
        q: `(heads, T, head_dim)`.
        k: like q, of as many heads or fewer.
        v: `(key heads, T, value_dim)`.
        scale: factor of the scores.
        layout: of the row.
        window: number of tokens back that a query sees, itself included; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: they do not.
    Returns:
        `(T, heads, value_dim)`.
    """
    groups = q.shape[0] // k.shape[0]
    out = []
    for index, s in enumerate(layout.segments):
        if s.stop == s.start:
            continue
        spans = [*s.above, (s.start, s.stop)]
        queries = q[:, s.start : s.stop]
        keys, values = (torch.cat([x[:, a:b] for a, b in spans], dim=1) for x in (k, v))
        cut = window is not None and s.stop - s.start > window
        plain = not s.above and not cut
        if softcap is None:
            o = torch.nn.functional.scaled_dot_product_attention(
                queries[None],
                keys[None],
                values[None],
                attn_mask=None if plain else _mask(layout, index, window, q.device),
                is_causal=plain,
                scale=scale,
                enable_gqa=groups > 1,
            )[0]
        else:
            keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
            logits = softcap * torch.tanh(queries @ keys.transpose(1, 2) * scale / softcap)
            acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            allowed = _mask(layout, index, window, q.device)
            probs = logits.to(acc_dtype).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
            o = probs.to(values.dtype) @ values
        out.append(o.transpose(0, 1))
    return torch.cat(out)


def _mask(layout: Layout, index: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys, those above first, each query of segment `index` sees: `(L, keys)` bool.

    Made once for all layers.
    """
    key = ("by_segment", index, window, device)
    if key not in layout.memo:
        s = layout.segments[index]
        at = torch.cat([layout.positions[a:b] for a, b in (*s.above, (s.start, s.stop))])
        distance = layout.positions[s.start : s.stop, None] - at
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        layout.memo[key] = allowed.to(device)
    return layout.memo[key]
