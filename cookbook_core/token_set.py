"""A fixed set of K candidate tokens at one position: which tokens, and the datum that scores them.

    model_input    t0 t1 ... t(N-1)         the prompt, generation prompt included
    target_tokens  [c1 ... cK] at each position, (N, K)
    weights        0 0 ... 0 1              (N,): only the last position is meant

The logprobs a loss is given are `(N, K)`; row `[-1]` holds log p of each candidate as the next
token. `log_softmax` over it renormalises within the set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.datums import SCORE_MASK
from cookbook_core.errors import ConfigError, DataError, DatumError, check_text, is_finite
from cookbook_core.types import Datum, ModelInput


def single_tokens(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The id of each label, which must be one token as it stands, its leading space included.

    Raises:
        ConfigError: fewer than 2 labels, or labels that are several tokens, none, or the same
            token as another; all offenders are listed with their pieces.
    """
    if not isinstance(labels, (list, tuple)) or len(labels) < 2:
        rule = "a list of at least 2 words"
        raise ConfigError("labels", "nothing to choose from", expected=rule, got=repr(labels))
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
        raise ConfigError("labels", "the same token", expected="different tokens", got=twice)
    return ids


def datum_from_token_set(
    tokens: Sequence[int], token_ids: Sequence[int], **loss_fn_inputs: Any
) -> Datum:
    """Build the datum that scores K candidates for the token after `tokens`.

    Args:
        tokens: N >= 1 ids, the prompt.
        token_ids: K >= 2 candidate ids.
        loss_fn_inputs: more arrays for the loss, of any shape.
    Returns:
        Datum with target_tokens `(N, K)`, weights and score_mask `(N,)`, 1 at the last position
        and 0 before: logprobs are computed there alone, and read 0.0 before.
    Raises:
        DatumError: no prompt, or fewer than 2 candidates.

    >>> datum = datum_from_token_set([5, 6], [8, 9])
    >>> datum.loss_fn_inputs["target_tokens"].tolist(), datum.loss_fn_inputs["weights"].tolist()
    ([[8, 9], [8, 9]], [0.0, 1.0])
    """
    tokens, ids = (ModelInput.from_ints(x).to_ints() for x in (tokens, token_ids))
    n = len(tokens)
    if n == 0 or len(ids) < 2:
        raise DatumError(
            "datum_from_token_set",
            "too few tokens",
            expected="N >= 1 and K >= 2",
            got=(n, len(ids)),
        )
    weights = [0.0] * (n - 1) + [1.0]
    inputs = {"target_tokens": [ids] * n, "weights": weights, SCORE_MASK: weights, **loss_fn_inputs}
    return Datum(ModelInput.from_ints(tokens), inputs)


def label_distribution(
    row: Mapping[str, Any],
    labels: Sequence[str],
    where: str,
    *,
    smoothing: float = 0.0,
    zeros: bool = True,
) -> list[float]:
    """The row's target over K labels: K shares that sum to 1.

    Args:
        row: with "label_probs", K numbers; or "answer", the label that gets all, with or without
            its leading space.
        labels: K label words.
        where: how errors call the row.
        smoothing: this share of the result is spread evenly over the labels.
        zeros: whether a share may be 0; KL(model || target) is infinite then.
    Raises:
        DataError: no such label; not K non-negative numbers that sum to 1 (to 1e-3); a 0 that is
            not allowed.
    """
    k = len(labels)
    if "answer" in row:
        names = [label.strip() for label in labels]
        answer = str(row["answer"]).strip()
        if answer not in names:
            raise DataError(f"{where}.answer", "not a label", expected=names, got=repr(answer))
        probs = [float(name == answer) for name in names]
    else:
        given = row["label_probs"]
        listed = isinstance(given, (list, tuple)) and all(map(is_finite, given))
        probs = [float(p) for p in given] if listed else []
        if len(probs) != k or not all(p >= 0 for p in probs) or not abs(sum(probs) - 1) < 1e-3:
            rule = f"{k} numbers >= 0 that sum to 1, one per label"
            raise DataError(
                f"{where}.label_probs", "no distribution", expected=rule, got=repr(given)
            )
    total = math.fsum(probs)
    probs = [(1 - smoothing) * p / total + smoothing / k for p in probs]
    if not zeros and min(probs) == 0:
        rule, mend = "every share above 0", "Pass --smoothing 0.01, or another --divergence."
        raise DataError(
            where, "KL(model || target) is infinite", expected=rule, got=probs, fix=mend
        )
    return probs
