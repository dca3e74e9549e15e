"""A request to sample, and the checks it must pass before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cookbook_core.errors import ConfigError, DatumError, message, raise_all
from cookbook_core.tinker.types import SamplingParams


@dataclass(frozen=True)
class SampleRequest:
    """One prompt, how many completions of it, and what to report about the prompt."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0


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

    def whole(value: Any, low: float, high: float = math.inf) -> bool:
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return bool(integer and low <= value <= high)

    def real(value: Any) -> bool:
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return bool(number and math.isfinite(value))

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
