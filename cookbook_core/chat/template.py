"""The tokenizer's chat template: render messages, find its end token, check its tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cookbook_core.chat.conversations import Message
from cookbook_core.errors import DataError, ModelError


def apply_template(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> str:
    """Render messages to text, with the header of an answer after them if `generation_prompt`.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses the messages; names the first that it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        fix = (
            "Load the model's chat variant; or put a chat_template.jinja into the model folder, "
            'set "chat_template" in its tokenizer_config.json, or assign tokenizer.chat_template; '
            "or write prompts as plain text."
        )
        raise ModelError("tokenizer", "no chat template to render messages with", fix=fix)
    text, refusal = _try_template(tokenizer, messages, generation_prompt)
    if not refusal:
        return text
    refused = (
        i for i in range(len(messages)) if _try_template(tokenizer, messages[: i + 1])[1] == refusal
    )
    where = f"messages[{next(refused, len(messages) - 1)}]"
    roles = [message["role"] for message in messages]
    what = f"refused by the chat template ({refusal})"
    fix = (
        "Join neighbours of one role into one message; if the template has no system role, move "
        "that message's text before the first user's."
    )
    raise DataError(where, what, expected="roles it knows", got=roles, fix=fix)


def _try_template(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> tuple[str, str]:
    """Return the rendered text and "", or "" and the template's reason for refusing."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            _without_weights(messages), tokenize=False, add_generation_prompt=generation_prompt
        ), ""
    except TemplateError as error:
        return "", str(error) or type(error).__name__


def _without_weights(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{key: m[key] for key in m if key != "weight"} for m in messages]


def end_token(tokenizer: Any) -> int | None:
    """Return the first special token that the template puts after an answer; None without one."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qz"}]
    text, _ = _try_template(tokenizer, probe)
    tokens = tokenizer.encode(text.rpartition("qz")[2], add_special_tokens=False)
    return next((token for token in tokens if is_special(tokenizer, token)), None)


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether `decode(..., skip_special_tokens=True)` leaves this token out."""
    text = tokenizer.decode([token])
    return bool(text) and not tokenizer.decode([token], skip_special_tokens=True)


def check_generation_tags(
    tokenizer: Any,
    messages: Sequence[Message],
    tokens: list[int],
    spans: list[tuple[int, int, int]],
    everything: bool,
) -> None:
    """Compare the trained tokens with the template's {% generation %} tags, if it has any.

    Args:
        tokenizer: a Hugging Face tokenizer; only a fast one has the offsets that this needs.
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
    template = tokenizer.chat_template
    has_tags = isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template)
    if not has_tags or not getattr(tokenizer, "is_fast", False):
        return
    tagged = tokenizer.apply_chat_template(
        _without_weights(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]
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
