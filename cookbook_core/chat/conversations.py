"""Validate conversations: lists of messages, each with a role and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.errors import DataError, check_choice, check_text, is_finite

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Check that every message has a known role, text content and a valid weight, if any.

    Raises:
        DataError: with the index of the message and the key that is wrong.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        rule = "a non-empty list of messages"
        fix = 'Write messages as [{"role": "user", "content": "..."}, ...].'
        raise DataError(where, "not a conversation", expected=rule, got=repr(messages), fix=fix)
    for i, message in enumerate(messages):
        spot = f"{where}[{i}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            keys = sorted(map(str, message)) if isinstance(message, Mapping) else []
            fix = 'Rename "from" to "role" and "value" to "content".' if "from" in keys else ""
            rule, got = 'keys "role" and "content"', keys or repr(message)
            raise DataError(spot, "not a message", expected=rule, got=got, fix=fix)
        role, content = message["role"], message["content"]
        check_choice(DataError, f"{spot} role", "unknown", role, ROLES)
        if not isinstance(content, str):
            got = f"{content!r} (keys: {', '.join(map(str, message))})"
            fix = 'Write one string; "" if the message has tool_calls only.'
            raise DataError(f"{spot} content", "not text", expected="a str", got=got, fix=fix)
        check_text(DataError, f"{spot} content", content)
        weight = message.get("weight", 0)
        if not (is_finite(weight) or isinstance(weight, bool)) or weight < 0:
            what, rule = "not a valid weight", "a number >= 0"
            raise DataError(f"{spot} weight", what, expected=rule, got=repr(weight))
        if weight and role != "assistant":
            what, fix = f"not allowed on a {role} message", "Remove it: only answers have one."
            raise DataError(f"{spot} weight", what, got=repr(weight), fix=fix)


def check_turns(turns: object, where: str) -> None:
    """Raise DataError unless `turns` is plain text or a list of valid messages."""
    if isinstance(turns, str):
        check_text(DataError, where, turns)
    elif isinstance(turns, Sequence):
        check_messages(turns, where)
    else:
        fix = f'Write it as text: "{turns}".' if isinstance(turns, (int, float)) else ""
        fix = "Write a list, also of one message." if isinstance(turns, Mapping) else fix
        got, rule = f"{turns!r:.80} ({type(turns).__name__})", "text or a list of messages"
        raise DataError(where, "wrong type", expected=rule, got=got, fix=fix)


def check_answer(message: Message, where: str) -> None:
    """Raise DataError if an answer to train on has neither text nor a tool call."""
    if not message["content"].strip() and not message.get("tool_calls"):
        fix = 'Drop the row, or skip this message with "weight": 0 in a messages column.'
        raise DataError(f"{where} content", "empty", fix=fix)


def before_last_answer(messages: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """Return the turns before the last assistant message, and that message; later ones are cut.

    Raises:
        DataError: no assistant message, or none before the first.
    """
    check_messages(messages, where)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        rule = "an assistant message after a message of another role"
        first = roles[0] == "assistant"
        fix = "Begin with a user message." if first else "Add the answer, or drop the row."
        raise DataError(where, "nothing to train on", expected=rule, got=roles, fix=fix)
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    return list(messages[:last]), messages[last]


def last_text(turns: str | Sequence[Message]) -> str:
    """Return plain text unchanged, or the content of the last message: for printing."""
    if isinstance(turns, str):
        return turns
    check_messages(turns, "messages")
    return turns[-1]["content"]
