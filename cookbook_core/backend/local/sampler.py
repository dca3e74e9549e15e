"""Generation with logprobs: pure functions over a Hugging Face causal language model.

`sample_batch` decodes any mix of requests in one loop. Rows are left-padded to the longest prompt,
so that the newest token of every row is in the same column and a sliding window measured in
columns is one measured in positions. Each distinct prompt is read once; its keys and values are
copied to all of its samples. Rows that stop leave the batch.

    prompts -> _prefill -> cache, logits -> _decode: draw, append, step -> SampleResponse

Two caches. Models whose layers are all plain or sliding-window attention use `RowCache`, allocated
ahead and compacted in place. Anything else transformers can cache (state-space, convolution and
hybrid layers) uses transformers' own DynamicCache, prompts of one length at a time, unpadded.
The model folder's generation_config is never read.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from cookbook_core.backend.local.sampling_math import (
    Knobs,
    StopRule,
    TextWatch,
    Uniforms,
    draw_tokens,
    eos_ids,
    score,
)
from cookbook_core.errors import ConfigError, DatumError, ModelError, message, raise_all
from cookbook_core.tinker.types import SampledSequence, SampleResponse, SamplingParams

_OPEN_ENDED = 1024  # tokens that max_tokens=None is taken to need when requests are batched
_PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass
_SCORE_ELEMENTS = 2**25  # most logits alive while prompts are scored


@dataclass(frozen=True)
class SampleRequest:
    """One prompt, how many completions of it, and what to report about the prompt."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0


# ---- checks -------------------------------------------------------------------------------------


def check_request(
    request: SampleRequest, *, vocab_size: int, max_context: int | None, where: str = "sample"
) -> None:
    """Refuse a request that cannot be served, before any work is done.

    Args:
        request: what to check.
        vocab_size: ids must be below this.
        max_context: most tokens of prompt and completion together; None for no limit.
        where: how errors call the request.

    Raises:
        DatumError: the prompt is empty or holds an id outside the vocabulary.
        ConfigError: any other value that cannot work.
    """
    prompt, params = request.prompt, request.params
    if not prompt:
        raise DatumError(message(f"{where}.prompt", "is empty", "at least 1 token", "0"))
    outside = [i for i, token in enumerate(prompt) if not 0 <= token < vocab_size]
    raise_all(
        DatumError,
        [
            message(
                f"{where}.prompt[{i}]",
                "token id outside the vocabulary",
                f"0 to {vocab_size - 1}",
                prompt[i],
                "Encode the prompt with this model's own tokenizer.",
            )
            for i in outside
        ],
    )
    problems = [
        message(f"{where}.{name}", "cannot work", expected, repr(got))
        for name, good, expected, got in _parameter_checks(request, vocab_size)
        if not good
    ]
    raise_all(ConfigError, problems)
    if max_context is not None and len(prompt) + (params.max_tokens or 1) > max_context:
        raise ConfigError(
            message(
                f"{where}.params.max_tokens",
                "prompt and completion do not fit the model's context",
                f"at most {max_context} tokens in all",
                f"{len(prompt)} (prompt) + {params.max_tokens or 'at least 1'}",
                "Shorten the prompt or lower max_tokens.",
            )
        )
    if max_context is None and params.max_tokens is None:
        raise ConfigError(
            message(
                f"{where}.params.max_tokens",
                "nothing bounds the completion",
                "a number, since this model states no context limit",
                None,
            )
        )


def _parameter_checks(
    request: SampleRequest, vocab_size: int
) -> Iterator[tuple[str, bool, str, Any]]:
    """Yield (field, is it good, the rule, the value) for everything but the prompt."""
    params = request.params

    def whole(value: Any, low: int, high: float = math.inf) -> bool:
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return integer and low <= value <= high

    def real(value: Any) -> bool:
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return number and math.isfinite(value)

    yield "num_samples", whole(request.num_samples, 1), "an integer >= 1", request.num_samples
    top = request.topk_prompt_logprobs
    yield "topk_prompt_logprobs", whole(top, 0, vocab_size), f"0 to {vocab_size}", top
    longest, seed = params.max_tokens, params.seed
    good = longest is None or whole(longest, 1)
    yield "params.max_tokens", good, "an integer >= 1, or None for the context limit", longest
    yield "params.seed", seed is None or whole(seed, -math.inf), "an integer or None", seed
    good = real(params.temperature) and params.temperature >= 0
    yield "params.temperature", good, "finite and >= 0 (0 is greedy)", params.temperature
    good = real(params.top_p) and 0 < params.top_p <= 1
    yield "params.top_p", good, "in (0, 1]", params.top_p
    good = whole(params.top_k, 1) or params.top_k == -1
    yield "params.top_k", good, ">= 1, or -1 for all tokens", params.top_k
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    good = stop is None or (
        isinstance(stop, (list, tuple))
        and (
            all(isinstance(entry, str) and entry for entry in stop)
            or all(whole(entry, 0, vocab_size - 1) for entry in stop)
        )
    )
    rule = f"None, [], non-empty strings, or token ids in 0 to {vocab_size - 1}, not mixed"
    yield "params.stop", good, rule, params.stop


# ---- the cache ----------------------------------------------------------------------------------


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head_dim)`, allocated ahead.

    Sliding-window layers keep all columns too: transformers' mask hides the old ones.
    """

    def __init__(self, capacity: int, length: int) -> None:
        super().__init__()
        self.capacity, self.length, self.rows = capacity, length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the rows of these states. Zeros: padding is masked but must be finite."""
        self.rows = key_states.shape[0]
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all columns of the live rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.capacity:
            self.reserve(max(self.length, 2 * self.capacity))
        self.keys[: self.rows, :, start : self.length] = key_states
        self.values[: self.rows, :, start : self.length] = value_states
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def reserve(self, capacity: int) -> None:
        """Move the live rows to a longer allocation."""
        more = (0, 0, 0, capacity - self.capacity)
        self.keys = torch.nn.functional.pad(self.keys[: self.rows], more)
        self.values = torch.nn.functional.pad(self.values[: self.rows], more)
        self.capacity = capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """A `RowLayer` per layer of the model."""

    def __init__(self, num_layers: int, capacity: int, length: int = 0) -> None:
        super().__init__(layers=[RowLayer(capacity, length) for _ in range(num_layers)])

    def adopt(self, other: RowCache, row: int, into: list[int], total: int, start: int) -> None:
        """Copy one prompt to rows of this cache.

        Args:
            other: a cache filled by one prefill, and the `row` of it to copy.
            into: the rows of this cache that continue this prompt.
            total: rows of this cache in all.
            start: its first column; the columns from there on are copied.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not theirs.is_initialized:  # a layer that reads another layer's cache
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(
                    *(x[:1].expand(total, -1, -1, -1) for x in (theirs.keys, theirs.values))
                )
            columns = mine.length - start
            mine.keys[into, :, start : mine.length] = theirs.keys[row, :, :columns]
            mine.values[into, :, start : mine.length] = theirs.values[row, :, :columns]

    def keep(self, order: list[int]) -> None:
        """Keep `len(order)` rows, row i being what row order[i] >= i was."""
        moved = [i for i, source in enumerate(order) if source != i]
        for layer in self.layers:
            if layer.is_initialized:
                layer.rows = len(order)
                if moved:
                    source = [order[i] for i in moved]
                    layer.keys[moved, :, : layer.length] = layer.keys[source, :, : layer.length]
                    layer.values[moved, :, : layer.length] = layer.values[source, :, : layer.length]


# ---- rows ---------------------------------------------------------------------------------------


@dataclass
class _Prompt:
    """A distinct prompt: its ids and, once read, what was asked about it."""

    tokens: list[int]
    scored: bool = False
    top_k: int = 0
    logprobs: list[float] = field(default_factory=list)  # of tokens[1:]
    top: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class _Row:
    """One sample in the making."""

    prompt: _Prompt
    params: SamplingParams
    limit: int
    stop: StopRule
    uniforms: Uniforms
    watch: TextWatch | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str = ""

    def push(self, token: int, logprob: float) -> bool:
        """Append a token; returns whether the row ends with it."""
        if not math.isfinite(logprob):
            raise ModelError(
                message(
                    "sample",
                    "the model's output is not finite",
                    "finite logits",
                    f"logprob {logprob} at completion token {len(self.tokens)}",
                    "Training has diverged, or the dtype overflows.",
                )
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stop.ids or (self.watch is not None and self.watch.found(self.tokens)):
            self.stop_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.stop_reason = "length"
        return bool(self.stop_reason)

    def result(self) -> SampledSequence:
        return SampledSequence(
            stop_reason=self.stop_reason,
            sequence_id=uuid.uuid4().hex,
            tokens_np=np.array(self.tokens, dtype=np.int64),
            logprobs_np=np.array(self.logprobs),
        )


# ---- public -------------------------------------------------------------------------------------


def context_limit(model: Any) -> int | None:
    """Most positions the model's config allows; None when it names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def sample_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[SampleRequest],
    *,
    generator: torch.Generator | None = None,
    max_context: int | None = None,
    token_budget: int = 65_536,
) -> list[SampleResponse]:
    """Decode all requests together.

    A request with a seed gives sample j the tokens that (seed, j) fixes, whatever else is in the
    batch (up to float ties: batch shapes move logits in the last bits). Temperature 0 is greedy;
    its logprobs are those at temperature 1.

    Args:
        model: causal LM, or a PeftModel with the wanted LoRA active. Left as it was.
        tokenizer: for `stop=None` (see `eos_ids`) and for stop strings.
        requests: checked here, before any work.
        generator: one number is drawn from it per request without a seed; None: torch's global.
        max_context: tokens of prompt and completion together; None: the model config's limit.
        token_budget: most rows x columns of one cache; more rows wait for the next loop. An
            open-ended request (max_tokens None) counts as 1024 tokens.

    Returns:
        One response per request, in order; logprobs in nats.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    max_context = max_context or context_limit(core)
    vocab_size = core.config.get_text_config(decoder=True).vocab_size
    for i, request in enumerate(requests):
        check_request(
            request, vocab_size=vocab_size, max_context=max_context, where=f"requests[{i}]"
        )
    eos = eos_ids(tokenizer, core.config)
    prompts: dict[tuple[int, ...], _Prompt] = {}
    rows: list[list[_Row]] = []
    for request in requests:
        prompt = prompts.setdefault(tuple(request.prompt), _Prompt(list(request.prompt)))
        prompt.top_k = max(prompt.top_k, request.topk_prompt_logprobs)
        prompt.scored |= request.include_prompt_logprobs or prompt.top_k > 0
        rows.append(_rows_of(request, prompt, tokenizer, eos, generator, max_context))
    with _undisturbed(core):
        stepper = _Stepper(core)
        for wave in _waves([row for group in rows for row in group], stepper, token_budget):
            _decode(stepper, wave)
    return [
        _response(request, prompts[tuple(request.prompt)], group)
        for request, group in zip(requests, rows, strict=True)
    ]


def _rows_of(
    request: SampleRequest,
    prompt: _Prompt,
    tokenizer: Any,
    eos: frozenset[int],
    generator: torch.Generator | None,
    max_context: int | None,
) -> list[_Row]:
    """The samples of one request, ready to decode."""
    params, seed = request.params, request.params.seed
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    stop = StopRule.of(params.stop, eos)
    limit = params.max_tokens or (max_context or 0) - len(request.prompt)
    return [
        _Row(
            prompt=prompt,
            params=params,
            limit=limit,
            stop=stop,
            uniforms=Uniforms(seed, sample),
            watch=TextWatch(stop.strings, tokenizer) if stop.strings else None,
        )
        for sample in range(request.num_samples)
    ]


def _response(request: SampleRequest, prompt: _Prompt, rows: list[_Row]) -> SampleResponse:
    k = request.topk_prompt_logprobs
    return SampleResponse(
        sequences=[row.result() for row in rows],
        prompt_logprobs=[None, *prompt.logprobs] if request.include_prompt_logprobs else None,
        topk_prompt_logprobs=[None, *(top[:k] for top in prompt.top)] if k else None,
    )


@contextlib.contextmanager
def _undisturbed(core: Any) -> Iterator[None]:
    """No gradients and no dropout inside; every module's mode as before afterwards."""
    training = [module for module in core.modules() if module.training]
    core.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# ---- the loop -----------------------------------------------------------------------------------


def _waves(rows: list[_Row], stepper: _Stepper, token_budget: int) -> Iterator[list[_Row]]:
    """Split rows into loops whose caches fit the budget; samples of one prompt stay together.

    Prompts are taken shortest first, so that rows of like length share a loop.
    """
    rows = sorted(rows, key=lambda row: (len(row.prompt.tokens), row.prompt.tokens))
    wave: list[_Row] = []
    widest = 0
    for row in rows:
        needed = len(row.prompt.tokens) + min(row.limit, max(_OPEN_ENDED, row.params.max_tokens or 0))
        uneven = wave and len(wave[0].prompt.tokens) != len(row.prompt.tokens)
        widest = max(widest, needed)
        if wave and ((len(wave) + 1) * widest > token_budget or (uneven and not stepper.pads)):
            yield wave
            wave, widest = [], needed
        wave.append(row)
    if wave:
        yield wave


def _decode(stepper: _Stepper, rows: list[_Row]) -> None:
    """Read the prompts of `rows`, then sample until every row has stopped."""
    logits = stepper.start(rows)
    device = logits.device
    knobs = Knobs.of([row.params for row in rows], device)
    while True:
        uniforms = torch.tensor([row.uniforms.next() for row in rows], dtype=torch.float64)
        tokens, logprobs = draw_tokens(logits, uniforms.to(device), knobs)
        # Ids are exact in float64: one transfer for both.
        drawn = torch.stack([tokens.double(), logprobs.double()]).tolist()
        ended = [
            row.push(int(token), logprob)
            for row, token, logprob in zip(rows, *drawn, strict=True)
        ]
        if any(ended):
            order = _close_gaps(ended)
            if not order:
                return
            rows = [rows[i] for i in order]
            stepper.keep(order)
            tokens = tokens[order]
            knobs = Knobs.of([row.params for row in rows], device)
        logits = stepper.step(tokens)


def _close_gaps(ended: list[bool]) -> list[int]:
    """Which old row each remaining row is: those that stay in place do, the last fill the gaps."""
    alive = [i for i, end in enumerate(ended) if not end]
    late = [i for i in alive if i >= len(alive)]
    return [late.pop() if ended[i] else i for i in range(len(alive))]


class _Stepper:
    """The model, its cache and the layout of the rows in it.

    pads: whether this model's layers allow prompts of different lengths in one cache.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.config = core.config.get_text_config(decoder=True)
        self.device = core.get_input_embeddings().weight.device
        known = inspect.signature(core.forward).parameters
        self._takes_position_ids = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known
        layers = DynamicCache(config=self.config).layers
        self._num_layers = len(layers)
        self.pads = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)

    def start(self, rows: list[_Row]) -> Tensor:
        """Read each distinct prompt of `rows` once; returns the `(R, V)` logits after them.

        All but the last token of each prompt is read by `_prefill`; the last tokens make the first
        step of the loop, where every row is at the same column.
        """
        prompts = [row.prompt for row in rows]
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        self.width = max(len(prompt.tokens) for prompt in prompts) - 1
        longest = max(row.limit for row in rows)
        self.pad = torch.tensor([self.width + 1 - len(prompt.tokens) for prompt in prompts])
        self.pad = self.pad.to(self.device)
        self.mask = None
        if self.pad.any():
            columns = torch.arange(self.width + longest, device=self.device)
            self.mask = columns >= self.pad[:, None]
        if self.pads:
            capacity = self.width + min(longest, _OPEN_ENDED)
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
                self.cache.adopt(cache, i, into, len(rows), self.width + 1 - len(prompt.tokens))
        return self.step(torch.tensor([p.tokens[-1] for p in prompts], device=self.device))

    def _groups(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Prompts to read in one pass: like lengths, scored ones apart."""
        if not self.pads:
            yield prompts
            return
        group: list[_Prompt] = []
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

    def _prefill(self, group: list[_Prompt]) -> Any:
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
            self.cache.reorder_cache(index)
        self.pad = self.pad[index]
        if self.mask is not None:
            self.mask = self.mask[index]

    def _forward(
        self, cache: Any, ids: Tensor, first: Tensor, mask: Tensor | None, whole: bool
    ) -> Tensor:
        """One pass of the model.

        Args:
            ids: `(R, N)`. first: `(R,)`, position of column 0.
            mask: `(R, columns so far)` bool, False at padding; None without any.
            whole: logits of all N positions, not of the last alone.
        """
        extra: dict[str, Any] = {}
        if self._takes_position_ids:
            extra["position_ids"] = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = 0 if whole else 1
        return self.core(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        ).logits


def _keep_scores(group: list[_Prompt], logits: Tensor, targets: Tensor) -> None:
    """Store the logprobs of `targets` `(P, N)` given `logits` `(P, N, V)` with their prompts."""
    top_k = max(prompt.top_k for prompt in group)
    logprobs, ids, values = score(logits, targets, top_k)
    for i, prompt in enumerate(group):
        prompt.logprobs += logprobs[i].tolist()
        pairs = zip(ids[i].tolist(), values[i].tolist(), strict=True)
        prompt.top += [list(zip(*pair, strict=True)) for pair in pairs]
