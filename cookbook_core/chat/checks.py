"""Whether what a chat template renders can be trained on: prefixes, and its own tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cookbook_core.chat.conversations import Message
from cookbook_core.errors import DataError


def require_prefix(part: Any, whole: Any, where: str, what: str, mend: str, show: Any) -> None:
    """Raise DataError, with both sides where they part, unless `part` begins `whole`."""
    if whole[: len(part)] == part:
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    near = slice(max(0, at - 3), at + 20)
    spot = f"{where}, {'character' if isinstance(part, str) else 'token'} {at} of {len(part)}"
    raise DataError(spot, what, expected=show(part[near]), got=show(whole[near]), fix=mend)


def check_generation_tags(
    tokenizer: Any,
    messages: Sequence[Message],
    tokens: list[int],
    spans: list[tuple[int, int, int]],
    everything: bool,
) -> None:
    """Compare the trained spans with the template's {% generation %} tags, where it has them.

    Blank tokens after the end token are ours to leave out, so they are not compared.
    """
    template = tokenizer.chat_template
    has_tags = isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template)
    if not has_tags or not getattr(tokenizer, "is_fast", False):  # it needs character offsets
        return
    kept = [{key: m[key] for key in m if key != "weight"} for m in messages]
    tagged = tokenizer.apply_chat_template(
        kept, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    tagged = tagged[max(0, len(tagged) - len(tokens)) :]  # a doubled BOS was cut at the front
    trained = [0] * len(tokens)
    compared = [everything or i >= spans[0][0] - 1 for i in range(len(tokens))]
    for start, end, turn_end in spans:
        trained[start:end] = [1] * (end - start)
        compared[end:turn_end] = [False] * (turn_end - end)
    for i, tag in enumerate(tagged):
        if compared[i] and tag != trained[i]:
            token = tokenizer.convert_ids_to_tokens(tokens[i])
            what = "its {% generation %} tags disagree with the turns of the conversation"
            rule = f"{trained[i]} (1: part of an answer or its end token)"
            mend = "Put the tags around the answer and its end token, or remove them."
            raise DataError(
                f"chat template, token {i} ({token!r})", what, expected=rule, got=tag, fix=mend
            )
