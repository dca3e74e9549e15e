"""The tokenizer's chat template: its arguments, rendering, its end token, its tags."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.chat.conversations import Message
from cookbook_core.chat.images import as_parts
from cookbook_core.chat.tool_calls import (
    FORMS,
    PROBE,
    CallForm,
    as_template_takes,
    renders_probe,
)
from cookbook_core.data.images import column_images
from cookbook_core.errors import DataError, ModelError

_PARTS_ONLY: dict[str, bool] = {}
"""By chat template, what `_takes_parts_only` found."""


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the render functions that a row carries.

        chat.render_prompt(tokenizer, row["prompt"], **chat.template_arguments(row))

    Args:
        row: with the columns tools (a list of JSON schemas) and chat_template_kwargs (an object
            such as {"enable_thinking": false}), if any; each as such or as JSON text. And with
            image or images, which give the argument images.
    Raises:
        DataError: not JSON, or of another type; or an image that cannot be measured.
    """
    images = column_images(row)
    arguments: dict[str, Any] = {"images": images} if images else {}
    for column, kind in (("chat_template_kwargs", Mapping), ("tools", list)):
        value = row.get(column)
        if value is None or value in ("", [], {}):
            continue
        rule = "an object" if kind is Mapping else "a list of JSON schemas"
        got = f"{value!r:.80}"
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            fix = "Write it with json.dumps()."
            raise DataError(column, f"not JSON ({error})", got=got, fix=fix) from error
        if not isinstance(value, kind):
            raise DataError(column, "wrong type", expected=f"{rule}, or its JSON text", got=got)
        arguments |= value if isinstance(value, Mapping) else {column: value}
    return arguments


class Template:
    """A tokenizer's chat template with its arguments, for one row.

    Args:
        tokenizer: a Hugging Face tokenizer; its attribute chat_template_kwargs, if it has one, is
            what `arguments` default to.
        arguments: see `template_arguments`.
    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: an argument that the template does not read.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            fix = (
                "Load the model's chat variant; or put a chat_template.jinja into the model "
                'folder, set "chat_template" in its tokenizer_config.json, or assign '
                "tokenizer.chat_template; or write prompts as plain text."
            )
            raise ModelError("tokenizer", "no chat template to render messages with", fix=fix)
        self.tokenizer = tokenizer
        self.arguments = {**getattr(tokenizer, "chat_template_kwargs", {}), **(arguments or {})}
        _check_arguments(tokenizer, self.arguments)
        self._form: CallForm | None = None

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = False,
        *,
        continued: bool = False,
    ) -> str:
        """Render messages to text.

        Args:
            messages: the conversation.
            generation_prompt: add the header of an answer.
            continued: end where the last message's content ends.
        Raises:
            DataError: the template refuses the messages; names the first that it refuses.
        """
        options = {"add_generation_prompt": generation_prompt, "continue_final_message": continued}
        text, refusal = self._try(messages, **options)
        if not refusal:
            return text
        places = range(len(messages))
        refused = (i for i in places if self._try(messages[: i + 1])[1] == refusal)
        where = f"messages[{next(refused, len(messages) - 1)}]"
        roles = [message["role"] for message in messages]
        what = f"refused by the chat template ({refusal})"
        fix = (
            "Join neighbours of one role into one message; if the template has no system role, "
            "move that message's text before the first user's."
        )
        raise DataError(where, what, expected="roles it knows", got=roles, fix=fix)

    def check(self, messages: Sequence[Message]) -> None:
        """Check that the template shows the tools, every tool call and every tool's result.

        Raises:
            DataError: it drops one of them without a word.
        """
        fix = "Use a chat template that knows tools, as that of the model's instruct variant."
        whole = None
        if tools := self.arguments.get("tools"):
            whole = self.render(messages)
            bare = Template(self.tokenizer, {**self.arguments, "tools": None})
            if bare.render(messages) == whole:
                raise DataError("tools", "not rendered by the chat template", got=tools, fix=fix)
        for i, message in enumerate(messages):
            calls, role = message.get("tool_calls"), message["role"]
            if not calls and role != "tool":
                continue
            other = {**message, "content": f"{message.get('content')}qz"}
            if calls:
                other = {**message, "tool_calls": [_renamed(call) for call in calls]}
            whole = whole or self.render(messages)
            if self.render([*messages[:i], other, *messages[i + 1 :]]) == whole:
                where = f"messages[{i}]" + (" tool_calls" if calls else "")
                raise DataError(where, "not rendered by the chat template", got=message, fix=fix)

    def assistant_mask(self, messages: Sequence[Message]) -> list[int]:
        """Return 1 for each token inside {% generation %} tags, else 0."""
        return self.tokenizer.apply_chat_template(
            self._as_taken(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.arguments,
        )["assistant_masks"]

    def _try(self, messages: Sequence[Message], **options: bool) -> tuple[str, str]:
        """Return the rendered text and "", or "" and the template's reason for refusing."""
        return _rendered(self.tokenizer, self._as_taken(messages), **self.arguments, **options)

    def _as_taken(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages without their weights, and with tool calls in the template's form."""
        bare = [{key: m[key] for key in m if key != "weight"} for m in messages]
        return [as_template_takes(m, self._call_form()) if m.get("tool_calls") else m for m in bare]

    def _call_form(self) -> CallForm:
        """The form of tool calls that the template renders whole."""
        if self._form is None:
            for form in FORMS:
                probe = [PROBE[0], as_template_takes(PROBE[1], form)]
                if renders_probe(_rendered(self.tokenizer, probe, **self.arguments)[0]):
                    self._form = form
                    break
            else:
                self._form = FORMS[0]
        return self._form


def apply_template(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False, **arguments: Any
) -> str:
    """`Template.render` one time, with the template's arguments."""
    return Template(tokenizer, arguments).render(messages, generation_prompt)


def _check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise DataError for tools that are none, and for names that the template does not read."""
    if not arguments:
        return
    for j, tool in enumerate(arguments.get("tools") or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            rule = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
            raise DataError(f"tools[{j}]", "not a tool", expected=rule, got=f"{tool!r:.80}")
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    for name in arguments:
        known = re.search(rf"\b{re.escape(str(name))}\b", str(tokenizer.chat_template))
        if name in ours or (not known and name != "tools"):
            fix = f"Leave {name} out, or use a model whose template has it."
            what = f"{name} is no argument of the chat template"
            raise DataError("chat_template_kwargs", what, fix=fix)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """Return the rendered text and "", or "" and the template's reason for refusing."""
    if any(isinstance(m.get("content"), list) for m in messages) or _takes_parts_only(tokenizer):
        texts = [isinstance(m.get("content"), str) for m in messages]
        messages = [
            {**m, "content": as_parts(m["content"])} if text else m
            for m, text in zip(messages, texts, strict=True)
        ]
    return _applied(tokenizer, messages, **options)


def _applied(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """`_rendered` of messages that are in the form which the template takes."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options), ""
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as e:
        return "", str(e) or type(e).__name__


def _takes_parts_only(tokenizer: Any) -> bool:
    """Whether the template shows a text only as a part, as those of some models with vision do."""
    template = str(tokenizer.chat_template)
    if template not in _PARTS_ONLY:
        found = [True]
        if "'text'" in template or '"text"' in template:
            forms = [[{"role": "user", "content": x}] for x in ("qz", as_parts("qz"))]
            found = ["qz" in _applied(tokenizer, messages)[0] for messages in forms]
        _PARTS_ONLY[template] = found == [False, True]
    return _PARTS_ONLY[template]


def _renamed(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call of another name."""
    if "function" in call:
        return {**call, "function": _renamed(call["function"])}
    return {**call, "name": f"{call['name']}qz"}


def end_token(tokenizer: Any) -> int | None:
    """Return the first special token that the template puts after an answer; None without one."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qz"}]
    text, _ = _rendered(tokenizer, probe)
    tokens = tokenizer.encode(text.rpartition("qz")[2], add_special_tokens=False)
    return next((token for token in tokens if is_special(tokenizer, token)), None)


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether `decode(..., skip_special_tokens=True)` leaves this token out."""
    text = tokenizer.decode([token])
    return bool(text) and not tokenizer.decode([token], skip_special_tokens=True)


def check_generation_tags(
    template: Template,
    messages: Sequence[Message],
    tokens: list[int],
    spans: list[tuple[int, int, int]],
    everything: bool,
) -> None:
    """Compare the trained tokens with the template's {% generation %} tags, if it has any.

    Args:
        template: of a Hugging Face tokenizer; only a fast one has the offsets that this needs.
        messages: the conversation.
        tokens: its tokens, `(T,)`.
        spans: of each trained answer, the index of its first token, the index after its end token
            and the index after its turn. Whitespace between the last two is not compared: it is
            never trained on, whatever the tags say.
        everything: whether all answers are trained on; else only tokens from the first span on
            are compared.
    Raises:
        DataError: a token is tagged but not trained on, or trained on but not tagged.
    """
    tokenizer, text = template.tokenizer, template.tokenizer.chat_template
    has_tags = isinstance(text, str) and re.search(r"\{%-?\s*generation\s*-?%\}", text)
    if not has_tags or not getattr(tokenizer, "is_fast", False):
        return
    tagged = template.assistant_mask(messages)
    tagged = tagged[max(0, len(tagged) - len(tokens)) :]  # a doubled BOS was cut at the front
    trained = [0] * len(tokens)
    compared = [everything or i >= spans[0][0] - 1 for i in range(len(tokens))]
    for start, end, turn_end in spans:
        trained[start:end] = [1] * (end - start)
        compared[end:turn_end] = [False] * (turn_end - end)
    for i, tag in enumerate(tagged):
        if compared[i] and tag != trained[i]:
            where = f"chat template, token {i} ({tokenizer.convert_ids_to_tokens(tokens[i])!r})"
            what = "its {% generation %} tags disagree with the turns of the conversation"
            rule = f"{trained[i]} (1: part of an answer or its end token)"
            fix = "Put the tags around the answer and its end token, or remove them."
            raise DataError(where, what, expected=rule, got=tag, fix=fix)
