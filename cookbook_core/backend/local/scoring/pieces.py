"""Attention of a packed row on the CPU: in pieces, each one call of a fused kernel.

Every segment attends causally to itself, and everything below a segment attends to all of it. The
results of a query's pieces are merged by their log-sum-exp,

    out = sum_p exp(lse_p - lse) out_p,   lse = log sum_p exp(lse_p)

and the backward of each piece is the kernel's own, given the merged out and lse: with
P = exp(s - lse) the gradients of the pieces add up to the gradient of the whole. Source of the
merging: Liu et al. 2023, Ring Attention, arXiv 2310.01889.
"""

from __future__ import annotations

from typing import Any

from cookbook_core.backend.local.scoring.packing import Layout, Piece

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute attention of one row.

    Args:
        q: `(heads, T, head_dim)`.
        k: like q, of as many heads or fewer.
        v: like k.
        scale: factor of the scores.
        layout: of the row.
        window: number of tokens back that a query sees, itself included; None: all.
        softcap: None; this kernel has no soft-capping.
    Returns:
        `(T, heads, head_dim)`.
    """
    assert softcap is None, "soft-capped scores go to another kernel"
    return _InPieces.apply(q, k, v, scale, layout, window)


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
