"""Conversations to tokens and loss weights: validation, tools, preferences, rendering."""

from cookbook_core.chat.conversations import (
    Message,
    answers_apart,
    before_last_answer,
    check_answer,
    check_messages,
    join_answer,
    last_text,
    with_text,
)
from cookbook_core.chat.pairs import LABELLED, PAIRS, labelled, split_pair
from cookbook_core.chat.rendering import (
    Boundary,
    render_completion,
    render_messages,
    render_prompt,
    stop_tokens,
)
from cookbook_core.chat.replies import reply_tokens
from cookbook_core.chat.template import template_arguments
from cookbook_core.data.rows import naming

__all__ = [
    "LABELLED",
    "PAIRS",
    "Boundary",
    "Message",
    "answers_apart",
    "before_last_answer",
    "check_answer",
    "check_messages",
    "join_answer",
    "labelled",
    "last_text",
    "naming",
    "render_completion",
    "render_messages",
    "render_prompt",
    "reply_tokens",
    "split_pair",
    "stop_tokens",
    "template_arguments",
    "with_text",
]
