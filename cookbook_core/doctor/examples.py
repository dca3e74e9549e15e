"""Example datums with the inputs that a loss reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.custom_loss import LossFn, LossTypeInput
from cookbook_core.datums import datum_from_tokens_weights, with_inputs
from cookbook_core.doctor.case import copies, draw_logprobs, role_of
from cookbook_core.token_set import datum_from_token_set
from cookbook_core.types import Datum

import numpy as np

VOCAB = 12
COUNT = 16  # divides into pairs and into groups of 4 and 8

Maker = Callable[[int, dict[str, bool]], Datum]


def example_data(
    loss_fn: LossFn, loss_type_input: str | None = None, *, group_size: int = 1, seed: int = 0
) -> tuple[list[Datum], LossTypeInput]:
    """Build datums that `loss_fn` runs on, and return its `loss_type_input`.

    Neighbours (0 and 1, 2 and 3, ...) share their prompt, as pairs and groups do; the first two
    differ in one token, the first of the response. Prompts and completions differ in length, some
    have tokens of weight 0 within or behind the completion. Tried in turn: `(N,)` targets, token
    sets of 2 to 5 candidates with "target_probs"; the whole vocabulary where loss_type_input
    or the name of the second parameter says so. An input that the loss looks up and that is missing
    is added; its name decides its values (see `case.role_of`).

    Returns:
        The first datums that the loss runs on, else plain `(N,)` ones; and its loss_type_input.
    """
    count = COUNT if COUNT % group_size == 0 else 2 * group_size
    if wants_vocab(loss_fn, loss_type_input):
        return _fill(loss_fn, _sequence, "vocab_logprobs", count, seed)[0], "vocab_logprobs"
    plain, runs = _fill(loss_fn, _sequence, "logprobs", count, seed)
    for k in () if runs else (2, 3, 4, 5):

        def of_k(i: int, fields: dict[str, bool], k: int = k) -> Datum:
            return _token_set(i, fields, k)

        data, runs = _fill(loss_fn, of_k, "logprobs", count, seed)
        if runs:
            return data, "logprobs"
    return plain, "logprobs"


def wants_vocab(loss_fn: LossFn, loss_type_input: str | None) -> bool:
    """Whether the loss takes the whole vocabulary: it says so, or its second parameter's name."""
    code = getattr(getattr(loss_fn, "func", loss_fn), "__code__", None)
    names: Sequence[str] = code.co_varnames[: code.co_argcount] if code else ()
    return loss_type_input == "vocab_logprobs" or (
        loss_type_input is None and len(names) > 1 and "vocab" in names[1]
    )


def _fill(
    loss_fn: LossFn, make: Maker, loss_type: LossTypeInput, count: int, seed: int
) -> tuple[list[Datum], bool]:
    """Build datums with every input that the loss looks up, and say whether it runs on them.

    `fields` maps each added input to whether it is per token, rather than one number per sequence.
    """
    fields: dict[str, bool] = {}
    flipped = False
    while True:
        data = [make(i, fields) for i in range(count)]
        reads: set[str] = set()
        logprobs = [lp.requires_grad_(True).clone() for lp in draw_logprobs(data, loss_type, seed)]
        try:
            loss_fn(copies(data, reads), logprobs)
            return data, True
        except Exception:
            missing = {key for key in reads if key not in data[0].loss_fn_inputs}
            sets = len(data[0].loss_fn_inputs["target_tokens"].shape) == 2
            if missing and not (any(role_of(k) == "probs" for k in missing) and not sets):
                fields |= {key: role_of(key) != "reward" for key in missing}
                continue
            single = {
                key for key in fields if role_of(key) in ("reward", "advantages", "desirable", "")
            }
            if not missing and single and not flipped:
                flipped = True
                fields = {key: not on if key in single else on for key, on in fields.items()}
                continue
            return data, False


def _sequence(i: int, fields: dict[str, bool]) -> Datum:
    """Build datum i of prompt, completion and, for some, tokens of weight 0 within or after it."""
    pair = np.random.default_rng([7, i // 2])
    prompt = pair.integers(1, VOCAB, size=(3, 1, 4, 2, 5)[i // 2 % 5]).tolist()
    completion = pair.integers(1, VOCAB, size=9).tolist()[: 4 if i < 2 else 3 + i * 2 % 5]
    completion[0] = 1 + (completion[0] + i % 2) % (VOCAB - 1)
    weights = [0.0] * len(prompt) + [1.0] * len(completion)
    if i % 5 == 3 and len(completion) > 3:
        weights[-2] = 0.0
    tail = [0] if i % 5 == 4 else []
    datum = datum_from_tokens_weights(prompt + completion + tail, [*weights, *(0.0 for _ in tail)])
    return with_inputs(datum, **_extra(i, fields, datum.loss_fn_inputs["weights"].to_numpy() != 0))


def _token_set(i: int, fields: dict[str, bool], k: int) -> Datum:
    """Build datum i of a prompt and K candidates for the token after it."""
    rng = np.random.default_rng([8, i])
    prompt = rng.integers(1, VOCAB, size=6 + i % 3).tolist()
    extra = _extra(i, fields, np.arange(len(prompt)) == len(prompt) - 1)
    for key in fields:
        if role_of(key) == "probs":
            extra[key] = rng.dirichlet(np.ones(k))
    return datum_from_token_set(prompt, list(range(1, k + 1)), **extra)


def _extra(i: int, fields: dict[str, bool], on: np.ndarray) -> dict[str, Any]:
    """Values of the added inputs, such as advantages that sum to 0 in pairs."""
    rng = np.random.default_rng([9, i])
    behaviour = -0.2 - rng.exponential(size=len(on))
    near = np.minimum(behaviour + 0.3 * rng.normal(size=len(on)), -0.01)
    advantage = (1.0, -1.0, 0.5, -0.5)[i % 4]
    values = {
        "reference": near,
        "sampling": behaviour * on,
        "logprobs": near,
        "advantages": advantage * on,
        "weights": on.astype(float),
        "desirable": (i % 2 == 0) * on.astype(float),
        "reward": np.full(len(on), float(i % 2 == 0)),
        "": rng.uniform(0.1, 1.0, size=len(on)) * on,
        "probs": near,
    }
    good = float(i % 2 == 0)
    alone = {"advantages": advantage, "desirable": good, "reward": good, "": 0.1 + i / COUNT}
    return {
        key: values[role_of(key)] if per_token else [alone[role_of(key)]]
        for key, per_token in fields.items()
    }
