"""Attention over a row laid out by `packing`, registered with transformers; no model code changes.

A row is computed in pieces, each one call of a fused kernel: every segment causally over itself,
and everything below a segment over that segment. The results of a query's pieces are merged by
their log-sum-exp,

    out = sum_p exp(lse_p - lse) out_p,   lse = log sum_p exp(lse_p)

and the backward of each piece is the kernel's own, given the merged out and lse: with
P = exp(s - lse) the gradients of the pieces add up to the gradient of the whole. Source of the
merging: Liu et al. 2023, Ring Attention, arXiv 2310.01889. That is for the CPU; on CUDA torch's
flex attention takes the whole row in one kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

from cookbook_core.backend.local.scoring.packing import Layout, Piece

NAME = "cookbook_packed"
"""The name of `packed_attention` in transformers. No mask function is registered under it, so
transformers builds no mask."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    q, k, v = query[0], key[0], value[0]
    if q.device.type == "cpu" and softcap is None and q.shape[-1] == v.shape[-1]:
        return _InPieces.apply(q, k, v, scale, layout, sliding_window)[None], None
    if q.device.type == "cuda" and q.dtype != torch.float64 and _triton():
        return _flex(_compiled(), q, k, v, scale, layout, sliding_window, softcap)[None], None
    return _by_segment(q, k, v, scale, layout, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, packed_attention)


class _InPieces(torch.autograd.Function):
    """`(heads, T, head_dim)` each -> `(T, heads, head_dim)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, scale: float, layout: Layout, window: int | None
    ) -> torch.Tensor:
        heads, length, width = q.shape
        out = q.new_empty(length, heads, width)
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(length, heads, dtype=acc_dtype)
        for piece in layout.pieces:
            mask, seeing = _mask(layout, piece, window, q.dtype)
            a, b = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            result, level = _forward(
                *(_cut(x, at, piece.count) for x, at in ((q, a), (k, b), (v, b))),
                0.0,
                piece.causal and mask is None,
                attn_mask=mask,
                scale=scale,
            )
            # (count, heads, L, width) -> (count * L, heads, width), and so for the log-sum-exp
            result = result.permute(0, 2, 1, 3).reshape(-1, heads, width)
            level = level.permute(0, 2, 1).reshape(-1, heads)
            if seeing is not None:
                result = torch.where(seeing[:, None, None], result, 0.0)
                level = torch.where(seeing[:, None], level, -torch.inf)
            if piece.causal:
                out[a], lse[a] = result, level
            else:
                share = torch.sigmoid(level - lse[a]).to(result.dtype)  # of this piece in the sum
                out[a] = torch.lerp(out[a], result, share[..., None])
                lse[a] = torch.logaddexp(lse[a], level)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.layout, ctx.window = scale, layout, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        g, o, level = grads[0].transpose(0, 1), out.transpose(0, 1), lse.t()[..., None]
        # laid out by token, as the projections that made them want it
        dq, dk, dv = (
            x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (q, k, v)
        )
        for piece in ctx.layout.pieces:
            mask, _ = _mask(ctx.layout, piece, ctx.window, q.dtype)
            a, b = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            n = piece.count
            parts = _backward(
                _cut(g, a, n),
                _cut(q, a, n),
                _cut(k, b, n),
                _cut(v, b, n),
                _cut(o, a, n),
                _cut(level, a, n)[..., 0],
                0.0,
                piece.causal and mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            for whole, at, part in zip((dq, dk, dv), (a, b, b), parts, strict=True):
                if piece.causal:
                    _cut(whole, at, n).copy_(part)
                else:
                    whole[:, at] += part[0]
        return dq, dk, dv, None, None, None


def _cut(x: torch.Tensor, at: slice, count: int) -> torch.Tensor:
    """Tokens `at` of `(heads, T, width)` as `count` equal segments, `(count, heads, L, width)`."""
    part = x[:, at]
    if count == 1:
        return part[None]
    return part.unflatten(1, (count, part.shape[1] // count)).transpose(0, 1)


def _mask(
    layout: Layout, piece: Piece, window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a piece's additive mask `(1, 1, Lq, Lk)` and which of its queries see any key.

    Return (None, None) unless a window cuts the piece.
    """
    cut = None if window is None else layout.window_mask(piece, window)
    if cut is None:
        return None, None
    allowed, seeing = cut
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return mask[None, None], None if piece.causal else seeing


# ---- CUDA ----------------------------------------------------------------------------------------


@cache
def _triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


@cache
def _compiled() -> Any:
    """Flex attention as one kernel, compiled anew for a kind of mask but not for a length."""
    return torch.compile(flex_attention, dynamic=True)


def _flex(
    kernel: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Compute the whole row in one call of torch's flex attention, eager or compiled.

    q is `(heads, T, head_dim)`, k and v have as many heads or fewer; returns
    `(T, heads, head_dim)`.
    """

    def capped(score: Any, *_: Any) -> Any:
        cap = softcap or 1.0
        return cap * torch.tanh(score / cap)

    out = kernel(
        q[None],
        k[None],
        v[None],
        score_mod=None if softcap is None else capped,
        block_mask=_block_mask(layout, window, q.device),
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0].transpose(0, 1)


def _block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    """Which blocks of the row attend to which; made once for all layers.

    In depth-first order a token is seen by the tokens from itself up to the end of its segment's
    subtree.
    """
    key = ("flex", window, device)
    if key not in layout.memo:
        ends = layout.ends.to(device)
        positions = layout.positions.to(device)

        def sees(_b: Any, _h: Any, q: Any, k: Any) -> Any:
            below = (q >= k) & (q < ends[k])
            return below if window is None else below & (positions[q] - positions[k] < window)

        n = len(ends)
        layout.memo[key] = create_block_mask(sees, None, None, n, n, device=str(device))
    return layout.memo[key]


# ---- elsewhere -----------------------------------------------------------------------------------


def _by_segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Fallback for soft-capping on the CPU and devices without Triton: plain torch by segment.

    q is `(heads, T, head_dim)`, k and v have as many heads or fewer; returns
    `(T, heads, head_dim)`. Each segment's queries meet the keys of all segments above it and its
    own in one call.
    """
    groups = q.shape[0] // k.shape[0]
    out = []
    for s in layout.segments:
        if s.stop == s.start:
            continue
        spans = [*s.above, (s.start, s.stop)]
        queries = q[:, s.start : s.stop]
        keys, values = (torch.cat([x[:, a:b] for a, b in spans], dim=1) for x in (k, v))
        at = torch.cat([layout.positions[a:b] for a, b in spans])
        distance = layout.positions[s.start : s.stop, None] - at
        allowed = distance >= 0
        plain = not s.above
        if window is not None and int(distance.max()) >= window:
            allowed &= distance < window
            plain = False
        allowed = allowed.to(q.device)
        if softcap is None:
            o = torch.nn.functional.scaled_dot_product_attention(
                queries[None],
                keys[None],
                values[None],
                attn_mask=None if plain else allowed,
                is_causal=plain,
                scale=scale,
                enable_gqa=groups > 1,
            )[0]
        else:
            keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
            logits = softcap * torch.tanh(queries @ keys.transpose(1, 2) * scale / softcap)
            acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            probs = logits.to(acc_dtype).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
            o = probs.to(values.dtype) @ values
        out.append(o.transpose(0, 1))
    return torch.cat(out)
