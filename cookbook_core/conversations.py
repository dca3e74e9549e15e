"""What a conversation must be: messages with a role and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.errors import DataError, check_choice, is_finite, message

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Raise DataError, naming the message, unless each has a known role and text content."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        rule = "a non-empty list of messages"
        raise DataError(message(where, "not a conversation", rule, repr(messages)))
    for i, entry in enumerate(messages):
        spot = f"{where}[{i}]"
        if not isinstance(entry, Mapping) or not {"role", "content"} <= set(entry):
            keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)
            raise DataError(message(spot, "not a message", 'keys "role" and "content"', keys))
        check_choice(DataError, f"{spot} role", "unknown", entry["role"], ROLES)
        if not isinstance(entry["content"], str):
            got = f"{entry['content']!r} (keys: {', '.join(map(str, entry))})"
            raise DataError(message(f"{spot} content", "not text", "a str", got))
        weight = entry.get("weight", 0)
        number = (is_finite(weight) or isinstance(weight, bool)) and weight >= 0
        if not number or (weight and entry["role"] != "assistant"):
            rule = "a number >= 0, on assistant messages only"
            raise DataError(message(f"{spot} weight", f"on a {entry['role']}", rule, repr(weight)))
