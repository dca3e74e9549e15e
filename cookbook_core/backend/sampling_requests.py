"""A request to sample, and its validation before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cookbook_core.datums import check_data, input_problems, shift_tokens
from cookbook_core.errors import ConfigError, DatumError, is_finite, raise_all
from cookbook_core.types import Datum, ModelData, ModelInput, SamplingParams

MOST_SAMPLES = 65_536
"""Completions of one prompt in one request: each needs a row of state in memory."""
LEAST_TEMPERATURE = 1e-6
"""Smallest temperature above 0: logits divided by less overflow float32."""


@dataclass(frozen=True)
class SampleRequest:
    """One prompt, the number of its completions, and which logprobs of the prompt to report.

    on_token: called with (sample, n, token) when the n-th token of a sample, from 1, has been
        drawn; by the thread that decodes, so it must neither block nor raise. Where memory ran out,
        samples start again, and so do their n.
    """

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    on_token: Callable[[int, int, int], None] | None = None


def check_prompt(prompt: object, where: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
        DatumError: not a ModelInput.
    """
    if not isinstance(prompt, ModelInput):
        got = f"{type(prompt).__name__} {prompt!r:.80}"
        fix = "Wrap token ids with ModelInput.from_ints()."
        raise DatumError(f"{where}.prompt", "wrong type", expected="ModelInput", got=got, fix=fix)
    return prompt.to_ints()


def sampling_request(
    model: ModelData,
    prompt: object,
    num_samples: int,
    params: SamplingParams,
    include_prompt_logprobs: bool,
    topk_prompt_logprobs: int,
) -> SampleRequest:
    """The validated request of a `sample`.

    The arguments are those of `SamplingBackend.sample`; sizes that `model` does not know are not
    checked.

    Raises:
        DatumError, ConfigError: as for `check_prompt` and `check_request`.
    """
    ids = check_prompt(prompt, "sample")
    request = SampleRequest(ids, num_samples, params, include_prompt_logprobs, topk_prompt_logprobs)
    check_request(request, vocab_size=model.vocab_size, max_context_length=model.max_context_length)
    return request


def prompt_datum(model: ModelData, prompt: object) -> Datum:
    """The datum that a `compute_logprobs` scores: every token after the first is a target.

    Raises:
        DatumError: not a ModelInput, fewer than 2 tokens, or tokens that do not fit the model.
    """
    inputs, targets = shift_tokens(check_prompt(prompt, "compute_logprobs"))
    datum = Datum(ModelInput.from_ints(inputs), {"target_tokens": targets})
    check_data([datum], vocab_size=model.vocab_size, max_context_length=model.max_context_length)
    return datum


def check_request(
    request: SampleRequest,
    *,
    vocab_size: int | None,
    max_context_length: int | None,
    where: str = "sample",
) -> None:
    """Validate a request before any work is done.

    Args:
        request: the request.
        vocab_size: ids must be below this; None if it is unknown.
        max_context_length: most tokens of prompt and completion together; None for no limit.
        where: the request's name in errors.

    Raises:
        DatumError: the prompt is empty or has an id outside the vocabulary.
        ConfigError: another value is invalid.
    """
    prompt, params = request.prompt, request.params
    if not prompt:
        fix = "Start it with the model's first token (bos) or a chat template."
        raise DatumError(f"{where}.prompt", "is empty", expected="at least 1 token", fix=fix)
    raise_all(input_problems(f"{where}.prompt", prompt, vocab_size))
    if not isinstance(params, SamplingParams):
        got = f"{type(params).__name__} {params!r:.80}"
        raise ConfigError(
            f"{where}.params",
            "wrong type",
            expected="SamplingParams",
            got=got,
            fix="Pass tinker.SamplingParams(max_tokens=...).",
        )
    problems = [
        ConfigError(f"{where}.{name}", "invalid value", expected=expected, got=repr(got))
        for name, good, expected, got in _parameter_checks(request, vocab_size)
        if not good
    ]
    raise_all(problems)
    if (
        max_context_length is not None
        and len(prompt) + (params.max_tokens or 1) > max_context_length
    ):
        raise ConfigError(
            f"{where}.params.max_tokens",
            "prompt and completion do not fit the model's context",
            expected=f"at most {max_context_length} tokens in all",
            got=f"{len(prompt)} (prompt) + {params.max_tokens or 'at least 1'}",
            fix="Shorten the prompt or lower max_tokens.",
        )
    if max_context_length is None and params.max_tokens is None:
        raise ConfigError(
            f"{where}.params.max_tokens",
            "missing: this model states no context limit, so nothing bounds the completion",
            fix="Pass max_tokens.",
        )


def _parameter_checks(
    request: SampleRequest, vocab_size: int | None
) -> Iterator[tuple[str, bool, str, Any]]:
    """Yield (field, whether it is valid, the rule, the value) for everything but the prompt."""
    params = request.params

    def whole(value: Any, low: float, high: float = math.inf) -> bool:
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return bool(integer and low <= value <= high)

    good = whole(request.num_samples, 1, MOST_SAMPLES)
    yield "num_samples", good, f"an integer, 1 to {MOST_SAMPLES}", request.num_samples
    top = request.topk_prompt_logprobs
    most = math.inf if vocab_size is None else vocab_size
    yield "topk_prompt_logprobs", whole(top, 0, most), f"an integer, 0 to {most}", top
    flag = request.include_prompt_logprobs
    yield "include_prompt_logprobs", isinstance(flag, int), "True or False", flag
    longest, seed = params.max_tokens, params.seed
    good = longest is None or whole(longest, 1)
    yield "params.max_tokens", good, "an integer >= 1, or None for the context limit", longest
    yield "params.seed", seed is None or whole(seed, -math.inf), "an integer or None", seed
    temperature = params.temperature
    good = is_finite(temperature) and (temperature == 0 or temperature >= LEAST_TEMPERATURE)
    rule = f"0 (greedy), or finite and >= {LEAST_TEMPERATURE}"
    yield "params.temperature", good, rule, temperature
    good = is_finite(params.top_p) and 0 < params.top_p <= 1
    yield "params.top_p", good, "in (0, 1]", params.top_p
    good = whole(params.top_k, -1, 2**62) and params.top_k != 0
    yield "params.top_k", good, ">= 1, or -1 for all tokens", params.top_k
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    good = stop is None or (
        isinstance(stop, (list, tuple))
        and (
            all(isinstance(entry, str) and entry for entry in stop)
            or all(whole(entry, 0, most - 1) for entry in stop)
        )
    )
    rule = f"None, [], non-empty strings, or token ids in 0 to {most - 1}, not mixed"
    yield "params.stop", good, rule, params.stop
