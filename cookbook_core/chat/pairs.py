"""Preference pairs: a prompt with a chosen and a rejected answer, in either of TRL's forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cookbook_core.chat.conversations import check_messages
from cookbook_core.errors import DataError

PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""Columns of preference pairs: with the prompt, or of whole conversations (`split_pair`)."""


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
    turns = {n: [(turn["role"], turn["content"]) for turn in side] for n, side in sides.items()}
    longest = min(map(len, turns.values())) - 1  # leaves an answer where both are equal
    both = zip(turns["chosen"][:longest], turns["rejected"][:longest], strict=True)
    shared = next((i for i, (a, b) in enumerate(both) if a != b), longest)
    for name, side in turns.items():
        roles = [role for role, _ in side[shared:]]
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


def _check_prompt(prompt: Any, shared: list[dict[str, Any]]) -> None:
    """Raise DataError unless the texts of a prompt column are among the shared turns."""
    if not isinstance(prompt, str):
        check_messages(prompt, "prompt")
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    if not {text.strip() for text in texts} <= {turn["content"].strip() for turn in shared}:
        what = "does not match the turns shared by chosen and rejected"
        fix = "Remove the column prompt, or cut the shared turns from chosen and rejected."
        raise DataError("prompt", what, expected="one of those turns", got=repr(prompt), fix=fix)
