"""Attention of a packed row in one call of torch's flex attention, compiled by inductor for CUDA.

In depth-first order a token is seen by the tokens from itself up to the end of its segment's
subtree. Which blocks of the row attend to which follows from each block's smallest and largest
position and subtree end, on the host: the device never holds a T x T mask. Nothing that the kernel
reads is a Python number (the soft cap is a 0-d tensor, the window a tensor of positions), so that
one compiled graph serves all lengths, windows and caps.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from cookbook_core.backend.local.scoring.packing import Layout
from cookbook_core.errors import CookbookError

import numpy as np
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens to a block, flex attention's own."""
RECOMPILE_LIMIT = 64
"""Compiled graphs kept of this function. A kind of model takes up to four: rows of one block or
more, with and without gradient."""


class UnfusedError(CookbookError, RuntimeError):
    """Flex attention would run without its kernel: with all `(heads, T, T)` scores in memory."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
    *,
    run: Any = None,
) -> torch.Tensor:
    """Compute attention of one row.

    Args:
        q: `(heads, T, head_dim)`.
        k: like q, of as many heads or fewer.
        v: `(key heads, T, value_dim)`.
        scale: factor of the scores.
        layout: of the row.
        window: number of tokens back that a query sees, itself included; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: they do not.
        run: what computes it: None is the compiled kernel; `eager` is plain torch.
    Returns:
        `(T, heads, value_dim)`.
    Raises:
        UnfusedError: torch would not use a compiled kernel.
    """
    mask = block_mask(layout, window, q.device)
    cap = None if softcap is None else _cap(layout, softcap, q)
    try:
        out = (run or compiled())(q[None], k[None], v[None], scale, mask, cap)
    except FailOnRecompileLimitHit as error:
        raise UnfusedError(
            "flex attention",
            "too many kinds of rows in one process",
            expected=f"at most {RECOMPILE_LIMIT} compiled graphs",
            fix="Use a process for each few models.",
        ) from error
    return out[0].transpose(0, 1)


def eager(q: Any, k: Any, v: Any, scale: float, mask: BlockMask, cap: Any) -> torch.Tensor:
    """Flex attention as torch runs it where it is called: fused only while being compiled.

    Args:
        q: `(1, heads, T, head_dim)`.
        k: like q, of as many heads or fewer.
        v: `(1, key heads, T, value_dim)`.
        scale: factor of the scores.
        mask: which blocks attend to which.
        cap: 0-d tensor, the soft cap, or None.
    Returns:
        `(1, heads, T, value_dim)`.
    """

    def capped(score: Any, *_: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return flex_attention(
        q,
        k,
        v,
        score_mod=None if cap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # short rows by the kernel of long ones, not by that for decoding: what was proved holds
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


def fused(q: Any, k: Any, v: Any, scale: float, mask: BlockMask, cap: Any) -> torch.Tensor:
    """`eager`, for torch.compile.

    Raises:
        UnfusedError: run without being compiled.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise UnfusedError(
            "flex attention",
            "is not compiled",
            expected="torch.compile enabled",
            fix="Unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE.",
        )
    return eager(q, k, v, scale, mask, cap)


def compile_fused(limit: int = RECOMPILE_LIMIT, **options: Any) -> Any:
    """`fused`, compiled anew for a kind of row but not for a length, at most `limit` times.

    One graph more is an error (fullgraph) where torch would continue without a kernel. The limit is
    this function's alone; before torch 2.13 the setting is changed around each call.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = limit
        return torch.compile(fused, dynamic=True, fullgraph=True, **options)
    inner = torch.compile(fused, dynamic=True, fullgraph=True, **options)

    def run(*arguments: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=limit):
            return inner(*arguments)

    return run


@cache
def compiled() -> Any:
    """The one compiled kernel of this process."""
    return compile_fused()


def _cap(layout: Layout, softcap: float, q: torch.Tensor) -> torch.Tensor:
    """The soft cap as a 0-d tensor on q's device, in the precision of the scores."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    key = ("softcap", softcap, dtype, q.device)
    if key not in layout.memo:
        layout.memo[key] = torch.tensor(softcap, dtype=dtype).to(q.device)
    return layout.memo[key]


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of the row attend to which, and which tokens within them.

    Made once for all layers, on the host: a few copies of `(blocks, blocks)` int32 and `(T,)` int32
    to the device and nothing computed there.
    """
    key = ("flex", window, device)
    if key not in layout.memo:
        ends = layout.ends.int().to(device)
        if window is None:

            def sees(_b: Any, _h: Any, q: Any, k: Any) -> Any:
                return (q >= k) & (q < ends[k])

        else:
            positions = layout.positions.int().to(device)
            low = (layout.positions - window).int().to(device)

            def sees(_b: Any, _h: Any, q: Any, k: Any) -> Any:
                return (q >= k) & (q < ends[k]) & (positions[k] > low[q])

        partial, full = blocks(layout, window)
        length = len(layout.tokens)
        layout.memo[key] = BlockMask.from_kv_blocks(
            *_columns(partial),
            *_columns(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(length, length),
        ).to(device)
    return layout.memo[key]


def blocks(layout: Layout, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a query and a key block, from bounds of their positions and ends.

    Returns:
        partial: `(n, n)` bool: some query may see some key; the mask decides. All pairs that are
            not full and have a visible pair of tokens are among them.
        full: `(n, n)` bool: every query sees every key, and no block is padded.
    """
    ends, positions = layout.ends.numpy(), layout.positions.numpy()
    first = np.arange(0, len(ends), BLOCK)
    last = np.minimum(first + BLOCK, len(ends)) - 1
    lowest_end, highest_end = (f.reduceat(ends, first) for f in (np.minimum, np.maximum))
    lowest, highest = (f.reduceat(positions, first) for f in (np.minimum, np.maximum))
    some = (last[:, None] >= first) & (first[:, None] < highest_end)
    full = (first[:, None] > last) & (last[:, None] < lowest_end)
    if window is not None:
        some &= lowest[:, None] - highest < window
        full &= highest[:, None] - lowest < window
    if len(ends) % BLOCK:
        full[-1] = False
    return some & ~full, full


def _columns(wanted: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row of `(n, n)` bool: how many columns are set, `(1, 1, n)`, and these columns first,
    `(1, 1, n, n)`, both int32."""
    order = np.argsort(~wanted, axis=1, kind="stable").astype(np.int32)
    count = wanted.sum(axis=1, dtype=np.int32)
    return torch.from_numpy(count)[None, None], torch.from_numpy(order)[None, None]
