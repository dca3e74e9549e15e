"""Check datums and token ids before anything is computed; each fault names its index and field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from cookbook_core.datums import (
    BUILD,
    FINITE,
    LEAST_TEMPERATURE,
    SCORE_MASK,
    TEMPERATURE,
    input_key,
    missing_input,
)
from cookbook_core.errors import DatumError, raise_all
from cookbook_core.types import Datum, ImageChunk, ModelInput
from cookbook_core.types.tensors import TensorData

import numpy as np

_ENCODE = "Encode text with client.get_tokenizer()."


def check_data(
    data: Sequence[Datum],
    *,
    vocab_size: int | None,
    max_context_length: int | None = None,
    needs: Sequence[str] = ("target_tokens",),
) -> None:
    """Validate a batch before anything is computed.

    Args:
        data: D datums.
        vocab_size: token ids must be below it; None (not known) checks that they are >= 0.
        max_context_length: the most tokens that a model_input may have; None for no limit.
        needs: names of loss inputs that every datum must have, with N rows each.
    Raises:
        DatumError: an empty batch, or the faults of all datums with index and field: type, empty
            or too long input, missing inputs, token ids out of range, lengths of target_tokens and
            weights, weights that are not finite, a temperature out of range or on some datums only.
            Five are listed, the others counted.
    """
    if isinstance(data, Datum) or not isinstance(data, Sequence):
        raise DatumError(
            "data",
            "not a batch",
            expected="a list of Datum",
            got=type(data).__name__,
            fix="Pass [datum] for a single one.",
        )
    if not data:
        raise DatumError(
            "data",
            "empty",
            expected="at least one Datum",
            got=0,
            fix="Check what filtered the rows, such as a maximum length.",
        )
    problems = [
        problem
        for i, datum in enumerate(data)
        for problem in _datum_problems(f"data[{i}]", datum, vocab_size, max_context_length, needs)
    ]
    raise_all(problems or list(_temperature_problems(data)))


def _datum_problems(
    where: str,
    datum: Any,
    vocab_size: int | None,
    max_context_length: int | None,
    needs: Sequence[str],
) -> Iterator[DatumError]:
    if not isinstance(datum, Datum):
        fix = "Build datums with datum_from_prompt_completion()."
        yield DatumError(where, "wrong type", expected="Datum", got=type(datum).__name__, fix=fix)
        return
    missing = missing_lengths(f"{where}.model_input", datum.model_input)
    if missing:
        yield from missing
        return
    n = datum.model_input.length
    if n == 0:
        fix = "Leave out empty rows."
        yield DatumError(
            f"{where}.model_input", "empty", expected="at least one token", got=0, fix=fix
        )
        return
    if max_context_length is not None and n > max_context_length:
        yield DatumError(
            f"{where}.model_input",
            "longer than the model's context",
            expected=f"<= {max_context_length} tokens",
            got=n,
            fix="Truncate with max_length when building the datum.",
        )
        yield from _large_images(f"{where}.model_input", datum.model_input, max_context_length)
        if datum.model_input.images:  # a few bytes may claim more positions than memory holds
            return
    yield from input_problems(f"{where}.model_input", datum.model_input.ids(), vocab_size)
    for key in (input_key(datum, needed) for needed in needs):
        if key not in datum.loss_fn_inputs:
            yield missing_input(where, datum, key)
        elif key != "target_tokens" and datum.loss_fn_inputs[key].shape[:1] != [n]:
            yield DatumError(
                f'{where}.loss_fn_inputs["{key}"]',
                "length does not match model_input",
                expected=f"({n},)",
                got=tuple(datum.loss_fn_inputs[key].shape),
                fix=f"Pass {key}=values to datum_from_prompt_completion(), which shifts them.",
            )
    yield from _target_problems(where, datum, vocab_size)


def _temperature_problems(data: Sequence[Datum]) -> Iterator[DatumError]:
    """Check that temperatures are in range, and that no datum leaves its own unsaid among others.

    A batch that mixes rollouts at 0.7 with datums that state nothing is a likely mistake.
    """
    given = [datum.loss_fn_inputs.get(TEMPERATURE) for datum in data]
    stated = next((i for i, value in enumerate(given) if value is not None), None)
    if stated is None:
        return
    for i, value in enumerate(given):
        where = f'data[{i}].loss_fn_inputs["{TEMPERATURE}"]'
        if value is None:
            yield DatumError(
                where,
                f"missing, while data[{stated}] has one",
                expected="a temperature on every datum of the batch, or on none",
                fix="Add it: with_inputs(datum, temperature=1.0) scores as before.",
            )
            continue
        numbers = value.to_numpy()
        if numbers.shape or not LEAST_TEMPERATURE <= numbers < math.inf:
            yield DatumError(
                where,
                "not a temperature",
                expected=f"one number, finite and >= {LEAST_TEMPERATURE}",
                got=f"shape {numbers.shape}" if numbers.shape else float(numbers),
                fix="Pass with_inputs(datum, temperature=T) the T that its tokens were sampled at; "
                "greedy answers (T = 0) have no distribution to score.",
            )


def _target_problems(where: str, datum: Datum, vocab_size: int | None) -> Iterator[DatumError]:
    """Check target_tokens, weights and score_mask."""
    n = datum.model_input.length
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is not None:
        field = f'{where}.loss_fn_inputs["target_tokens"]'
        if len(targets.shape) not in (1, 2) or targets.shape[0] != n or 0 in targets.shape:
            yield DatumError(
                field,
                "length does not match model_input",
                expected=f"({n},) or ({n}, K)",
                got=tuple(targets.shape),
                fix=BUILD,
            )
        else:
            yield from token_problems(field, targets.to_numpy(), vocab_size)
            yield from _weight_problems(where, datum, targets)
    mask = datum.loss_fn_inputs.get(SCORE_MASK)
    if mask is not None and mask.shape != [n]:
        yield DatumError(
            f'{where}.loss_fn_inputs["{SCORE_MASK}"]',
            "not one per position",
            expected=f"({n},)",
            got=tuple(mask.shape),
            fix="Leave it out, or pass score_prompt=False to datum_from_prompt_completion().",
        )


def _weight_problems(where: str, datum: Datum, targets: TensorData) -> Iterator[DatumError]:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        return
    field = f'{where}.loss_fn_inputs["weights"]'
    if weights.shape not in (targets.shape, targets.shape[:1]):
        yield DatumError(
            field,
            "length does not match target_tokens",
            expected=f"{tuple(targets.shape)} (that of target_tokens)",
            got=tuple(weights.shape),
            fix=BUILD,
        )
        return
    values = weights.to_numpy()
    for at in np.argwhere(~np.isfinite(values))[:1].tolist():
        got = values[tuple(at)]
        yield DatumError(
            f"{field}{at}", "not finite", expected="a finite number", got=got, fix=FINITE
        )
    if datum.model_input.images:
        before_image = np.array(datum.model_input.keys()[1:]) < 0
        for at in np.argwhere(values[:-1][before_image] != 0)[:1].tolist():
            at[0] = int(np.flatnonzero(before_image)[at[0]])
            yield DatumError(
                f"{field}{at}",
                "a weight at a position whose next one is an image's",
                expected="0, since an image is not predicted",
                got=values[tuple(at)],
                fix=BUILD,
            )


def _large_images(field: str, model_input: ModelInput, most: int) -> Iterator[DatumError]:
    for j, chunk in enumerate(model_input.chunks):
        if isinstance(chunk, ImageChunk) and chunk.length > most:
            yield DatumError(
                f"{field}.chunks[{j}]",
                "an image that alone is longer than the model's context",
                expected=f"<= {most} positions",
                got=chunk.length,
                fix="Resize it, and count again.",
            )


def missing_lengths(field: str, model_input: ModelInput) -> list[DatumError]:
    """Report each image whose number of positions is not known."""
    return [
        DatumError(
            f"{field}.chunks[{j}].expected_tokens",
            "missing, so the length is not known",
            expected="the number of positions that the image takes",
            fix="Make the chunk with the model's ImageReader, which counts them.",
        )
        for j, chunk in enumerate(model_input.chunks)
        if isinstance(chunk, ImageChunk) and chunk.expected_tokens is None
    ]


def input_problems(field: str, ids: list[int], vocab_size: int | None) -> list[DatumError]:
    """Check that ids are integers within the vocabulary; report the first that is not."""
    for at, token in enumerate(ids):  # EncodedTextChunk does not check its items
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            where, rule = f"{field}[{at}]", "an integer"
            return [
                DatumError(where, "not a token id", expected=rule, got=repr(token), fix=_ENCODE)
            ]
    return token_problems(field, np.asarray(ids), vocab_size)


def token_problems(field: str, ids: np.ndarray, vocab_size: int | None) -> list[DatumError]:
    """Check that 0 <= id < vocab_size (None: unknown); report the first id that is not."""
    bad = np.argwhere((ids < 0) | (ids >= (math.inf if vocab_size is None else vocab_size)))
    if not len(bad):
        return []
    at = tuple(int(j) for j in bad[0])
    fix = _ENCODE
    if ids[at] < 0:
        fix = "Use any valid id where there is no loss, with a weight of 0."
    return [
        DatumError(
            f"{field}{list(at)}",
            "token id outside the vocabulary",
            expected="an id >= 0" if vocab_size is None else f"0 <= id < {vocab_size}",
            got=int(ids[at]),
            fix=fix,
        )
    ]
