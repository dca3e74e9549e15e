"""What a conversation must be: messages with a role and a text; and what a pair of them says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cookbook_core.errors import DataError, DatumError, check_choice, is_finite

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""Columns of preference pairs: with the prompt, or of whole conversations (`split_pair`)."""


@contextlib.contextmanager
def naming(row: Mapping[str, Any], **columns: str) -> Iterator[None]:
    """Name the row, and its column, in a DataError or DatumError that comes out of this block.

    Args:
        row: a row of `data.load_rows`.
        columns: how the column is called in the row, where an error would call it otherwise:
            `naming(row, completion="chosen")`.
    """
    try:
        yield
    except (DataError, DatumError) as error:
        row_place = getattr(row, "where", "")  # a plain dict has none
        if error.where.startswith(row_place) and row_place:
            raise
        where = error.where
        name = next((name for name in {*columns, *row} if where.startswith(name)), None)
        if name:
            where = f"column {columns.get(name, name)}{where[len(name) :]}"
        raise error.replace(where=f"{row_place}, {where}" if row_place else where) from error


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Raise DataError, naming the message, unless each has a known role and text content."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        rule = "a non-empty list of messages"
        raise DataError(where, "not a conversation", expected=rule, got=repr(messages))
    for i, entry in enumerate(messages):
        spot = f"{where}[{i}]"
        if not isinstance(entry, Mapping) or not {"role", "content"} <= set(entry):
            keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)
            raise DataError(spot, "not a message", expected='keys "role" and "content"', got=keys)
        check_choice(DataError, f"{spot} role", "unknown", entry["role"], ROLES)
        if not isinstance(entry["content"], str):
            got = f"{entry['content']!r} (keys: {', '.join(map(str, entry))})"
            raise DataError(f"{spot} content", "not text", expected="a str", got=got)
        weight = entry.get("weight", 0)
        number = (is_finite(weight) or isinstance(weight, bool)) and weight >= 0
        if not number or (weight and entry["role"] != "assistant"):
            rule = "a number >= 0, on assistant messages only"
            raise DataError(
                f"{spot} weight", f"on a {entry['role']}", expected=rule, got=repr(weight)
            )


def check_answer(entry: Message, where: str) -> None:
    """Raise DataError if an answer to be learnt says nothing (a tool call may stand alone)."""
    if not entry["content"].strip() and not entry.get("tool_calls"):
        mend = "Drop the row, or give this message the weight 0."
        raise DataError(f"{where} content", "empty", expected="an answer", got="no text", fix=mend)


def before_last_answer(messages: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """The turns before the last assistant message, and that message; what follows it is left out.

    Raises:
        DataError: no assistant message, or none before the first.
    """
    check_messages(messages, where)
    roles = [entry["role"] for entry in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        rule = "an assistant message, with another before it"
        raise DataError(where, "nothing to train on", expected=rule, got=roles)
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    return list(messages[:last]), messages[last]


def split_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference pair as prompt, chosen and rejected, whichever way the row has it.

    Args:
        row: prompt, chosen and rejected, all text or all messages, given back as they are; or
            chosen and rejected as whole conversations. Of these the turns both begin with become
            the prompt. A prompt that stands beside them, as text or messages, must be among them.
    Returns:
        The row with these three; of whole conversations, chosen and rejected are one message each.
    Raises:
        DataError: whole conversations that part before the last turn, or do not end in an answer.
    """
    sides = [row["chosen"], row["rejected"]]
    prompt = row.get("prompt")
    if prompt is not None and not any(isinstance(s, list) and len(s) > 1 for s in sides):
        return dict(row)
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if isinstance(side, str):
            rule = "messages of the whole conversation, where there is no prompt column"
            raise DataError(
                name, "plain text without its prompt", expected=rule, got=repr(side)[:80]
            )
        check_messages(side, name)
    turns = [[(entry["role"], entry["content"]) for entry in side] for side in sides]
    most = min(map(len, turns)) - 1  # two equal conversations have an answer too
    same = next((i for i in range(most) if turns[0][i] != turns[1][i]), most)
    for name, side in zip(("chosen", "rejected"), turns, strict=True):
        rest = [role for role, _ in side[same:]]
        if rest != ["assistant"] or not same:
            rule = "one assistant message after the turns both sides share"
            got = f"{same} shared turns, then {', '.join(rest)}"
            raise DataError(name, "not an answer to what both begin with", expected=rule, got=got)
    shared = sides[0][:same]
    if prompt is not None:
        if not isinstance(prompt, str):
            check_messages(prompt, "prompt")
        asked = [prompt] if isinstance(prompt, str) else [entry["content"] for entry in prompt]
        texts = [entry["content"].strip() for entry in shared]
        if not all(text.strip() in texts for text in asked):
            mend = "Leave the column prompt out, or chosen and rejected be the answers alone."
            rule = "one of the turns both begin with"
            raise DataError(
                "prompt", "not what was answered", expected=rule, got=repr(prompt), fix=mend
            )
    return {**row, "prompt": shared, "chosen": sides[0][same:], "rejected": sides[1][same:]}
