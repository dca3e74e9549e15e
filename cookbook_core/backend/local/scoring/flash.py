"""Attention of a packed row on CUDA by torch's flash attention for sequences of unequal length.

The row is computed in pieces: every segment attends causally to itself, and everything below a
segment attends to all of it. All causal pieces are one call of the kernel, and all pieces below
segments of one depth are another, so a row whose tree has n levels with something below them takes
1 + n calls in the forward and as many in the backward. Results of one query are merged by their
log-sum-exp, and the backward of each piece gets the merged out and log-sum-exp, as `pieces` says.
No compiler, no mask, key heads may be fewer than heads; but bfloat16 or float16 only, an Ampere
card or newer, a head_dim of at most 256, no window and no soft cap.

The kernels are torch's own operators, which torch.nn.attention.varlen calls as well. They are not
public: `kernels` proves them on the device, forward and backward, before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cookbook_core.backend.local.scoring.packing import Layout

import numpy as np
import torch


@dataclass(frozen=True)
class Kernels:
    """A pair of kernels with the signatures of torch's operators.

    forward: (q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale)
        -> (out, log-sum-exp, seed, offset, debug). q `(Tq, heads, head_dim)`, k and v
        `(Tk, key heads, head_dim)`, starts `(pieces + 1,)` int32: where each piece's tokens begin;
        the log-sum-exp is `(heads, Tq)`.
    backward: (grad, q, k, v, out, log-sum-exp, starts_q, starts_k, longest_q, longest_k, dropout,
        causal, seed, offset, *, scale) -> gradients of q, k and v.
    """

    forward: Callable[..., Any] = torch.ops.aten._flash_attention_forward
    backward: Callable[..., Any] = torch.ops.aten._flash_attention_backward


FLASH = Kernels()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
    *,
    kernels: Kernels = FLASH,
) -> torch.Tensor:
    """Compute attention of one row.

    Args:
        q: `(heads, T, head_dim)`.
        k: like q, of as many heads or fewer.
        v: like k.
        scale: factor of the scores.
        layout: of the row.
        window: None; this kernel has no window.
        softcap: None; this kernel has no soft-capping.
        kernels: what computes each call.
    Returns:
        `(T, heads, head_dim)`.
    """
    assert (window, softcap) == (None, None), "windows and soft caps go to another kernel"
    return _InCalls.apply(q, k, v, scale, layout, kernels)


class _InCalls(torch.autograd.Function):
    """`(heads, T, head_dim)` each -> `(T, heads, head_dim)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, scale: float, layout: Layout, kernels: Kernels
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        own, below = calls(layout, q.device)
        out, lse, seed, offset, _ = kernels.forward(
            q, k, v, *own.ranges, 0.0, True, False, scale=scale
        )
        for call in below:
            at = call.queries
            keys, values = (x.index_select(0, call.keys) for x in (k, v))
            part, level, *_ = kernels.forward(
                q.index_select(0, at), keys, values, *call.ranges, 0.0, False, False, scale=scale
            )
            before = lse.index_select(1, at)
            share = torch.sigmoid(level - before).t().to(out.dtype)  # of this call in the sum
            merged = torch.lerp(out.index_select(0, at), part, share[..., None])
            out.index_copy_(0, at, merged)
            lse.index_copy_(1, at, torch.logaddexp(before, level))
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.scale, ctx.layout, ctx.kernels = scale, layout, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        q, k, v, out, lse, *state = ctx.saved_tensors
        own, below = calls(ctx.layout, q.device)
        with _deterministic():
            dq, dk, dv = ctx.kernels.backward(
                g, q, k, v, out, lse, *own.ranges, 0.0, True, *state, scale=ctx.scale
            )
        for call in below:
            at = call.queries
            keys, values = (x.index_select(0, call.keys) for x in (k, v))
            queries = [x.index_select(0, at) for x in (g, q)]
            merged = (out.index_select(0, at), lse.index_select(1, at))
            with _deterministic():
                parts = ctx.kernels.backward(
                    *queries, keys, values, *merged, *call.ranges, 0.0, False, *state,
                    scale=ctx.scale,
                )  # fmt: skip
            for whole, index, part in zip(
                (dq, dk, dv), (at, call.keys, call.keys), parts, strict=True
            ):
                whole.index_add_(0, index, part)  # no index twice: the order does not matter
        return *(x.transpose(0, 1) for x in (dq, dk, dv)), None, None, None


@dataclass(frozen=True)
class Call:
    """One call of the kernel, of P pieces.

    ranges: where the pieces begin among the queries and among the keys, `(P + 1,)` int32 each, and
        the longest of either; at least 2, since for one query of several heads to a key head the
        kernel changes the order of its log-sum-exp.
    queries, keys: `(Tq,)` and `(Tk,)` int64: the tokens of the row that the pieces are made of.
    """

    ranges: tuple[torch.Tensor, torch.Tensor, int, int]
    queries: torch.Tensor
    keys: torch.Tensor


def calls(layout: Layout, device: torch.device) -> tuple[Call, list[Call]]:
    """The call of all causal pieces, and those below segments of depth 0, 1, ....

    Made once for all layers, with one copy to the device.
    """
    key = ("flash", device)
    if key not in layout.memo:
        layout.memo[key] = _calls(layout, device)
    return layout.memo[key]


def _calls(layout: Layout, device: torch.device) -> tuple[Call, list[Call]]:
    segments = [s for s in layout.segments if s.stop > s.start]
    inner = [s for s in segments if s.subtree_stop > s.stop]
    own = [(s.start, s.stop) for s in segments]
    sides = [own, own]  # queries, keys; then those of every depth
    for depth in sorted({len(s.above) for s in inner}):
        level = [s for s in inner if len(s.above) == depth]
        sides.append([(s.stop, s.subtree_stop) for s in level])
        sides.append([(s.start, s.stop) for s in level])
    starts = [np.cumsum([0, *(stop - start for start, stop in side)]) for side in sides]
    tokens = [np.concatenate([np.arange(*span) for span in side]) for side in sides]
    longest = [max(2, *(stop - start for start, stop in side)) for side in sides]
    parts = [*starts, *tokens]
    flat = torch.from_numpy(np.concatenate(parts)).to(device)
    sizes = [len(part) for part in parts]
    begins = flat.int().split(sizes)  # the kernels read int32, index_copy_ reads int64
    index = flat.split(sizes)[len(sides) :]
    made = [
        Call((begins[n], begins[n + 1], longest[n], longest[n + 1]), index[n], index[n + 1])
        for n in range(0, len(sides), 2)
    ]
    return made[0], made[1:]


@contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, the kernel adds up the gradient of q in a fixed order.

    By default blocks add to it as they finish, so that equal inputs give unequal last bits. The
    kernel follows torch's setting for the whole process, which is restored at once; another
    thread's CUDA operation without a deterministic form may fail in between.
    """
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it would write each tensor twice
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill
