"""Build datums: the shift by one position, truncation, side data for the loss.

A datum predicts token t+1 at position t, so a sequence of T tokens gives N = T - 1 positions:

    tokens         t0 t1 t2 ... t(T-1)
    model_input    t0 t1 ...    t(T-2)      tokens[:-1]
    target_tokens     t1 t2 ... t(T-1)      tokens[1:]
    weights           w1 w2 ... w(T-1)      weights[1:]; 0 = no loss at that position

An image takes several positions of a sequence. It is never a target: the target at a position whose
next one is an image's is 0, with a weight of 0.

Everything that belongs to a token (weights, advantages, ref_logprobs) is shifted with it. A shift
by hand in several places is an old and silent bug of this field; here it is done in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cookbook_core.errors import ConfigError, DatumError, check_choice
from cookbook_core.types import Datum, EncodedTextChunk, ImageChunk, ModelInput
from cookbook_core.types.tensors import to_array

import numpy as np

Reduction = Literal["none", "mean"]

SCORE_MASK = "score_mask"
"""Loss input `(N,)`: the unembedding skips positions where it is 0; their logprobs read 0.0 and get
no gradient."""
TEMPERATURE = "temperature"
"""Loss input `()`, > 0: logprobs are those of softmax(logits / temperature), the distribution that
sampling at it draws from; 1 where a datum has none."""
LEAST_TEMPERATURE = 1e-6
"""Smallest temperature above 0: logits divided by less overflow float32."""

_OWN_KEYS = {"logprobs": "sampling_logprobs"}
"""Loss inputs that have another name in the SDK: its name, then ours."""
BUILD = "Build datums with datum_from_tokens_weights(), which shifts both together."
"""What to do about arrays that do not fit each other."""
FINITE = "Look for 0/0 in how the weights were computed."
"""What to do about weights that are not finite."""


def shift_tokens(tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split T tokens into the model's input and its targets.

    Returns:
        `(tokens[:-1], tokens[1:])`, each T - 1 long.
    Raises:
        DatumError: fewer than 2 tokens, or not a flat list of integers.

    >>> shift_tokens([5, 6, 7])
    ([5, 6], [6, 7])
    """
    model_input, targets = shift_sequence(ModelInput.from_ints(tokens))
    return model_input.to_ints(), targets


def shift_sequence(sequence: ModelInput) -> tuple[ModelInput, list[int]]:
    """Split a sequence of T positions into the model's input and its targets.

    Returns:
        The first T - 1 positions, and T - 1 targets: 0 where the next position is an image's.
    Raises:
        DatumError: fewer than 2 positions, or an image at the end, which nothing comes after.
    """
    if sequence.length < 2:
        rule, fix = "at least 2 tokens", "Leave out empty rows."
        what = "too short to predict anything"
        raise DatumError("tokens", what, expected=rule, got=sequence.length, fix=fix)
    *chunks, last = (chunk for chunk in sequence.chunks if chunk.length)
    if isinstance(last, ImageChunk):
        raise DatumError(
            f"tokens.chunks[{len(sequence.chunks) - 1}]",
            "the sequence ends with an image, and nothing predicts an image",
            expected="text as the last chunk",
            fix="Leave the image out, or add the text that comes after it.",
        )
    if last.length > 1:
        chunks.append(EncodedTextChunk(list(last.tokens)[:-1]))
    return ModelInput(chunks), sequence.ids()[1:]


def as_sequence(tokens: Sequence[int] | ModelInput) -> ModelInput:
    """Token ids, or a ModelInput as it is."""
    return tokens if isinstance(tokens, ModelInput) else ModelInput.from_ints(tokens)


def shift_values(values: Any) -> np.ndarray:
    """Move per-token values `(T,)` onto the positions that predict those tokens: `(T - 1,)`.

    >>> shift_values([0.0, 1.0, 2.0]).tolist()
    [1.0, 2.0]
    """
    return to_array("values", values, np.dtype("float32"))[1:]


def datum_from_tokens_weights(
    tokens: Sequence[int] | ModelInput,
    weights: Sequence[float],
    max_length: int | None = None,
    *,
    reduction: Reduction = "none",
    allow_zero_weights: bool = False,
) -> Datum:
    """Build a datum that predicts each token from those before it.

    Args:
        tokens: T token ids (list, numpy or torch), or a ModelInput of T positions.
        weights: T numbers; `weights[t]` is the loss weight of *token* t (0: no loss). The first
            is dropped, since no position predicts the first token.
        max_length: keep only the first `max_length` tokens; None keeps all. An image is kept
            whole or not at all.
        reduction: "none" leaves weights as they are (losses sum over tokens); "mean" divides
            them by their sum, so that the datum's cross-entropy is a mean in nats per token.
        allow_zero_weights: accept a datum in which no token has a weight.
    Returns:
        Datum: `target_tokens` int64 `(N,)` and `weights` float32 `(N,)`,
        N = min(T, max_length) - 1.
    Raises:
        DatumError: unequal lengths, fewer than 2 tokens, a weight that is not finite, all weights
            zero after truncation, or reduction="mean" over weights that sum to zero.
        ConfigError: max_length below 2, or an unknown reduction.
    Source: name and layout of tinker-cookbook's helper. Differs: it raises for unequal lengths,
        weights that are not finite and weights that are all zero.

    >>> datum = datum_from_tokens_weights([5, 6, 7], [0, 0, 1])
    >>> datum.model_input.to_ints(), datum.loss_fn_inputs["weights"].tolist()
    ([5, 6], [0.0, 1.0])
    """
    whole = isinstance(max_length, (int, np.integer)) and max_length >= 2
    if max_length is not None and not whole:
        rule = "None or an integer >= 2"
        raise ConfigError(
            "max_length",
            "leaves nothing to predict",
            expected=rule,
            got=max_length,
            fix="Leave it out to keep all tokens.",
        )
    check_choice(ConfigError, "reduction", "unknown", reduction, ("none", "mean"))
    sequence = as_sequence(tokens)
    given = to_array("weights", weights, np.dtype("float64"))
    if given.shape != (sequence.length,):
        raise DatumError(
            "weights",
            "not one per token",
            expected=f"shape ({sequence.length},)",
            got=given.shape,
            fix="Pass one weight for every token, the first included.",
        )
    kept = sequence if max_length is None else sequence.first(max_length)
    model_input, targets = shift_sequence(kept)
    shifted = given[1 : len(targets) + 1]
    if not np.isfinite(shifted).all():
        at = int(np.flatnonzero(~np.isfinite(shifted))[0]) + 1
        raise DatumError(
            f"weights[{at}]", "not finite", expected="a finite number", got=given[at], fix=FINITE
        )
    if not shifted.any() and not allow_zero_weights:
        cut = bool(given[len(targets) + 1 :].any())
        raise DatumError(
            "weights",
            "all zero, so nothing would be trained",
            expected="a non-zero weight within max_length",
            got=f"zeros at all {len(targets)} targets",
            fix=f"max_length={max_length} cut off every weighted token: raise it, or drop and "
            "count this row."
            if cut
            else "Pass allow_zero_weights=True to keep such a datum.",
        )
    if reduction == "mean":
        if shifted.sum() == 0:
            raise DatumError(
                "weights",
                "cannot be normalised",
                expected="a non-zero sum",
                got=0.0,
                fix='Use reduction="none" for weights that cancel.',
            )
        shifted = shifted / shifted.sum()
    return Datum(model_input, {"target_tokens": targets, "weights": shifted})


def datum_from_prompt_completion(
    prompt_tokens: Sequence[int] | ModelInput,
    completion_tokens: Sequence[int],
    max_length: int | None = None,
    *,
    score_prompt: bool = True,
    **per_token: Any,
) -> Datum:
    """Build a datum whose loss is on the completion only.

    Args:
        prompt_tokens: P >= 1 ids, or a ModelInput of P positions; weight 0.
        completion_tokens: C >= 1 ids, weight 1: the ids that were sampled or rendered, never ids
            of re-encoded text.
        max_length: keep the first `max_length` of the P + C tokens.
        score_prompt: False adds "score_mask", 1 on the completion: logprobs of prompt tokens are
            then not computed and read 0.0, which saves most of the time if prompts are long and
            the vocabulary is large.
        per_token: more loss inputs by name, one value per completion token `(C,)` or one number
            for all; placed on the positions that predict those tokens, 0 on the prompt.
    Returns:
        Datum with `target_tokens`, `weights` and each name of `per_token`, all `(N,)`,
        N = min(P + C, max_length) - 1.
    Raises:
        DatumError: an empty part, a per_token array of another length, or a max_length that
            leaves no token of the completion.

    >>> datum = datum_from_prompt_completion([5, 6], [7, 8], advantages=[1.0, 2.0])
    >>> datum.loss_fn_inputs["weights"].tolist(), datum.loss_fn_inputs["advantages"].tolist()
    ([0.0, 1.0, 1.0], [0.0, 1.0, 2.0])
    """
    prompt = as_sequence(prompt_tokens)
    completion = ModelInput.from_ints(completion_tokens).to_ints()
    if not prompt.length or not completion:
        name = "completion_tokens" if prompt.length else "prompt_tokens"
        raise DatumError(
            name, "empty", expected="at least one token", got=0, fix="Leave out such rows."
        )
    rows: dict[str, Any] = {}
    for key, values in per_token.items():
        array = to_array(key, values, np.dtype("float32"))
        if array.shape not in ((), (len(completion),)):
            raise _not_per_token(key, "completion", len(completion), array.shape)
        rows[key] = [array]
    return _datum_of_turns([(prompt, completion)], max_length, score_prompt, rows)


def datum_from_turns(
    turns: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int | None = None,
    *,
    score_prompt: bool = True,
    **per_token: Any,
) -> Datum:
    """Build a datum of several answers, whose loss is on the answers only.

    Args:
        turns: S >= 1 pairs, in order: what the model was given since its last answer (for the
            first the prompt, then what `chat.reply_tokens` returns; token ids, or a ModelInput;
            weight 0), and its answer (weight 1): the ids that were sampled, never ids of
            re-encoded text. Only the prompt must have a token.
        max_length: keep the first `max_length` of all tokens.
        score_prompt: False adds "score_mask", 1 on the answers, as in
            `datum_from_prompt_completion`.
        per_token: more loss inputs by name: one number for all tokens of all answers; or a list of
            S entries, each an array `(C_s,)` aligned with the C_s tokens of that answer, or one
            number for them. They are 0 on tokens that are no answer's.
    Returns:
        Datum with `target_tokens`, `weights` and each name of `per_token`, all `(N,)`,
        N = min(number of tokens, max_length) - 1.
    Raises:
        DatumError: no turn, an empty prompt, no answer that has a token, an array of another
            length than its answer, or a max_length that leaves no token of an answer.

    >>> datum = datum_from_turns([([5, 6], [7]), ([8], [9, 4])], advantages=[1.0, [2.0, 3.0]])
    >>> datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()
    ([5, 6, 7, 8, 9], [6, 7, 8, 9, 4])
    >>> datum.loss_fn_inputs["weights"].tolist(), datum.loss_fn_inputs["advantages"].tolist()
    ([0.0, 1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 2.0, 3.0])
    """
    for i, turn in enumerate(turns):
        if len(turn) != 2:
            rule, got = "a pair (given, answer) of token ids", f"{len(turn)} parts"
            raise DatumError(f"turns[{i}]", "not a turn", expected=rule, got=got)
    parts = [
        (as_sequence(given), ModelInput.from_ints(answer).to_ints()) for given, answer in turns
    ]
    if not parts or not parts[0][0].length:
        fix = "Begin with the prompt's tokens."
        raise DatumError("turns", "no prompt", expected="at least one token", got=0, fix=fix)
    rows: dict[str, Any] = {}
    for key, values in per_token.items():
        if not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
            values = [values] * len(parts)
        if len(values) != len(parts):
            rule = f"one number, or {len(parts)} entries, one per turn"
            fix = "Give each answer its own array, [] where it has no token."
            raise DatumError(key, "not one per answer", expected=rule, got=len(values), fix=fix)
        arrays = [to_array(f"{key}[{i}]", v, np.dtype("float32")) for i, v in enumerate(values)]
        for i, (array, (_, answer)) in enumerate(zip(arrays, parts, strict=True)):
            if array.shape not in ((), (len(answer),)):
                raise _not_per_token(f"{key}[{i}]", "answer", len(answer), array.shape)
        rows[key] = arrays
    return _datum_of_turns(parts, max_length, score_prompt, rows)


def _not_per_token(key: str, of: str, length: int, shape: tuple[int, ...]) -> DatumError:
    return DatumError(
        key,
        f"not one value per {of} token",
        expected=f"shape ({length},)",
        got=shape,
        fix="Add other arrays with with_inputs().",
    )


def _datum_of_turns(
    turns: Sequence[tuple[ModelInput, list[int]]],
    max_length: int | None,
    score_prompt: bool,
    rows: dict[str, Any],
) -> Datum:
    """Join the turns' tokens; `rows` has an array `()` or `(C_s,)` for each answer."""
    chunks = [c for given, answer in turns for c in (*given.chunks, EncodedTextChunk(answer))]
    sequence = ModelInput(chunks)
    if not sequence.images:
        sequence = ModelInput.from_ints(sequence.to_ints())
    on = [x for given, answer in turns for x in (*[False] * given.length, *[True] * len(answer))]
    datum = datum_from_tokens_weights(sequence, [float(x) for x in on], max_length)
    extra: dict[str, Any] = {} if score_prompt else {SCORE_MASK: on}
    for key, arrays in rows.items():
        extra[key] = np.zeros(len(on), dtype=np.float32)
        values = [np.broadcast_to(a, len(t[1])) for a, t in zip(arrays, turns, strict=True)]
        extra[key][on] = np.concatenate(values)
    length = datum.model_input.length
    return with_inputs(datum, **{k: shift_values(v)[:length] for k, v in extra.items()})


def score_where_weighted(datum: Datum) -> Datum:
    """Add a "score_mask" that is 1 where any weight is not 0.

    A datum that has no weights, or already a mask, is returned unchanged.
    """
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None or SCORE_MASK in datum.loss_fn_inputs:
        return datum
    on = weights.to_numpy() != 0
    return with_inputs(datum, **{SCORE_MASK: on if on.ndim == 1 else on.any(axis=1)})


def with_inputs(datum: Datum, **loss_fn_inputs: Any) -> Datum:
    """Copy `datum` and add these arrays for its loss; existing names are overwritten."""
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **loss_fn_inputs})


def temperature_of(datum: Datum) -> float:
    """The temperature at which the datum is scored."""
    given = datum.loss_fn_inputs.get(TEMPERATURE)
    return 1.0 if given is None else float(given.to_numpy())


def input_key(datum: Datum, key: str) -> str:
    """The name under which `datum` has the input that the SDK calls `key`.

    The SDK calls the logprobs of the sampling policy "logprobs"; recipes call them
    "sampling_logprobs", since "logprobs" are those of the current policy.
    """
    own = _OWN_KEYS.get(key, key)
    return own if own in datum.loss_fn_inputs else key


def missing_input(where: str, datum: Datum, key: str) -> DatumError:
    """Build the DatumError for a loss input that `datum`, called `where`, lacks."""
    built = key in ("target_tokens", "weights")
    own = _OWN_KEYS.get(key, key)
    return DatumError(
        f'{where}.loss_fn_inputs["{key}"]'.removeprefix("."),
        "missing",
        expected="an array under this name",
        got=", ".join(datum.loss_fn_inputs) or "no loss inputs",
        fix=BUILD if built else f"Pass {own}=values to datum_from_prompt_completion().",
    )
