"""Preferences in TRL's forms: chosen and rejected answers, and single answers, good or bad."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.chat.conversations import check_messages, text_of
from cookbook_core.data.files import Row
from cookbook_core.data.rows import PlacedRow, naming
from cookbook_core.errors import DataError

PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""Columns of preference pairs: with the prompt, or of whole conversations (`split_pair`)."""
LABELLED = (("prompt", "completion", "label"), *PAIRS)
"""Columns of single answers with a label; or of pairs, for `labelled` to draw one answer of."""

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def split_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a preference pair into the form prompt, chosen, rejected.

    Args:
        row: prompt, chosen and rejected, all text or all messages, which are returned unchanged;
            or chosen and rejected as whole conversations, whose shared first turns become the
            prompt. A prompt column beside whole conversations, as text or messages, must be among
            those turns.
    Returns:
        The row with these three; of whole conversations, chosen and rejected are one message each.
    Raises:
        DataError: whole conversations that differ before the last turn, or do not end in an
            answer.
    """
    sides = {name: row[name] for name in ("chosen", "rejected")}
    prompt = row.get("prompt")
    if prompt is not None and not any(isinstance(s, list) and len(s) > 1 for s in sides.values()):
        return dict(row)
    for name, side in sides.items():
        if isinstance(side, str):
            what, fix = "plain text without its prompt", "Add a column prompt."
            rule = "messages of the whole conversation, where there is no prompt column"
            raise DataError(name, what, expected=rule, got=repr(side)[:80], fix=fix)
        check_messages(side, name)
    turns = {name: [_comparable(turn) for turn in side] for name, side in sides.items()}
    longest = min(map(len, turns.values())) - 1  # leaves an answer where both are equal
    both = zip(turns["chosen"][:longest], turns["rejected"][:longest], strict=True)
    shared = next((i for i, (a, b) in enumerate(both) if a != b), longest)
    for name, side in turns.items():
        roles = [turn["role"] for turn in side[shared:]]
        if roles != ["assistant"] or not shared:
            what = "not one answer to the turns shared by chosen and rejected"
            rule = "one assistant message after the shared turns"
            got = f"{shared} shared turns, then {', '.join(roles)}"
            fix = "End both conversations with the first answer in which they differ."
            fix = fix if shared else "Begin both conversations with the same turns."
            raise DataError(name, what, expected=rule, got=got, fix=fix)
    if prompt is not None:
        _check_prompt(prompt, sides["chosen"][:shared])
    answers = {name: side[shared:] for name, side in sides.items()}
    return {**row, "prompt": sides["chosen"][:shared], **answers}


def _comparable(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its weight and without keys that have no value, for comparison."""
    return {k: v for k, v in turn.items() if k != "weight" and v not in (None, "", [])}


def _check_prompt(prompt: Any, shared: list[dict[str, Any]]) -> None:
    """Raise DataError unless the texts of a prompt column are among the shared turns."""
    if not isinstance(prompt, str):
        check_messages(prompt, "prompt")
    texts = [prompt] if isinstance(prompt, str) else [text_of(turn) for turn in prompt]
    if not {text.strip() for text in texts} <= {text_of(turn).strip() for turn in shared}:
        what = "does not match the turns shared by chosen and rejected"
        fix = "Remove the column prompt, or cut the shared turns from chosen and rejected."
        raise DataError("prompt", what, expected="one of those turns", got=repr(prompt), fix=fix)


def labelled(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Row]:
    """Bring rows into the form prompt, completion, label, with a label that is True where good.

    Args:
        rows: with a column label: true or false, 1 or 0, or either as text (from a .csv). Or
            preference pairs, each of which keeps its chosen or its rejected answer.
        seed: of the draw between chosen and rejected.
    Returns:
        New rows in the same order, with their places.
    Raises:
        DataError: a label that is none of these, labels that are all one kind, or a pair that
            `split_pair` refuses; names the row.
    """
    draw = random.Random(seed)
    made: list[Row] = []
    for row in rows:
        with naming(row):
            if "label" in row:
                text = str(row["label"]).strip().lower()
                if text not in _LABELS:
                    rule, fix = "true or false", "Write true for a good answer, false for a bad."
                    got = f"{row['label']!r:.80}"
                    raise DataError("label", "unknown", expected=rule, got=got, fix=fix)
                values = {**row, "label": _LABELS[text]}
            else:
                pair, good = split_pair(row), draw.random() < 0.5
                answer = pair["chosen" if good else "rejected"]
                rest = {k: v for k, v in pair.items() if k not in ("chosen", "rejected")}
                values = {**rest, "completion": answer, "label": good}
        made.append(PlacedRow(getattr(row, "where", ""), values))
    kinds = {row["label"] for row in made}
    if len(kinds) == 1:
        first, last = (getattr(row, "where", "") for row in (rows[0], rows[-1]))
        where = f"{first} to {last}, column label" if first else "label"
        got, fix = f"{len(made)} x {kinds.pop()}", "Add rows of the other kind; or use recipes/sft."
        what, rule = "the same in all rows", "good and bad answers"
        raise DataError(where, what, expected=rule, got=got, fix=fix)
    return made
