r"""Tool calls in assistant messages, in the forms that users write and that templates take.

    OpenAI's    {"id": "call_1", "type": "function",
                 "function": {"name": "add", "arguments": "{\"a\": 1}"}}     content null
    templates'  {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    flat        {"name": "add", "arguments": {"a": 1}}

`own_calls` brings all of them into the second, and `as_template_takes` from there into what a
template takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook_core.errors import DataError, check_text

Call = Mapping[str, Any]


def check_tool_calls(calls: Any, role: str, where: str) -> None:
    """Check that each call has a name and arguments: an object, as such or as JSON text.

    Raises:
        DataError: with the index of the call and the key that is wrong.
    """
    if role != "assistant":
        raise DataError(where, f"not allowed on a {role} message", fix="Only answers call tools.")
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        rule, got = "a list of calls", f"{calls!r:.80}"
        raise DataError(where, "wrong type", expected=rule, got=got)
    for j, call in enumerate(calls):
        spot = f"{where}[{j}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            rule = '{"function": {"name": "...", "arguments": {...}}}'
            raise DataError(spot, "not a tool call", expected=rule, got=f"{call!r:.80}")
        check_text(DataError, f"{spot} name", name)
        arguments, rule = function.get("arguments"), "an object, or an object as JSON text"
        try:
            value = _arguments(arguments)
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            got = f"{arguments!r:.80} ({error})"
            raise DataError(f"{spot} arguments", "not JSON", expected=rule, got=got) from error
        if not isinstance(value, Mapping):
            twice = isinstance(value, str)
            what = "encoded as JSON twice" if twice else "not an object"
            fix = "Call json.dumps() once, or not at all." if twice else ""
            got = f"{arguments!r:.80}"
            raise DataError(f"{spot} arguments", what, expected=rule, got=got, fix=fix)


def _arguments(arguments: Any) -> Any:
    """The arguments of a call, decoded where they are text; none are {}."""
    if arguments is None or arguments == "":
        return {}
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def own_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Bring checked calls into the form of templates: arguments as an object under "function"."""
    own = []
    for call in calls:
        function = call.get("function", call)
        rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
        given = {k: function[k] for k in function if k not in ("id", "type", "arguments")}
        arguments = _arguments(function.get("arguments"))
        own.append({"type": "function", **rest, "function": {**given, "arguments": arguments}})
    return own


@dataclass(frozen=True)
class CallForm:
    """What a template takes of a message with calls.

    content: what stands for no text. text: arguments as JSON text. flat: name and arguments beside
    each other, not under "function".
    """

    content: str | None = ""
    text: bool = False
    flat: bool = False


FORMS = [
    CallForm(content, text, flat)
    for flat in (False, True)
    for content in ("", None)
    for text in (False, True)
]
"""In the order in which they are tried."""


def as_template_takes(message: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """Return a message with calls in the form that a template takes."""
    calls = own_calls(message["tool_calls"])
    for call, given in zip(calls, message["tool_calls"], strict=True):
        if form.text:
            before = given.get("function", given).get("arguments")
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"]["arguments"] = before if before and isinstance(before, str) else text
    if form.flat:
        calls = [{**call.pop("function"), **call} for call in calls]
    return {**message, "content": message.get("content") or form.content, "tool_calls": calls}


PROBE = [
    {"role": "user", "content": "qzuser"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "qzqzqzqz9",  # Mistral's templates demand nine letters or digits
                "type": "function",
                "function": {"name": "qzname", "arguments": {"qzkey": "qzvalue"}},
            }
        ],
    },
]


def renders_probe(text: str) -> bool:
    """Whether the text of PROBE has the call whole, not as Python prints it, nor encoded twice."""
    answer = text.rpartition("qzuser")[2]
    whole = all(part in answer for part in ("qzname", "qzkey", "qzvalue"))
    return whole and not any(bad in answer for bad in ("'qzkey'", '\\"qzkey', "None"))
