"""Score a fixed set of K candidate tokens as the next token after a prompt.

    model_input    t0 t1 ... t(N-1)         the prompt, generation prompt included
    target_tokens  [c1 ... cK] at each position, (N, K)
    weights        0 0 ... 0 1              (N,): only the last position counts

The loss gets logprobs `(N, K)`, nats; row `[-1]` is log p of each candidate as the next token, and
`log_softmax` over that row renormalises it within the set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.datums import SCORE_MASK, as_sequence
from cookbook_core.errors import ConfigError, DataError, DatumError, check_text, is_finite
from cookbook_core.types import Datum, ModelInput

import numpy as np


def single_tokens(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """Encode labels that are one token each, a leading space included.

    Args:
        tokenizer: of the model that will score them.
        labels: K >= 2 texts.
    Returns:
        K token ids, all different.
    Raises:
        ConfigError: fewer than 2 labels, a label that is not exactly one token (lists all of them
            with their tokens), or two labels that are the same token.
    """
    if not isinstance(labels, (list, tuple)) or len(labels) < 2:
        raise ConfigError(
            "labels",
            "nothing to choose from",
            expected="a list of at least 2 words",
            got=repr(labels),
            fix='Pass a list, such as [" yes", " no"].',
        )
    for i, label in enumerate(labels):
        check_text(ConfigError, f"labels[{i}]", label)
    encoded = [list(tokenizer.encode(label, add_special_tokens=False)) for label in labels]
    split = [
        f"{label!r} is {tokenizer.convert_ids_to_tokens(ids)}"
        for label, ids in zip(labels, encoded, strict=True)
        if len(ids) != 1
    ]
    if split:
        raise ConfigError(
            "labels",
            "not one token each for this tokenizer",
            expected="one token per label",
            got=", ".join(split),
            fix="Choose words that are single tokens; most need their leading space.",
        )
    ids = [one for (one,) in encoded]
    if len(set(ids)) < len(ids):
        twice = sorted({label for label, i in zip(labels, ids, strict=True) if ids.count(i) > 1})
        raise ConfigError(
            "labels",
            "the same token",
            expected="different tokens",
            got=twice,
            fix="Leave out all but one of them.",
        )
    return ids


def label_words(
    rows: Sequence[Mapping[str, Any]], chosen: Sequence[str], usual: Sequence[str]
) -> tuple[str, ...]:
    """The label words: those that were chosen, else of the rows' column `labels`, else the usual.

    Raises:
        DataError: rows with different labels, none of which were chosen.
    """
    if chosen:
        return tuple(chosen)
    own = tuple(rows[0].get("labels") or ()) if rows else ()
    for i, row in enumerate(rows):
        if tuple(row.get("labels") or ()) != own:
            raise DataError(
                getattr(row, "where", f"rows[{i}]"),
                "other labels than the first row's",
                expected=list(own),
                got=row.get("labels"),
                fix="Give every row the same labels, in the same order, or pass --labels.",
            )
    return own or tuple(usual)


def datum_from_token_set(
    tokens: Sequence[int] | ModelInput, token_ids: Sequence[int], **loss_fn_inputs: Any
) -> Datum:
    """Build a datum that scores K candidates for the token after `tokens`.

    Args:
        tokens: the prompt, N >= 1 ids, or a ModelInput of N positions.
        token_ids: K >= 2 candidate ids.
        loss_fn_inputs: more arrays for the loss, of any shape.
    Returns:
        Datum with target_tokens `(N, K)`, and weights and score_mask `(N,)` that are 1 at the last
        position and 0 before it: logprobs before it are not computed and read 0.0.
    Raises:
        DatumError: an empty prompt, or fewer than 2 candidates.

    >>> datum = datum_from_token_set([5, 6], [8, 9])
    >>> datum.loss_fn_inputs["target_tokens"].tolist(), datum.loss_fn_inputs["weights"].tolist()
    ([[8, 9], [8, 9]], [0.0, 1.0])
    """
    prompt, ids = as_sequence(tokens), ModelInput.from_ints(token_ids).to_ints()
    n = prompt.length
    if n == 0 or len(ids) < 2:
        raise DatumError(
            "datum_from_token_set",
            "too few tokens",
            expected="N >= 1 tokens and K >= 2 token_ids",
            got=f"N = {n} and K = {len(ids)}",
            fix="Render the prompt, and encode the labels with single_tokens().",
        )
    weights = np.zeros(n)
    weights[-1] = 1
    targets = np.tile(ids, (n, 1))
    inputs = {"target_tokens": targets, "weights": weights, SCORE_MASK: weights, **loss_fn_inputs}
    return Datum(prompt, inputs)


def label_distribution(
    row: Mapping[str, Any],
    labels: Sequence[str],
    where: str,
    *,
    smoothing: float = 0.0,
    zeros: bool = True,
) -> list[float]:
    """Read a row's target distribution over K labels.

    Args:
        row: has "label_probs", K probabilities, or "answer", the label whose probability is 1, with
            or without its leading space.
        labels: K label words.
        where: the name of the row in errors.
        smoothing: this share, in [0, 1], of the result is spread evenly over the labels.
        zeros: whether a probability may be 0, which makes KL(model || target) infinite.
    Returns:
        K probabilities that sum to 1.
    Raises:
        DataError: an unknown label; label_probs that are not K numbers >= 0 with sum 1 (to 1e-3);
            a 0 although `zeros` is False.
    """
    k = len(labels)
    if "answer" in row:
        names = [label.strip() for label in labels]
        answer = str(row["answer"]).strip()
        if answer not in names:
            raise DataError(
                f"{where}.answer",
                "not a label",
                expected=f"one of {names}",
                got=repr(answer),
                fix="Add it to --labels, or drop the row.",
            )
        probs = [float(name == answer) for name in names]
    else:
        given = row["label_probs"]
        listed = isinstance(given, (list, tuple)) and all(map(is_finite, given))
        probs = [float(p) for p in given] if listed else []
        if len(probs) != k or not all(p >= 0 for p in probs) or not abs(sum(probs) - 1) < 1e-3:
            raise DataError(
                f"{where}.label_probs",
                "no distribution",
                expected=f"{k} numbers >= 0 that sum to 1, one per label",
                got=repr(given),
                fix="Divide counts by their sum.",
            )
    total = math.fsum(probs)
    probs = [(1 - smoothing) * p / total + smoothing / k for p in probs]
    if not zeros and min(probs) == 0:
        raise DataError(
            where,
            "KL(model || target) is infinite",
            expected="every probability above 0",
            got=probs,
            fix="Pass --smoothing 0.01, or another --divergence.",
        )
    return probs
