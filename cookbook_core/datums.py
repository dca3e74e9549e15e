"""Tokens and weights in, datums out: the shift by one position, truncation, and the checks.

A datum predicts token t+1 at position t. So a sequence of T tokens gives N = T - 1 positions:

    tokens         t0 t1 t2 ... t(T-1)
    model_input    t0 t1 ...    t(T-2)      tokens[:-1]
    target_tokens     t1 t2 ... t(T-1)      tokens[1:]
    weights           w1 w2 ... w(T-1)      weights[1:]; 0 = no loss at that position

Everything that belongs to a token (weights, advantages, ref_logprobs) is shifted with it. Doing
that by hand, in several places, is the field's oldest silent bug; here it is done once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cookbook_core.errors import ConfigError, DatumError, check_choice, raise_all
from cookbook_core.types import Datum, ModelInput
from cookbook_core.types.tensors import TensorData, to_array

Reduction = Literal["none", "mean"]

SCORE_MASK = "score_mask"
"""Loss input `(N,)`: positions where it is 0 are not put through the unembedding; their logprobs
read 0.0 and get no gradient."""


def shift_tokens(tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split T tokens into what the model reads and what it must predict.

    Returns:
        `(tokens[:-1], tokens[1:])`, each T - 1 long.
    Raises:
        DatumError: fewer than 2 tokens, or not a flat list of integers.

    >>> shift_tokens([5, 6, 7])
    ([5, 6], [6, 7])
    """
    ids = ModelInput.from_ints(tokens).to_ints()
    if len(ids) < 2:
        raise DatumError(
            "tokens", "too short to predict anything", expected="at least 2 tokens", got=len(ids)
        )
    return ids[:-1], ids[1:]


def shift_values(values: Any) -> np.ndarray:
    """Move per-token values `(T,)` onto the positions that predict those tokens: `(T - 1,)`.

    >>> shift_values([0.0, 1.0, 2.0]).tolist()
    [1.0, 2.0]
    """
    return to_array("values", values, np.dtype("float32"))[1:]


def datum_from_tokens_weights(
    tokens: Sequence[int],
    weights: Sequence[float],
    max_length: int | None = None,
    *,
    reduction: Reduction = "none",
    allow_zero_weights: bool = False,
) -> Datum:
    """Build the datum that predicts each token from those before it.

    Args:
        tokens: T token ids (list, numpy or torch).
        weights: T numbers; `weights[t]` is the loss weight of *token* t (0: no loss). The first
            is dropped with the first token, which nothing predicts.
        max_length: keep only the first `max_length` tokens; None keeps all.
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
    Source: name and layout as in tinker-cookbook's helper of this name. Differs: it refuses what
        that one lets through.

    >>> datum = datum_from_tokens_weights([5, 6, 7], [0, 0, 1])
    >>> datum.model_input.to_ints(), datum.loss_fn_inputs["weights"].tolist()
    ([5, 6], [0.0, 1.0])
    """
    whole = isinstance(max_length, (int, np.integer)) and max_length >= 2
    if max_length is not None and not whole:
        rule = "None or an integer >= 2"
        raise ConfigError("max_length", "leaves nothing to predict", expected=rule, got=max_length)
    check_choice(ConfigError, "reduction", "unknown", reduction, ("none", "mean"))
    tokens = ModelInput.from_ints(tokens).to_ints()
    given = to_array("weights", weights, np.dtype("float64"))
    if given.shape != (len(tokens),):
        raise DatumError(
            "weights", "not one per token", expected=f"shape ({len(tokens)},)", got=given.shape
        )
    inputs, targets = shift_tokens(tokens[:max_length])
    kept = given[1 : len(targets) + 1]
    if not np.isfinite(kept).all():
        at = int(np.flatnonzero(~np.isfinite(kept))[0]) + 1
        raise DatumError(f"weights[{at}]", "not finite", expected="a finite number", got=given[at])
    if not kept.any() and not allow_zero_weights:
        cut = bool(given[len(targets) + 1 :].any())
        raise DatumError(
            "weights",
            "all zero, so nothing would be trained",
            expected="a non-zero weight among the kept tokens",
            got=f"zeros at all {len(targets)} targets",
            fix=f"max_length={max_length} cut off every weighted token: raise it, or drop and "
            "count this row."
            if cut
            else "Pass allow_zero_weights=True if that is meant.",
        )
    if reduction == "mean":
        if kept.sum() == 0:
            raise DatumError("weights", "cannot be normalised", expected="a non-zero sum", got=0.0)
        kept = kept / kept.sum()
    return Datum(ModelInput.from_ints(inputs), {"target_tokens": targets, "weights": kept})


def datum_from_prompt_completion(
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[int],
    max_length: int | None = None,
    *,
    score_prompt: bool = True,
    **per_token: Any,
) -> Datum:
    """Build a datum whose loss is on the completion only.

    Args:
        prompt_tokens: P >= 1 ids, weight 0.
        completion_tokens: C >= 1 ids, weight 1: the ids that were sampled or rendered, never ids
            of re-encoded text.
        max_length: keep the first `max_length` of the P + C tokens.
        score_prompt: False adds "score_mask", 1 on the completion: logprobs of prompt tokens are
            then not computed and read 0.0, which saves most of the time where prompts are long
            and vocabularies large.
        per_token: more loss inputs by name, one value per completion token `(C,)` or one number
            for all; placed on the positions that predict those tokens, 0 on the prompt.
    Returns:
        Datum with `target_tokens`, `weights` and each name of `per_token`, all `(N,)`,
        N = min(P + C, max_length) - 1.
    Raises:
        DatumError: an empty part, a per_token array of another length, or a completion that
            max_length cuts off whole.
    """
    prompt = ModelInput.from_ints(prompt_tokens).to_ints()
    completion = ModelInput.from_ints(completion_tokens).to_ints()
    if not prompt or not completion:
        name = "completion_tokens" if prompt else "prompt_tokens"
        raise DatumError(name, "empty", expected="at least one token", got=0)
    weights = [0.0] * len(prompt) + [1.0] * len(completion)
    datum = datum_from_tokens_weights(prompt + completion, weights, max_length)
    extra: dict[str, Any] = {}
    if not score_prompt:
        extra[SCORE_MASK] = shift_values(weights)[: datum.model_input.length]
    for key, values in per_token.items():
        array = to_array(key, values, np.dtype("float32"))
        if array.shape not in ((), (len(completion),)):
            raise DatumError(
                key,
                "not one value per completion token",
                expected=f"shape ({len(completion)},)",
                got=array.shape,
            )
        row = np.zeros(len(weights), dtype=np.float32)
        row[len(prompt) :] = array
        extra[key] = shift_values(row)[: datum.model_input.length]
    return with_inputs(datum, **extra)


def score_where_weighted(datum: Datum) -> Datum:
    """The datum with a "score_mask" where any weight is not 0; as it is, if it has no weights or
    already a mask."""
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None or SCORE_MASK in datum.loss_fn_inputs:
        return datum
    on = weights.to_numpy() != 0
    return with_inputs(datum, **{SCORE_MASK: on if on.ndim == 1 else on.any(axis=1)})


def with_inputs(datum: Datum, **loss_fn_inputs: Any) -> Datum:
    """A copy of `datum` that also carries these arrays for its loss (model_input untouched)."""
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **loss_fn_inputs})


def check_data(
    data: Sequence[Datum],
    *,
    vocab_size: int | None,
    max_context: int | None = None,
    needs: Sequence[str] = ("target_tokens",),
) -> None:
    """Refuse a batch that cannot be trained on, before anything has changed.

    Checks every datum and reports the first five faults: type, empty input, missing inputs
    (`needs`), token ids outside [0, vocab_size) (below 0, where it is None: not known), context
    length, lengths of target_tokens and of weights, weights that are not finite.

    Raises:
        DatumError: naming datum index and field for each fault; also for an empty batch.
    """
    if isinstance(data, Datum) or not isinstance(data, Sequence):
        raise DatumError("data", "not a batch", expected="a list of Datum", got=type(data).__name__)
    if not data:
        raise DatumError("data", "empty", expected="at least one Datum", got=0)
    problems: list[DatumError] = []
    for i, datum in enumerate(data):
        if not isinstance(datum, Datum):
            problems.append(
                DatumError(f"data[{i}]", "wrong type", expected="Datum", got=type(datum).__name__)
            )
            continue
        problems += _datum_problems(f"data[{i}]", datum, vocab_size, max_context, needs)
    raise_all(problems)


def _datum_problems(
    where: str, datum: Datum, vocab_size: int | None, max_context: int | None, needs: Sequence[str]
) -> list[DatumError]:
    problems: list[DatumError] = []
    n = datum.model_input.length
    if n == 0:
        return [DatumError(f"{where}.model_input", "empty", expected="at least one token", got=0)]
    if max_context is not None and n > max_context:
        problems.append(
            DatumError(
                f"{where}.model_input",
                "longer than the model's context",
                expected=f"<= {max_context} tokens",
                got=n,
                fix="Truncate with max_length when building the datum.",
            )
        )
    problems += input_problems(f"{where}.model_input", datum.model_input.to_ints(), vocab_size)
    for key in needs:
        if key not in datum.loss_fn_inputs:
            have = ", ".join(datum.loss_fn_inputs) or "nothing"
            problems.append(
                DatumError(
                    f'{where}.loss_fn_inputs["{key}"]',
                    "missing",
                    expected="an array of this name",
                    got=have,
                    fix="Build datums with datum_from_tokens_weights(), then with_inputs().",
                )
            )
        elif key != "target_tokens" and datum.loss_fn_inputs[key].shape[:1] != [n]:
            problems.append(
                DatumError(
                    f'{where}.loss_fn_inputs["{key}"]',
                    "length does not match model_input",
                    expected=f"({n},)",
                    got=tuple(datum.loss_fn_inputs[key].shape),
                )
            )
    return problems + _target_problems(where, datum, vocab_size)


def _target_problems(where: str, datum: Datum, vocab_size: int | None) -> list[DatumError]:
    """Faults of target_tokens, weights and score_mask."""
    problems: list[DatumError] = []
    n = datum.model_input.length
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is not None:
        field = f'{where}.loss_fn_inputs["target_tokens"]'
        if len(targets.shape) not in (1, 2) or targets.shape[0] != n or 0 in targets.shape:
            problems.append(
                DatumError(
                    field,
                    "length does not match model_input",
                    expected=f"({n},) or ({n}, K)",
                    got=tuple(targets.shape),
                    fix="Build datums with datum_from_tokens_weights(); it shifts both together.",
                )
            )
        else:
            problems += token_problems(field, targets.to_numpy(), vocab_size)
            problems += _weight_problems(where, datum, targets)
    mask = datum.loss_fn_inputs.get(SCORE_MASK)
    if mask is not None and mask.shape != [n]:
        field = f'{where}.loss_fn_inputs["{SCORE_MASK}"]'
        problems.append(
            DatumError(field, "not one per position", expected=f"({n},)", got=tuple(mask.shape))
        )
    return problems


def input_problems(field: str, ids: list[int], vocab_size: int | None) -> list[DatumError]:
    """The first id that is no integer or outside the vocabulary: zero or one messages."""
    for at, token in enumerate(ids):  # chunks take whatever list they are given
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            return [
                DatumError(
                    f"{field}[{at}]", "not a token id", expected="an integer", got=repr(token)
                )
            ]
    return token_problems(field, np.asarray(ids), vocab_size)


def token_problems(field: str, ids: np.ndarray, vocab_size: int | None) -> list[DatumError]:
    """The first id outside the vocabulary, as a list of zero or one messages."""
    bad = np.argwhere((ids < 0) | (ids >= (math.inf if vocab_size is None else vocab_size)))
    if not len(bad):
        return []
    at = tuple(int(j) for j in bad[0])
    return [
        DatumError(
            f"{field}{list(at)}",
            "token id outside the vocabulary",
            expected="an id >= 0" if vocab_size is None else f"0 <= id < {vocab_size}",
            got=int(ids[at]),
        )
    ]


def _weight_problems(where: str, datum: Datum, targets: TensorData) -> list[DatumError]:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        return []
    field = f'{where}.loss_fn_inputs["weights"]'
    if weights.shape not in (targets.shape, targets.shape[:1]):
        return [
            DatumError(
                field,
                "length does not match target_tokens",
                expected=f"{tuple(targets.shape)} (that of target_tokens)",
                got=tuple(weights.shape),
                fix="Build datums with datum_from_tokens_weights(); it shifts both together.",
            )
        ]
    bad = np.argwhere(~np.isfinite(weights.to_numpy()))
    if not len(bad):
        return []
    at = [int(j) for j in bad[0]]
    return [
        DatumError(
            f"{field}{at}",
            "not finite",
            expected="a finite number",
            got=weights.to_numpy()[tuple(at)],
        )
    ]
