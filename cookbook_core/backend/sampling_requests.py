"""A request to sample, and its validation before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cookbook_core.datum_checks import check_data, input_problems, missing_lengths
from cookbook_core.datums import LEAST_TEMPERATURE, shift_sequence
from cookbook_core.errors import ConfigError, DatumError, is_finite, raise_all
from cookbook_core.types import Datum, ImageChunk, ModelData, ModelInput, SamplingParams

import numpy as np

MOST_SAMPLES = 65_536
"""Completions of one prompt in one request: each needs a row of state in memory."""


@dataclass(frozen=True)
class SampleRequest:
    """One prompt, the number of its completions, and which logprobs to report.

    prompt: token ids; with images, the keys of its positions (see `ModelInput.keys`).
    model_input: the prompt, if it has images.
    on_token: called with (sample, n, token) when the n-th token of a sample, from 1, has been
        drawn; by the thread that decodes, so it must neither block nor raise. Where memory ran out,
        samples start again, and so do their n.
    """

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    model_input: ModelInput | None = None
    on_token: Callable[[int, int, int], None] | None = None


@dataclass(frozen=True)
class PromptScores:
    """What a `sample` asks of its prompt of N tokens beside that, under the SDK's names.

    targets: `(N - 1, K)` int64, ids to score at the position before prompt token i + 1, -1 for
        none. alternatives: tokens to draw at each of those positions. last_n: prompt tokens whose
        own logprobs are reported; None for all.
    """

    targets: np.ndarray | None = None
    alternatives: int = 0
    last_n: int | None = None


def prompt_scores(
    request: SampleRequest,
    vocab_size: int | None,
    target_prompt_logprobs: Any,
    prompt_alt_tokens_k: Any,
    prompt_logprobs_last_n: Any,
) -> PromptScores:
    """Check the SDK's arguments of these names against a checked request.

    Raises:
        ConfigError: a value that the SDK's documentation does not allow, or does not define.
    """
    targets, rows = None, len(request.prompt) - 1
    if target_prompt_logprobs is not None:
        targets = _targets(target_prompt_logprobs, rows, vocab_size)
    k, params = prompt_alt_tokens_k, request.params
    if not _whole(k, 0):
        rule = "an integer >= 0"
        raise ConfigError("prompt_alt_tokens_k", "out of range", expected=rule, got=repr(k))
    if k and (params.temperature, params.top_k, params.top_p) != (1, -1, 1):
        raise ConfigError(
            "prompt_alt_tokens_k",
            "not defined by the SDK at another temperature than 1, nor with top_k or top_p",
            got=f"temperature {params.temperature}, top_k {params.top_k}, top_p {params.top_p}",
            fix="Request the draws beside a completion at temperature 1.",
        )
    last_n = check_last_n(prompt_logprobs_last_n, rows)
    if last_n is not None and not request.include_prompt_logprobs:
        what, fix = "without include_prompt_logprobs", "Set include_prompt_logprobs=True."
        raise ConfigError("prompt_logprobs_last_n", what, got=last_n, fix=fix)
    return PromptScores(targets, int(k), last_n)


def _targets(given: Any, rows: int, vocab_size: int | None) -> np.ndarray:
    """The ids to score, `(rows, K)`, -1 where there is none."""
    name, fix = "target_prompt_logprobs", "Pass a TensorData of dtype int64."
    if getattr(given, "dtype", None) != "int64" or not hasattr(given, "to_numpy"):
        got = f"{type(given).__name__} {given!r:.80}"
        raise ConfigError(name, "not an int64 tensor of token ids", got=got, fix=fix)
    sparse = getattr(given, "sparse_crow_indices", None) is not None
    ids = np.asarray(given.to_numpy(pad_value=-1) if sparse else given.to_numpy())
    if ids.ndim != 2 or len(ids) != rows:
        rule = f"({rows}, K): a row for each prompt token after the first"
        raise ConfigError(name, "shape does not fit the prompt", expected=rule, got=ids.shape)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, -1)
    if low < -1 or (vocab_size is not None and high >= vocab_size):
        rule = f"ids below {vocab_size}, or -1" if vocab_size else "ids, or -1"
        raise ConfigError(name, "outside the vocabulary", expected=rule, got=f"{low} to {high}")
    return ids.astype(np.int64)


def check_last_n(last_n: Any, rows: int) -> int | None:
    """Return prompt_logprobs_last_n if it is None, or in 1 to `rows` (prompt tokens - 1).

    Raises:
        ConfigError: it is not.
    """
    if last_n is not None and not _whole(last_n, 1, rows):
        rule = f"1 to {rows} (the prompt's tokens after the first), or None"
        raise ConfigError("prompt_logprobs_last_n", "out of range", expected=rule, got=repr(last_n))
    return None if last_n is None else int(last_n)


def _whole(value: Any, low: float, high: float = math.inf) -> bool:
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return bool(integer and low <= value <= high)


def check_prompt(prompt: object, where: str) -> ModelInput:
    """The prompt, as a ModelInput with text at its end.

    Raises:
        DatumError: not a ModelInput, an image without its number of positions, or one at the end.
    """
    if not isinstance(prompt, ModelInput):
        got = f"{type(prompt).__name__} {prompt!r:.80}"
        fix = "Wrap token ids with ModelInput.from_ints()."
        raise DatumError(f"{where}.prompt", "wrong type", expected="ModelInput", got=got, fix=fix)
    raise_all(missing_lengths(f"{where}.prompt", prompt))
    if prompt.chunks and isinstance(prompt.chunks[-1], ImageChunk):
        raise DatumError(
            f"{where}.prompt.chunks[{len(prompt.chunks) - 1}]",
            "the prompt ends with an image",
            expected="text as the last chunk",
            fix="Add what comes before the completion, such as the generation prompt.",
        )
    return prompt


def sampling_request(
    model: ModelData,
    prompt: object,
    num_samples: int,
    params: SamplingParams,
    include_prompt_logprobs: bool,
    topk_prompt_logprobs: int,
    topk_sample_logprobs: int = 0,
) -> SampleRequest:
    """The validated request of a `sample`.

    The arguments are those of `SamplingBackend.sample`; sizes that `model` does not know are not
    checked.

    Raises:
        DatumError, ConfigError: as for `check_prompt` and `check_request`.
    """
    checked = check_prompt(prompt, "sample")
    request = SampleRequest(
        checked.keys(),
        num_samples,
        params,
        include_prompt_logprobs,
        topk_prompt_logprobs,
        topk_sample_logprobs,
        checked if checked.images else None,
    )
    check_request(request, vocab_size=model.vocab_size, max_context_length=model.max_context_length)
    return request


def prompt_datum(model: ModelData, prompt: object, last_n: int | None = None) -> Datum:
    """The datum that a `compute_logprobs` scores: the last_n tokens after the first are targets.

    Raises:
        DatumError: not a ModelInput, fewer than 2 tokens, or tokens that do not fit the model.
        ConfigError: last_n is out of range.
    """
    model_input, targets = shift_sequence(check_prompt(prompt, "compute_logprobs"))
    wanted: dict[str, Any] = {"target_tokens": targets}
    if check_last_n(last_n, len(targets)) is not None:
        wanted["score_mask"] = np.arange(len(targets)) >= len(targets) - (last_n or 0)
    datum = Datum(model_input, wanted)
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
    ids = prompt if request.model_input is None else request.model_input.ids()
    raise_all(input_problems(f"{where}.prompt", ids, vocab_size))
    if request.model_input is not None and request.topk_prompt_logprobs:
        raise ConfigError(
            f"{where}.topk_prompt_logprobs",
            "not supported for a prompt with images",
            expected=0,
            got=request.topk_prompt_logprobs,
            fix="Name the tokens: target_prompt_logprobs.",
        )
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

    good = _whole(request.num_samples, 1, MOST_SAMPLES)
    yield "num_samples", good, f"an integer, 1 to {MOST_SAMPLES}", request.num_samples
    most = math.inf if vocab_size is None else vocab_size
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        top = getattr(request, name)
        yield name, _whole(top, 0, most), f"an integer, 0 to {most}", top
    flag = request.include_prompt_logprobs
    yield "include_prompt_logprobs", isinstance(flag, int), "True or False", flag
    longest, seed = params.max_tokens, params.seed
    good = longest is None or _whole(longest, 1)
    yield "params.max_tokens", good, "an integer >= 1, or None for the context limit", longest
    yield "params.seed", seed is None or _whole(seed, -math.inf), "an integer or None", seed
    temperature = params.temperature
    good = is_finite(temperature) and (temperature == 0 or temperature >= LEAST_TEMPERATURE)
    rule = f"0 (greedy), or finite and >= {LEAST_TEMPERATURE}"
    yield "params.temperature", good, rule, temperature
    good = is_finite(params.top_p) and 0 < params.top_p <= 1
    yield "params.top_p", good, "in (0, 1]", params.top_p
    good = _whole(params.top_k, -1, 2**62) and params.top_k != 0
    yield "params.top_k", good, ">= 1, or -1 for all tokens", params.top_k
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    good = stop is None or (
        isinstance(stop, (list, tuple))
        and (
            all(isinstance(entry, str) and entry for entry in stop)
            or all(_whole(entry, 0, most - 1) for entry in stop)
        )
    )
    rule = f"None, [], non-empty strings, or token ids in 0 to {most - 1}, not mixed"
    yield "params.stop", good, rule, params.stop
