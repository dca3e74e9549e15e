"""The model as a stepper: read prompts once, then one token for every row at a time.

Three caches. Models whose layers are all plain or sliding-window attention use `RowCache`,
allocated ahead and compacted in place; plain ones on the CPU, where prompts have several samples
each, `SharedCache`, which keeps a prompt once. Anything else transformers can cache (state-space,
convolution and hybrid layers) uses transformers' own DynamicCache, prompts of one length at a
time, unpadded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cookbook_core.backend.local import shared_cache
from cookbook_core.backend.local.attention import configs_of, switched
from cookbook_core.backend.local.row_cache import RowCache
from cookbook_core.backend.local.sampling_math import score
from cookbook_core.backend.local.shared_cache import SharedCache
from cookbook_core.errors import ModelError, message

OPEN_ENDED = 1024  # tokens that max_tokens=None is taken to need when requests are batched
SHARE_FROM = 3  # samples per prompt from which its keys are kept once for all of them
_PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass
_SCORE_ELEMENTS = 2**25  # most logits alive while prompts are scored


@dataclass
class Prompt:
    """A distinct prompt: its ids and, once read, what was asked about it."""

    tokens: list[int]
    scored: bool = False
    top_k: int = 0
    logprobs: list[float] = field(default_factory=list)  # of tokens[1:]
    top: list[list[tuple[int, float]]] = field(default_factory=list)


# ---- the stepper ---------------------------------------------------------------------------------


class Stepper:
    """The model, its cache and the layout of the rows in it.

    pads: whether this model's layers allow prompts of different lengths in one cache.
    """

    def __init__(self, core: Any, *, share: bool = True) -> None:
        self.core = core
        self.config = core.config.get_text_config(decoder=True)
        self.device = core.get_input_embeddings().weight.device
        known = inspect.signature(core.forward).parameters
        if "past_key_values" not in known:
            raise ModelError(
                message(
                    "sample",
                    f"{type(core).__name__} keeps its state in a way this sampler does not know",
                    "a model that takes past_key_values",
                    ", ".join(known),
                )
            )
        self._takes_position_ids = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known
        layers = DynamicCache(config=self.config).layers
        self._num_layers = len(layers)
        self.pads = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
        self._configs = configs_of(core) if share else []
        self.shares = (
            bool(self._configs)
            and self._takes_position_ids
            and self.device.type == "cpu"
            and all(type(x) is DynamicLayer for x in layers)
            and getattr(self.config, "attn_logit_softcapping", None) is None
        )

    def start(self, prompts: list[Prompt], limits: Sequence[int]) -> Tensor:
        """Read each distinct prompt once; returns the `(R, V)` logits after them.

        Args:
            prompts: one per row, the same object for rows that share it.
            limits: most tokens each row may get.

        All but the last token of each prompt is read by `_prefill`; the last tokens make the first
        step of the loop, where every row is at the same column.
        """
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        longest = max(limits)
        if self.shares and len(prompts) >= SHARE_FROM * len(distinct):
            return self._start_shared(prompts, distinct, longest)
        self.width = max(len(prompt.tokens) for prompt in prompts) - 1
        self.pad = torch.tensor([self.width + 1 - len(prompt.tokens) for prompt in prompts])
        self.pad = self.pad.to(self.device)
        self.mask = None
        if self.pad.any():
            columns = torch.arange(self.width + longest, device=self.device)
            self.mask = columns >= self.pad[:, None]
        if self.pads:
            capacity = self.width + min(longest, OPEN_ENDED)
            self.cache = RowCache(self._num_layers, capacity, self.width)
        for group in self._groups(distinct):
            cache = self._prefill(group)
            if not self.pads:
                place = {id(prompt): i for i, prompt in enumerate(group)}
                order = [place[id(prompt)] for prompt in prompts]
                cache.reorder_cache(torch.tensor(order, device=self.device))
                self.cache = cache
                continue
            for i, prompt in enumerate(group):
                into = [row for row, other in enumerate(prompts) if other is prompt]
                self.cache.adopt(cache, i, into, len(prompts), self.width + 1 - len(prompt.tokens))
        return self.step(torch.tensor([p.tokens[-1] for p in prompts], device=self.device))

    def _start_shared(self, prompts: list[Prompt], distinct: list[Prompt], longest: int) -> Tensor:
        """As `start`, each prompt's keys kept once; the cache begins with the completions."""
        self.width, self.mask = 0, None
        self.pad = torch.tensor([1 - len(prompt.tokens) for prompt in prompts])
        cache = SharedCache(self._num_layers, min(longest, OPEN_ENDED))
        place: dict[int, int] = {}
        for group in self._groups(distinct):
            read = self._prefill(group)
            for i, prompt in enumerate(group):
                place[id(prompt)] = len(cache.prompts)
                cache.add_prompt(read, i, len(prompt.tokens) - 1)
        cache.assign([place.get(id(prompt), -1) for prompt in prompts])
        self.cache = cache
        return self.step(torch.tensor([p.tokens[-1] for p in prompts]))

    def _groups(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts to read in one pass: like lengths, scored ones apart."""
        if not self.pads:
            yield prompts
            return
        group: list[Prompt] = []
        for prompt in sorted(prompts, key=lambda p: (p.scored, len(p.tokens))):
            length = len(prompt.tokens)
            if length == 1:
                continue
            if group and (
                prompt.scored != group[0].scored
                or 4 * len(group[0].tokens) < 3 * length
                or (len(group) + 1) * length > _PREFILL_TOKENS
            ):
                yield group
                group = []
            group.append(prompt)
        if group:
            yield group

    def _prefill(self, group: list[Prompt]) -> Any:
        """Read all but the last token of each prompt, scoring those that ask; returns the cache.

        Right-padded: with causal attention the padding after a prompt cannot reach it. With a
        RowCache the columns are read in pieces, to bound memory.
        """
        width = max(len(prompt.tokens) for prompt in group) - 1
        cache: Any = DynamicCache(config=self.config)
        scored, piece = any(prompt.scored for prompt in group), max(width, 1)
        if self.pads:
            cache = RowCache(self._num_layers, width)
            most = _PREFILL_TOKENS
            if scored:
                most = min(most, _SCORE_ELEMENTS // self.config.vocab_size)
            piece = max(1, most // len(group))
        ids = torch.tensor([p.tokens + [0] * (width + 1 - len(p.tokens)) for p in group])
        ids = ids.to(self.device)
        first = torch.zeros(len(group), dtype=torch.int64, device=self.device)
        for start in range(0, width, piece):
            end = min(start + piece, width)
            logits = self._forward(cache, ids[:, start:end], first + start, None, scored)
            if scored:
                _keep_scores(group, logits, ids[:, start + 1 : end + 1])
        for prompt in group:
            del prompt.logprobs[len(prompt.tokens) - 1 :], prompt.top[len(prompt.tokens) - 1 :]
        return cache

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, `(R,)`; returns the next `(R, V)` logits."""
        position = self.width - self.pad
        self.width += 1
        mask = None if self.mask is None else self.mask[:, : self.width]
        return self._forward(self.cache, tokens[:, None], position, mask, False)[:, -1]

    def keep(self, order: list[int]) -> None:
        """Keep these rows, in this order."""
        index = torch.tensor(order, device=self.device)
        if self.pads:
            self.cache.keep(order)
        else:
            cast(Any, self.cache).reorder_cache(index)
        self.pad = self.pad[index]
        if self.mask is not None:
            self.mask = self.mask[index]

    def _forward(
        self, cache: Any, ids: Tensor, first: Tensor, mask: Tensor | None, whole: bool
    ) -> Tensor:
        """One pass of the model.

        Args:
            cache: keys and values so far; grows by N columns.
            ids: `(R, N)`.
            first: `(R,)`, position of column 0.
            mask: `(R, columns so far)` bool, False at padding; None without any.
            whole: logits of all N positions, not of the last alone.
        """
        extra: dict[str, Any] = {}
        if self._takes_position_ids:
            extra["position_ids"] = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = 0 if whole else 1
        sharing = isinstance(cache, SharedCache)
        if sharing:
            extra["shared"] = cache
        with switched(self._configs if sharing else [], shared_cache.NAME):
            return self.core(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
            ).logits


def _keep_scores(group: list[Prompt], logits: Tensor, targets: Tensor) -> None:
    """Store the logprobs of `targets` `(P, N)` given `logits` `(P, N, V)` with their prompts."""
    top_k = max(prompt.top_k for prompt in group)
    logprobs, ids, values = score(logits, targets, top_k)
    for i, prompt in enumerate(group):
        prompt.logprobs += logprobs[i].tolist()
        pairs = zip(ids[i].tolist(), values[i].tolist(), strict=True)
        prompt.top += [list(zip(*pair, strict=True)) for pair in pairs]
