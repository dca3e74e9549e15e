"""Random trees of sequences, attention as one dense softmax, and a flash kernel in plain torch."""

from __future__ import annotations

import itertools
from typing import Any

from cookbook_core.backend.local.scoring.flash import Kernels
from cookbook_core.backend.local.scoring.packing import Layout

import numpy as np
import torch


def random_tree(rng: np.random.Generator, depth: int, longest: int) -> list[list[int]]:
    """Sequences with shared prefixes nested `depth` deep; some are equal or prefixes of others.

    longest: tokens of a node of the tree, at most; each has at least 1.
    """

    def draw() -> list[int]:
        return rng.integers(0, 1000, int(rng.integers(1, longest + 1))).tolist()

    def grow(stem: list[int], levels: int) -> list[list[int]]:
        if levels == 1:
            return [stem + draw() for _ in range(int(rng.integers(2, 4)))]
        branches = [stem + draw() for _ in range(1 + int(rng.integers(0, 2)))]
        made = [s for branch in branches for s in grow(branch, levels - 1)]
        return made + [stem + draw()] * int(rng.integers(1, 3)) + [stem] * int(rng.integers(0, 2))

    return [draw(), *(grow(draw(), depth) if depth else []), draw()]


def depth_of(layout: Layout) -> int:
    """How many levels of the tree have something below them."""
    return len({len(s.above) for s in layout.segments if s.subtree_stop > s.stop})


def seen(layout: Layout, window: int | None) -> torch.Tensor:
    """`(T, T)` bool: which keys each query sees, from the sequences' own tokens."""
    mask = torch.zeros(len(layout.tokens), len(layout.tokens), dtype=torch.bool)
    for rows in layout.rows:
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        causal = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        mask[rows[:, None], rows] |= causal
    return mask


def dense(
    q: Any, k: Any, v: Any, scale: float, layout: Layout, window: Any = None, softcap: Any = None
) -> torch.Tensor:
    """Attention with one mask over all pairs of tokens; arguments and result as every kernel's."""
    groups = q.shape[0] // k.shape[0]
    keys, values = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    scores = q @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = scores.masked_fill(~seen(layout, window), -torch.inf).softmax(dim=-1)
    return (probs @ values).transpose(0, 1)


class PlainFlash:
    """Kernels with the signatures and layouts of torch's flash attention operators.

    Each checks what the CUDA kernels check of their arguments, and counts its calls.
    """

    def __init__(self) -> None:
        self.calls = {"forward": 0, "backward": 0}
        self.kernels = Kernels(self.forward, self.backward)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
    ) -> tuple[Any, ...]:
        self.calls["forward"] += 1
        assert return_debug_mask is False
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0])
        cuts = (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
        for a, b in self._pieces(*cuts):
            scores, _, values = self._scores(query[a], key[b], value[b], is_causal, scale)
            lse[:, a] = scores.logsumexp(dim=-1)
            out[a] = (scores.softmax(dim=-1) @ values).transpose(0, 1)
        state = torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        return out, lse, *state, query.new_empty(0)

    def backward(
        self,
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Any,
        unused: Any,
        *,
        scale: float,
    ) -> tuple[Any, Any, Any]:
        self.calls["backward"] += 1
        assert torch.are_deterministic_algorithms_enabled()
        assert logsumexp.shape == (query.shape[1], query.shape[0])
        assert logsumexp.is_contiguous()
        assert rng_state.shape == (2,)
        assert unused.shape == ()
        dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        cuts = (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
        for a, b in self._pieces(*cuts):
            scores, keys, values = self._scores(query[a], key[b], value[b], is_causal, scale)
            probs = torch.exp(scores - logsumexp[:, a, None])
            g, o = grad_out[a].transpose(0, 1), out[a].transpose(0, 1)
            dp = g @ values.transpose(1, 2) - (g * o).sum(-1, keepdim=True)
            ds = probs * dp * scale
            dq[a] = (ds @ keys).transpose(0, 1)
            for whole, part in ((dk, ds.mT @ query[a].transpose(0, 1)), (dv, probs.mT @ g)):
                whole[b] = part.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        return dq, dk, dv

    @staticmethod
    def _pieces(
        query: Any, key: Any, value: Any, starts_q: Any, starts_k: Any, max_q: int, max_k: int,
        dropout: float,
    ) -> list[tuple[slice, slice]]:  # fmt: skip
        assert dropout == 0.0
        assert value.shape == key.shape
        assert query.shape[1] % key.shape[1] == 0
        assert len(starts_q) == len(starts_k)
        assert max_q > 1, "of one query the kernel orders its log-sum-exp in another way"
        pieces = []
        for x, starts, longest in ((query, starts_q, max_q), (key, starts_k, max_k)):
            assert x.stride(-1) == 1
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            at = starts.tolist()
            assert at[0] == 0
            assert at[-1] == len(x)
            lengths = np.diff(at)
            assert lengths.min() > 0
            assert lengths.max() <= longest
            pieces.append([slice(*span) for span in itertools.pairwise(at)])
        return list(zip(*pieces, strict=True))

    @staticmethod
    def _scores(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[Any, Any, Any]:
        """Scores, keys and values, `(heads, L, .)`, of one piece; causality from the last token."""
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.mT * scale
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores, keys, values
