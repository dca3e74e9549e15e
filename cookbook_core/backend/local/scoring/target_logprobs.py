"""Hidden states and the unembedding -> logprobs of the target tokens, no `[N, V]` in memory.

With a frozen unembedding W the logprob of target t and its derivative are

    z = W h (+ b),   l = z[t] - logsumexp(z),   dl/dh = W[t] - p W,   p = softmax(z)

so the forward, which computes p tile by tile of the vocabulary, keeps e = pW `(N, H)`, and the
backward needs no product over the vocabulary, for any number K of targets per row:

    dL/dh = sum_k g_k W[t_k] - (sum_k g_k) e

A tile of logits stays in the processor's cache; p is relative to the largest logit so far, and
earlier sums are rescaled when a larger one appears (online softmax, Milakov and Gimelshein 2018,
arXiv 1805.02867). Soft-capped or scaled logits y = f(z) multiply each term by
f'(z). A trained unembedding (LoRA on it) has no such shortcut: its chunks are recomputed in the
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.model.sharding import backbone

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits alive at once where chunks are recomputed (64 MiB in float32)."""

TILE = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
"""Rows and vocabulary entries of a tile: 4 MiB on the CPU, to fit its caches; larger on a GPU,
where launching a kernel costs more than memory."""


@dataclass(frozen=True)
class Head:
    """Turns hidden states into logits: y = softcap * tanh(scale * (W h + b) / softcap).

    softcap None: no capping.
    """

    model: Any
    scale: float = 1.0
    softcap: float | None = None

    @property
    def module(self) -> Any:
        """The model's output embedding as it is now, LoRA included."""
        return self.model.get_output_embeddings()

    def logits(self, hidden: torch.Tensor, linear: torch.nn.Linear | None = None) -> torch.Tensor:
        """Hidden states `(N, H)` -> logits `(N, V)`, float32 or better, LoRA included.

        linear: what `frozen` returned earlier; None asks again.
        """
        linear = linear or self.frozen()
        if linear is None:
            return self.finish(at_least_float32(self.module(hidden)))
        return self.finish(head_logits(hidden, linear.weight, linear.bias))

    def frozen(self) -> torch.nn.Linear | None:
        """The layer that alone computes the raw logits of the active adapter; None if it is trained
        or of another kind."""
        return _frozen_linear(self.module)

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """Raw logits `(..., V)` -> logits, elementwise."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def slope(self, y: torch.Tensor) -> torch.Tensor | float:
        """d logits / d raw logits from the logits, elementwise; a number if it is constant."""
        return self.scale if self.softcap is None else self.scale * (1 - (y / self.softcap) ** 2)


def find_head(model: Any) -> Head | None:
    """The head of a Hugging Face causal LM; None when hidden states and the output embedding do
    not reproduce the model's own logits (an architecture that does more after it).

    Scaling and capping are read from the config under the names the architectures use, then
    checked against the model itself on a few tokens.
    """
    module = model.get_output_embeddings()
    inner = getattr(model, model.base_model_prefix, None)
    if inner is None or inner is model or not hasattr(module, "weight"):
        return None
    config = model.config.get_text_config()
    head = Head(
        model,
        scale=float(getattr(config, "logit_scale", None) or 1.0)
        / float(getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    ids = torch.arange(4, device=module.weight.device)[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = head.finish(module(hidden))
    tolerance = 1e-2 if expected.dtype == torch.bfloat16 else 1e-4
    same = logits.shape == expected.shape and torch.allclose(
        logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    return head if same else None


@dataclass(frozen=True)
class Targets:
    """Token ids for rows of hidden states, any number for each row, sorted by row.

    ids: `(E,)` int64.
    rows: `(E,)` int64, ascending: the row of each.
    starts: `(N,)` int64: the first of each row's; every row has one.
    bounds: the values of `starts`, and E, on the host.
    scale: `(N, 1)`: what each row's logits are multiplied by, 1 / temperature, in the dtype of the
        logits; None is 1.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    bounds: Sequence[int]
    scale: torch.Tensor | None = None

    def of_rows(
        self, a: int, b: int
    ) -> tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Where the targets of rows a to b are, their rows counted from a, their ids and scale."""
        own = slice(int(self.bounds[a]), int(self.bounds[b]))
        scale = None if self.scale is None else self.scale[a:b]
        return own, self.rows[own] - a if a else self.rows[own], self.ids[own], scale


def target_logprobs(head: Head, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
    """log p of the targets given hidden states.

    Args:
        head: see `find_head`.
        hidden: `(N, H)` last hidden states.
        targets: E token ids.
    Returns:
        `(E,)` nats, float32 (float64 for float64 hidden states); gradient flows to `hidden` and to
        any trained parameter of the head.
    """
    linear = _frozen_linear(head.module)
    if linear is None:
        return _checkpointed(head, hidden, targets)
    return _FrozenHead.apply(hidden, linear.weight, linear.bias, targets, head)


def _frozen_linear(module: Any) -> torch.nn.Linear | None:
    """The layer that alone computes the raw logits; None if it is trained or of another kind."""
    linear = getattr(module, "base_layer", module)  # below LoRA layers, active or not
    # FSDP's subclass has the same forward
    plain = getattr(type(linear), "forward", None) is torch.nn.Linear.forward
    if not plain or any(p.requires_grad for p in module.parameters()):
        return None
    return linear


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Raw logits z = W h + b of a linear head, float32 (float64 for float64 hidden states).

    Where the device can, a product of 16-bit tensors is not rounded to 16 bits on its way to the
    softmax: rounding a logit of 11 to bfloat16 moves logprobs by up to 2.5e-2 nats.

    Args:
        hidden: `(N, H)`; gradient flows here.
        weight: `(V, H)`, frozen, or some of its rows.
        bias: `(V,)`, frozen, or None.
    Returns:
        `(N, V)`.
    """
    if not _multiplies_into_float32(hidden.device, hidden.dtype):
        return at_least_float32(torch.nn.functional.linear(hidden, weight, bias))
    logits = _Float32Product.apply(hidden, weight)
    return logits if bias is None else logits + bias


class _Float32Product(torch.autograd.Function):
    """`(N, H)`, `(V, H)` of 16 bits -> h W^T `(N, V)` in float32; W is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _mm_into_float32(hidden, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return grads[0].to(weight.dtype) @ weight, None


def _mm_into_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has this product for the device: CUDA has, the CPU has not."""
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    square = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        _mm_into_float32(square, square)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _rows_per_chunk(vocab_size: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab_size)


def _checkpointed(head: Head, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Chunks of plain autograd, recomputed in the backward: exact for any head."""

    def chunk(
        h: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        return torch.log_softmax(scaled(head.logits(h), scale), dim=-1)[rows, ids]

    n = _rows_per_chunk(head.module.weight.shape[0])
    pieces = []
    for a in range(0, max(1, len(hidden)), n):
        b = min(a + n, len(hidden))
        pieces.append(
            checkpoint(chunk, hidden[a:b], *targets.of_rows(a, b)[1:], use_reentrant=False)
        )
    return torch.cat(pieces)


def scaled(logits: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Logits `(N, V)` times the scale of their row `(N, 1)`; None is 1."""
    return logits if scale is None else logits * scale


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of any shape to float32, except for float64.

    Softmax in bfloat16 is a well-known silent bug.
    """
    return x if x.dtype == torch.float64 else x.float()


class _FrozenHead(torch.autograd.Function):
    """Target logprobs through a frozen linear head; keeps `(N, H)`, never `(N, V)`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Targets, head: Head
    ) -> torch.Tensor:
        keep = ctx.needs_input_grad[0]
        dtype = at_least_float32(hidden).dtype
        logprobs = torch.empty(targets.ids.shape, dtype=dtype, device=hidden.device)
        slopes = torch.empty_like(logprobs)
        expected = torch.empty_like(hidden) if keep else hidden.new_empty(0)
        step = TILE.get(hidden.device.type, TILE["cuda"])[0]
        for a in range(0, len(hidden), step):
            b = min(a + step, len(hidden))
            at, *own = targets.of_rows(a, b)
            found = _tiles(hidden[a:b], weight, bias, own, head, keep)
            logprobs[at], slopes[at] = found[:2]
            if keep:
                expected[a:b] = found[2]
        ctx.save_for_backward(weight, targets.ids, targets.starts, slopes, expected)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, ids, starts, slopes, expected = ctx.saved_tensors
        (g,) = grads
        # a bag is a row's targets: no (E, H) tensor, and sums in float32 on every device
        hidden_grad = torch.nn.functional.embedding_bag(
            ids, weight, starts, per_sample_weights=(g * slopes).to(weight.dtype), mode="sum"
        )
        hidden_grad -= sum_by_row(g[:, None], starts).to(weight.dtype) * expected
        return hidden_grad, None, None, None, None


def sum_by_row(
    values: torch.Tensor, starts: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum adjacent values, in their order on every device: no atomic additions.

    Args:
        values: `(E, H)`.
        starts: `(U,)` int64: the first of each sum's values, ascending from 0.
        order: `(E,)` int64: the values in the order that `starts` is about; None: as they are.
    Returns:
        `(U, H)`.
    """
    if order is None:
        if len(starts) == len(values):
            return values
        order = torch.arange(len(values), device=values.device)
    return torch.nn.functional.embedding_bag(order, values, starts, mode="sum")


def _tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Sequence[Any],
    head: Head,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of targets (rows `(E,)`, ids `(E,)`, scale `(R, 1)` or None), the slopes there, and
    e `(R, H)` if `keep`."""
    rows, ids, scale = targets
    width = TILE.get(hidden.device.type, TILE["cuda"])[1]
    dtype = at_least_float32(hidden).dtype
    top = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
    total = torch.zeros(len(hidden), 1, dtype=dtype, device=hidden.device)
    peak = torch.full_like(total, -torch.inf)
    expected = torch.zeros(hidden.shape if keep else (0,), dtype=dtype, device=hidden.device)
    for v in range(0, len(weight), width):
        tile = weight[v : v + width]
        raw = head_logits(hidden, tile, None if bias is None else bias[v : v + width])
        logits = head.finish(raw)
        slope = head.slope(logits) if keep else 1.0
        y = scaled(logits, scale)
        here = (ids >= v) & (ids < v + len(tile))
        top = torch.where(here, y[rows, (ids - v).clamp(0, len(tile) - 1)], top)
        risen = torch.maximum(peak, y.amax(1, keepdim=True))
        shrink = (peak - risen).exp()
        peak = risen
        p = y.sub_(peak).exp_()
        total.mul_(shrink).add_(p.sum(1, keepdim=True))
        if keep:
            p = p.mul_(slope) if isinstance(slope, torch.Tensor) or slope != 1.0 else p
            expected.mul_(shrink)
            if tile.dtype == dtype:
                expected.addmm_(p, tile)
            elif _multiplies_into_float32(tile.device, tile.dtype):
                expected.add_(_mm_into_float32(p.to(tile.dtype), tile))
            else:
                expected.add_(p.to(tile.dtype) @ tile)
    slopes = head.slope(top if scale is None else top / scale[rows, 0])
    if not isinstance(slopes, torch.Tensor):
        slopes = torch.full_like(top, slopes)
    logprobs = top - peak[rows, 0] - total.log()[rows, 0]
    expected = expected.div_(total) if keep else expected
    if scale is not None:
        slopes = slopes * scale[rows, 0]
        expected = expected.mul_(scale) if keep else expected
    return logprobs, slopes, expected
