"""The model that decodes with a KV cache: prefill prompts, then one token per step.

Two caches. Models whose layers are all plain or sliding-window attention use `RowCache`, allocated
in advance and compacted in place. Other models that transformers can cache (state-space,
convolution and hybrid layers) use its DynamicCache, with prompts of one length at a time, unpadded.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.model.sharding import backbone
from cookbook_core.backend.local.model.vision import VisionTower
from cookbook_core.backend.local.sampling.draw import score
from cookbook_core.backend.local.sampling.kv_cache import RowCache, move_indices
from cookbook_core.backend.local.sampling.layer_loop import TOLERANCE, LayerLoop, same
from cookbook_core.backend.local.scoring.target_logprobs import Head
from cookbook_core.errors import ModelError
from cookbook_core.types import ModelInput

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

OPEN_ENDED = 1024  # tokens assumed for max_tokens=None when rows are batched
_PREFILL_TOKENS = 8192  # most prompt tokens in one forward
_SCORE_ELEMENTS = 2**25  # most logits alive while prompts are scored


@dataclass
class Prompt:
    """A distinct prompt: its ids and, after prefill, its logprobs if they were requested.

    tokens: with images the keys of its positions.
    model_input: the prompt, if it has images.
    """

    tokens: list[int]
    model_input: ModelInput | None = None
    scored: bool = False
    top_k: int = 0
    logprobs: list[float] = field(default_factory=list)  # of tokens[1:]
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop the logprobs of a prefill that was not completed."""
        self.logprobs, self.top = [], []


class Decoder:
    """A model with its KV cache and the layout of the rows in it.

    Args:
        core: the causal LM.
        head: see `find_head`; computes the logits of a model in 16 bits, which would round them.
        tower: for prompts with images.
    Attributes:
        pads: whether this model's layers allow prompts of different lengths in one cache.
        pad: `(R,)`, columns of padding in each row after `prefill`; not kept up to date.
        ahead: `(R,)`, what is added to a column for the position of its token: minus the padding,
            and what images take less or more in positions than in columns.
    """

    def __init__(
        self, core: Any, head: Head | None = None, tower: VisionTower | None = None
    ) -> None:
        self.core, self._tower = core, tower
        self._head = head if core.dtype.itemsize < 4 else None
        self._model = backbone(core) if self._head else core
        computes = getattr(core, core.base_model_prefix) if self._head else core
        self.config = core.config.get_text_config(decoder=True)
        self.device = core.get_input_embeddings().weight.device
        known = inspect.signature(computes.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in known]
        if not names:
            raise ModelError(
                "sample",
                f"{type(core).__name__}.forward() takes neither cache nor past_key_values",
                fix="Use a decoder-only causal LM.",
            )
        self._cache_name = names[0]  # transformers 5.24 renamed past_key_values to cache
        self._takes_position_ids = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known
        layers = DynamicCache(config=self.config).layers
        self._num_layers = len(layers)
        self.pads = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
        plain = all(type(x) is DynamicLayer for x in layers)
        self._loop = LayerLoop.of(core) if plain else None
        if self._loop is not None and core not in same:
            self._compare()

    def _compare(self) -> None:
        """Compare two steps of the layer loop with the model's own, on random tokens and padding.

        The loop is not used where its logits differ.
        """
        loop, generator = self._loop, torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (11,), generator=generator).tolist()
        first = self.prefill([Prompt(ids[:7]), Prompt(ids[7:])], [2, 2])
        logits = []
        try:
            for self._loop in (None, loop):
                self.step(first)
                logits.append(self.step(first.flip(0)))
                self.width -= 2
                for layer in self.cache.layers:
                    layer.length -= 2
        except (RuntimeError, TypeError, ValueError) as error:  # of another version's model
            if is_out_of_memory(error) or not logits:
                raise
            logits.append(torch.full_like(logits[0], torch.nan))
        finally:
            self.release()
        own, found = logits
        if not own.isfinite().all():  # of these weights; it says nothing about the model
            self._loop = None
            return
        same[self.core] = bool((found - own).norm() <= TOLERANCE * own.norm())
        self._loop = loop if same[self.core] else None

    def prefill(
        self, prompts: list[Prompt], limits: Sequence[int], shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Read all but the last token of each distinct prompt; return the last ones, `(R,)`.

        They are the first tokens to `step` with: from there on all rows are at the same column.

        Args:
            prompts: one per row, the same object for rows that share it.
            limits: the largest number of tokens each row may get.
            shape: rows x columns of the cache, at least those needed; None: those needed.
        """
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        self.width = max(len(prompt.tokens) for prompt in prompts) - 1
        longest = max(limits)
        self._pads = [self.width + 1 - len(prompt.tokens) for prompt in prompts]
        last = [prompt.tokens[-1] for prompt in prompts]
        shift = {id(prompt): self._shift(prompt) for prompt in distinct}
        ahead = [shift[id(p)] - pad for p, pad in zip(prompts, self._pads, strict=True)]
        numbers = torch.tensor([self._pads, ahead, last], device=self.device)
        self.pad, self.ahead, tokens = numbers
        self.mask = None
        if any(self._pads):
            columns = torch.arange(self.width + longest, device=self.device)
            self.mask = columns >= self.pad[:, None]
        size, capacity = shape or (len(prompts), self.width + min(longest, OPEN_ENDED))
        if self.pads:
            self.cache = RowCache(self._num_layers, capacity, self.width)
        for group in self._groups(distinct):
            cache, place = self._read(group), {id(prompt): i for i, prompt in enumerate(group)}
            if self.pads:
                if not self.cache.stores:
                    self.cache.allocate(cache, size)
                self._copy(cache, place, prompts)
            else:
                order = [place[id(prompt)] for prompt in prompts]
                cache.reorder_cache(torch.tensor(order, device=self.device))
                self.cache = cache
        if self.pads and not self.cache.stores:  # no prompt has a second token
            self.cache.allocate(self._read([Prompt([0, 0])]), size)
        if self.pads:
            for layer in self.cache.layers:
                layer.rows = len(prompts)
        self._choose_mask()
        return tokens

    def _shift(self, prompt: Prompt) -> int:
        """How much larger the position of the next token is than the number of tokens."""
        if prompt.model_input is None or self._tower is None or not self._tower.in_space:
            return 0
        return int(self._tower.places(prompt.model_input).max()) + 1 - len(prompt.tokens)

    def _copy(self, cache: RowCache, place: dict[int, int], prompts: list[Prompt]) -> None:
        """Copy the prompts in a prefill's cache to their rows.

        `place` is their row in it by id; one copy per length.
        """
        rows = [(len(p.tokens), place[id(p)], i) for i, p in enumerate(prompts) if id(p) in place]
        rows.sort()
        lengths, *pairs = zip(*rows, strict=True)
        source, into = torch.tensor(pairs, device=self.device)
        stacked, start = cache.stack(), 0
        for length, equal in itertools.groupby(lengths):
            end = start + len(list(equal))
            self.cache.copy_prompts(stacked, source[start:end], into[start:end], length - 1)
            start = end

    def _choose_mask(self) -> None:
        """Give the model a mask only while a live row has padding.

        A cache marked as static keeps transformers from asking the device whether it has.
        """
        if not any(self._pads):
            self.mask = None
        if self.pads:
            for layer in self.cache.layers:
                layer.is_compileable = self.mask is not None

    def _groups(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        """Group prompts of similar length for one prefill.

        Prompts with requested logprobs form their own groups, and so do prompts with images.
        """
        if not self.pads:
            yield prompts
            return
        group: list[Prompt] = []
        for prompt in sorted(prompts, key=_kind_and_length):
            length = len(prompt.tokens)
            if length == 1:
                continue
            if group and (
                _kind_and_length(prompt)[:2] != _kind_and_length(group[0])[:2]
                or 4 * len(group[0].tokens) < 3 * length
                or (len(group) + 1) * length > _PREFILL_TOKENS
            ):
                yield group
                group = []
            group.append(prompt)
        if group:
            yield group

    def _read(self, group: list[Prompt]) -> Any:
        """Read all but the last token of each prompt and score where requested; return the cache.

        Right-padded: under causal attention a prompt does not see the padding after it. With a
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
        first = torch.zeros(len(group), dtype=torch.int64, device=self.device)
        if self._tower is not None and any(p.model_input is not None for p in group):
            values = [p.model_input or ModelInput.from_ints(p.tokens) for p in group]
            inputs = self._tower.padded(values)
            cut = {
                name: x[..., :width] if isinstance(x, Tensor) else x for name, x in inputs.items()
            }
            # in one piece: of an image every token may see every other
            self.forward(cache, cut.pop("input_ids"), first, None, False, cut)
            return cache
        ids = torch.tensor([p.tokens + [0] * (width + 1 - len(p.tokens)) for p in group])
        ids = ids.to(self.device)
        for start in range(0, width, piece):
            end = min(start + piece, width)
            logits = self.forward(cache, ids[:, start:end], first + start, None, scored)
            if scored:
                _keep_scores(group, logits, ids[:, start + 1 : end + 1])
        for prompt in group:
            del prompt.logprobs[len(prompt.tokens) - 1 :], prompt.top[len(prompt.tokens) - 1 :]
        return cache

    def release(self) -> None:
        """Free the KV cache."""
        self.cache: Any = None

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, `(R,)`; return the next `(R, V)` logits."""
        position = self.width + self.ahead
        self.width += 1
        if self.pads and self.width > self.cache.capacity:
            self.cache.reserve(2 * self.cache.capacity)
        mask = None if self.mask is None else self.mask[:, : self.width]
        if self._loop is not None:
            return self._loop.step(self.cache, tokens, position, mask)
        return self.forward(self.cache, tokens[:, None], position, mask, False)[:, -1]

    def keep(self, order: list[int]) -> Tensor:
        """Row i becomes the former row order[i] >= i; return `order` on the device."""
        index, into, source = move_indices(order, self.device)
        if self.pads:
            self.cache.keep(len(order), into, source)
        else:
            self.cache.reorder_cache(index)
        self._pads = [self._pads[i] for i in order]
        self.ahead = self.ahead[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        self._choose_mask()
        return index

    def forward(
        self,
        cache: Any,
        ids: Tensor,
        first: Tensor,
        mask: Tensor | None,
        whole: bool,
        images: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One forward of the model.

        Args:
            cache: keys and values so far; it grows by N columns.
            ids: `(R, N)`.
            first: `(R,)`, position of column 0.
            mask: `(R, columns so far)` bool, False at padding; None without any.
            whole: return the logits of all N positions, not only of the last.
            images: further arguments of the model, in place of what they are computed to here.
        """
        extra: dict[str, Any] = {self._cache_name: cache}
        if self._takes_position_ids:
            extra["position_ids"] = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = 0 if whole else 1
        extra.update(images)
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
        if self._head is None:
            return output.logits
        hidden = output.last_hidden_state if whole else output.last_hidden_state[:, -1:]
        return self._head.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def _kind_and_length(prompt: Prompt) -> tuple[bool, bool, int]:
    """By what prompts are sorted for prefills."""
    return prompt.scored, prompt.model_input is not None, len(prompt.tokens)


def _keep_scores(group: list[Prompt], logits: Tensor, targets: Tensor) -> None:
    """Store the logprobs of `targets` `(P, N)`, from `logits` `(P, N, V)`, with their prompts."""
    top_k = max(prompt.top_k for prompt in group)
    columns = (x.tolist() for x in score(logits, targets, top_k))
    for prompt, logprobs, ids, values in zip(group, *columns, strict=True):
        prompt.logprobs += logprobs
        prompt.top += [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
