"""Validate conversations: lists of messages, each with a role and a content or tool calls.

A content is a text, or a list of parts: {"type": "text", "text": "..."} and {"type": "image"}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.chat.tool_calls import check_tool_calls, own_calls
from cookbook_core.data.files import Row
from cookbook_core.data.rows import PlacedRow, naming
from cookbook_core.errors import DataError, check_choice, check_text, is_finite

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Check that every message has a known role, text content and a valid weight, if any.

    An assistant message may have "tool_calls" (see `tool_calls`); its content may then be None.

    Raises:
        DataError: with the index of the message and the key that is wrong.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        rule = "a non-empty list of messages"
        fix = 'Write messages as [{"role": "user", "content": "..."}, ...].'
        raise DataError(where, "not a conversation", expected=rule, got=repr(messages), fix=fix)
    for i, message in enumerate(messages):
        spot = f"{where}[{i}]"
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        needed = {"role"} if calls else {"role", "content"}
        if not isinstance(message, Mapping) or not needed <= set(message):
            keys = sorted(map(str, message)) if isinstance(message, Mapping) else []
            fix = 'Rename "from" to "role" and "value" to "content".' if "from" in keys else ""
            rule, got = 'keys "role" and "content"', keys or repr(message)
            raise DataError(spot, "not a message", expected=rule, got=got, fix=fix)
        role, content = message["role"], message.get("content")
        check_choice(DataError, f"{spot} role", "unknown", role, ROLES)
        if calls:
            check_tool_calls(calls, role, f"{spot} tool_calls")
        if not isinstance(content, str) and (content is not None or not calls):
            _check_parts(content, spot, message)
        check_text(DataError, f"{spot} content", text_of(message))
        weight = message.get("weight", 0)
        if not (is_finite(weight) or isinstance(weight, bool)) or weight < 0:
            what, rule = "not a valid weight", "a number >= 0"
            raise DataError(f"{spot} weight", what, expected=rule, got=repr(weight))
        if weight and role != "assistant":
            what, fix = f"not allowed on a {role} message", "Remove it: only answers have one."
            raise DataError(f"{spot} weight", what, got=repr(weight), fix=fix)


def _check_parts(content: Any, spot: str, message: Message) -> None:
    """Raise DataError unless a content is a list of texts and images."""
    if not isinstance(content, list) or not content:
        got = f"{content!r} (keys: {', '.join(map(str, message))})"
        fix = "Write one string; only beside tool_calls it may be null."
        raise DataError(f"{spot} content", "not text", expected="a str", got=got, fix=fix)
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and (kind != "text" or not isinstance(part.get("text"), str)):
            rule = '{"type": "text", "text": "..."} or {"type": "image"}'
            got = f"{part!r:.80}"
            raise DataError(
                f"{spot} content[{j}]", "not a text or an image", expected=rule, got=got
            )


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


def with_text(message: Message, text: str) -> Message:
    """Return a message with another text, and the images it has before it."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": text}
    images = [part for part in content if part["type"] == "image"]
    return {**message, "content": [*images, {"type": "text", "text": text}]}


def as_text(message: Message, where: str) -> Message:
    """Return a message that the model writes, or is answered with, with its text as one string.

    Raises:
        DataError: it has an image.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(part["type"] == "image" for part in content):
        fix = "Put images into messages of the prompt."
        raise DataError(f"{where} content", "an image in an answer or a reply", fix=fix)
    return {**message, "content": text_of(message)}


def check_answer(message: Message, where: str) -> None:
    """Raise DataError if an answer to train on has neither text nor a tool call, or an image."""
    as_text(message, where)
    if not text_of(message).strip() and not message.get("tool_calls"):
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


def join_answer(prompt: Sequence[Message], answer: Message) -> list[Message]:
    """Return the prompt's messages and the answer; an assistant message at the prompt's end, a
    prefill, and the answer that continues it are one message."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, answer]
    content = text_of(prompt[-1]) + text_of(answer)
    return [*prompt[:-1], {**prompt[-1], **answer, "content": content}]


def answers_apart(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each answer of each conversation in the column messages: up to that answer.

    For chat templates that render an earlier answer otherwise than the last one, as those do that
    drop its thinking: the last answer of each row is then trained on as it was generated. Answers
    of weight 0 get no row. Rows without the column are returned unchanged.

    Raises:
        DataError: as `before_last_answer`; names the row.
    """
    made: list[Row] = []
    for row in rows:
        messages = row.get("messages")
        if messages is None:
            made.append(row)
            continue
        with naming(row):
            before_last_answer(messages, "messages")
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            kept = [i for i in answers if messages[i].get("weight", 1)] or answers[-1:]
        where = getattr(row, "where", "")
        made += [PlacedRow(where, {**row, "messages": list(messages[: i + 1])}) for i in kept]
    return made


def text_of(message: Message) -> str:
    """Return the text of a message's content, without images; "" for None."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def last_text(turns: str | Sequence[Message]) -> str:
    """Return plain text unchanged, or the last message's content and tool calls: for printing."""
    if isinstance(turns, str):
        return turns
    check_messages(turns, "messages")
    last = turns[-1]
    calls = [json.dumps(call["function"]) for call in own_calls(last.get("tool_calls") or [])]
    return "\n".join(part for part in (text_of(last), *calls) if part)
