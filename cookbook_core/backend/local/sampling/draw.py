"""Draw tokens from logits, with their logprobs, and decide when to stop.

No model is involved. Logprobs are those of softmax(logits / temperature) over the whole
vocabulary, before top_k and top_p, in float32 (float64 when the logits are float64).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.scoring.target_logprobs import at_least_float32
from cookbook_core.types import SamplingParams

import numpy as np
import torch
from torch import Tensor

_BLOCK = 128  # vocabulary entries that `draw_tokens` sums together
DRAWS = 64
"""Steps whose uniforms are made, and copied to the device, at a time."""


# ---- one step: logits to tokens -----------------------------------------------------------------


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling parameters of R rows as tensors; None where no row needs the feature.

    scale: `(R, 1)`, 1 / temperature; 1 for greedy rows.
    greedy: `(R,)` bool. top_k: `(R,)`, 0 for all. top_p: `(R,)`.
    """

    scale: Tensor | None
    greedy: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors:
        """Collect the parameters of one row each, in one copy to the device at most."""
        packed = pack(params)
        used = in_use(packed)
        return cls.unpack(packed.to(device) if any(used) else packed, used)

    @classmethod
    def unpack(cls, packed: Tensor, used: tuple[bool, ...]) -> SamplingTensors:
        """From `(4, R)` of `pack`, and which of the four rows need (see `in_use`)."""
        scale, greedy, top_k, top_p = used
        return cls(
            scale=packed[0, :, None] if scale else None,
            greedy=packed[1] > 0 if greedy else None,
            top_k=packed[2].long() if top_k else None,
            top_p=packed[3] if top_p else None,
        )


_NEUTRAL = (1.0, 0.0, 0.0, 1.0)


def pack(params: Sequence[SamplingParams]) -> Tensor:
    """scale, greedy, top_k and top_p of R rows: `(4, R)` float64 on the CPU, 1, 0, 0, 1 if unused.

    top_k is exact in float64.
    """
    rows = [
        (1.0 / (p.temperature or 1.0), float(p.temperature == 0), max(p.top_k, 0), p.top_p)
        for p in params
    ]
    return torch.tensor(rows, dtype=torch.float64).t().contiguous()


def in_use(packed: Tensor) -> tuple[bool, ...]:
    """Whether any row of `pack` `(4, R)` needs its scale, greedy, top_k, top_p."""
    pairs = zip(packed.tolist(), _NEUTRAL, strict=True)
    return tuple(any(x != neutral for x in values) for values, neutral in pairs)


@functools.cache
def draw_device(device: torch.device) -> torch.device:
    """Where `draw_tokens` runs: on the logits' device; on the CPU if that has no float64 (MPS)."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return torch.device("cpu")
    return device


def draw_tokens(
    logits: Tensor, uniforms: Tensor, tensors: SamplingTensors
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a uniform number.

    The cumulative sum runs over blocks of the vocabulary first and inside one block after, both
    in float64, so a row's token depends on its own logits and uniform alone.

    Args:
        logits: `(R, V)`, any float dtype.
        uniforms: `(R,)` float64 in [0, 1).
        tensors: the parameters of the R rows.

    Returns:
        tokens: `(R,)` int64.
        logprobs: `(R,)`, nats; at each row's temperature (1 for greedy rows), before top_k/top_p.
    """
    logits = at_least_float32(logits)
    if tensors.scale is not None:
        logits = logits * tensors.scale.to(logits.dtype)
    peak = logits.amax(dim=1, keepdim=True)
    mass = (logits - peak).exp_()
    blocks, sums = _block_sums(mass)
    total = sums[:, -1]
    if tensors.top_k is not None or tensors.top_p is not None:
        blocks, sums = _block_sums(truncate(mass, tensors.top_k, tensors.top_p))
    tokens = _invert(blocks, sums, uniforms)
    if tensors.greedy is not None:
        tokens = torch.where(tensors.greedy, logits.argmax(dim=1), tokens)
    chosen = logits.gather(1, tokens[:, None]) - peak
    return tokens, chosen[:, 0] - total.log().to(logits.dtype)


def top_tokens(logits: Tensor, tensors: SamplingTensors, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, under the distribution that `draw_tokens` reports.

    Args:
        logits: `(R, V)`, any float dtype.
        tensors: the parameters of the R rows.
        top_k: how many.

    Returns:
        ids and logprobs, both `(R, top_k)`, most likely first; nats.
    """
    logits = at_least_float32(logits)
    if tensors.scale is not None:
        logits = logits * tensors.scale.to(logits.dtype)
    values, ids = logits.topk(top_k, dim=1)
    peak = logits.amax(dim=1, keepdim=True)
    total = _block_sums((logits - peak).exp_())[1][:, -1:]
    return ids, values - peak - total.log().to(logits.dtype)  # the bits of `draw_tokens`


def draw_alternatives(logprobs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw k tokens of each row, with replacement.

    Args:
        logprobs: `(R, V)`, nats.
        uniforms: `(R, k)` float64 in [0, 1).

    Returns:
        tokens and their logprobs, both `(R, k)`.
    """
    blocks, sums = _block_sums(logprobs.exp())
    tokens = torch.stack([_invert(blocks, sums, column) for column in uniforms.unbind(1)], dim=1)
    return tokens, logprobs.gather(1, tokens)


def _block_sums(mass: Tensor) -> tuple[Tensor, Tensor]:
    """`mass` `(R, V)` in blocks `(R, B, _BLOCK)`, and their cumulative sum `(R, B)`, float64."""
    rows, vocab = mass.shape
    if vocab % _BLOCK:
        mass = torch.nn.functional.pad(mass, (0, _BLOCK - vocab % _BLOCK))
    blocks = mass.view(rows, -1, _BLOCK)
    return blocks, blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)


def _invert(blocks: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """The index at which each row's cumulative sum passes u * total; see `_block_sums`."""
    # strictly below the total, so that the block has some mass even after rounding
    target = uniforms.clamp(max=1 - 1e-15)[:, None] * sums[:, -1:]
    # (the clamp matters for NaN alone; the caller refuses the logprob that results)
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    index = torch.searchsorted(inside.cumsum(dim=1), target - before, right=True)
    # rounding may carry the search past the last entry with any mass: step back to it
    last = (torch.arange(_BLOCK, device=blocks.device) * (inside > 0)).amax(dim=1, keepdim=True)
    return (block * _BLOCK + torch.minimum(index, last))[:, 0]


def truncate(mass: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Set to zero what top_k, then top_p, excludes.

    Args:
        mass: `(R, V)` unnormalised probabilities.
        top_k: `(R,)` int64, 0 for all.
        top_p: `(R,)`; keep the smallest set that reaches this share of the mass left by top_k.

    Returns:
        `(R, V)`: `mass` with zeros outside the kept set.
    """
    ordered, order = mass.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(mass.shape[1], device=mass.device)
        limit = torch.where(top_k > 0, top_k, mass.shape[1])
        ordered = ordered * (rank < limit[:, None])
    if top_p is not None:
        reached = ordered.cumsum(dim=1, dtype=torch.float64)
        before = reached - ordered
        ordered = ordered * ((before < top_p[:, None] * reached[:, -1:]) | (top_p >= 1)[:, None])
    return torch.zeros_like(mass).scatter_(1, order, ordered)


def score(logits: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs at temperature 1 of `targets`, and the `top_k` most likely ids.

    Args:
        logits: `(P, N, V)`.
        targets: `(P, N)` ids.
        top_k: how many ids, 0 for none.

    Returns:
        logprobs `(P, N)`, top ids `(P, N, top_k)` and their logprobs, most likely first; nats.
    """
    logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
    top_values, top_ids = logprobs.topk(top_k, dim=-1)
    return logprobs.gather(-1, targets[..., None])[..., 0], top_ids, top_values


class Uniforms:
    """The random numbers of one sample: a function of (seed, sample index) alone."""

    def __init__(self, seed: int, sample: int) -> None:
        self._generator = np.random.default_rng([seed % 2**64, sample])

    def take(self) -> np.ndarray:
        """The next DRAWS numbers, float64 in [0, 1)."""
        return self._generator.random(DRAWS)


def take_uniforms(uniforms: Sequence[Uniforms]) -> Tensor:
    """The next DRAWS numbers of R rows, `(DRAWS, R)` float64 on the CPU."""
    return torch.from_numpy(np.stack([row.take() for row in uniforms], axis=1))


# ---- stopping -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StopRule:
    """Stop after a token in `ids`, or once the decoded completion contains one of `strings`."""

    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: str | Sequence[str] | Sequence[int] | None, eos: frozenset[int]) -> StopRule:
        """From `SamplingParams.stop`; None means the end-of-sequence ids `eos`."""
        if stop is None:
            return cls(ids=eos)
        if isinstance(stop, str):
            return cls(strings=(stop,))
        if any(isinstance(entry, str) for entry in stop):
            return cls(strings=tuple(str(entry) for entry in stop))
        return cls(ids=frozenset(int(entry) for entry in stop))


def eos_ids(tokenizer: Any, config: Any) -> frozenset[int]:
    """Return the end-of-sequence ids used for stop=None.

    The tokenizer's id; if the model config lists several and the tokenizer's is one of them, all
    of that list. A config that disagrees with the tokenizer is ignored: many are library defaults.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    listed = getattr(config, "eos_token_id", None)
    if isinstance(listed, (list, tuple)) and eos in listed:
        return frozenset(listed)
    return frozenset() if eos is None else frozenset([eos])


@dataclass
class TextWatch:
    """Finds a stop string in a growing completion, decoding only its last tokens.

    The window opens at token `start` and moves only when the text after it stays longer than any
    stop string, so a string that spans tokens, or follows tokens that decode to nothing, is seen.
    """

    strings: tuple[str, ...]
    tokenizer: Any
    start: int = 0
    margin: int = field(init=False)

    def __post_init__(self) -> None:
        self.margin = max(map(len, self.strings)) + 16

    def matches(self, tokens: list[int]) -> bool:
        """Whether the text of `tokens` (the completion so far) contains a stop string."""
        text = self._decode(tokens[self.start :])
        if any(string in text for string in self.strings):
            # a window's first characters may decode differently on their own: check the whole text
            whole = self._decode(tokens)
            return any(string in whole for string in self.strings)
        if len(text) > 4 * self.margin:
            middle = (self.start + len(tokens)) // 2
            if len(self._decode(tokens[middle:])) > self.margin:
                self.start = middle
        return False

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
