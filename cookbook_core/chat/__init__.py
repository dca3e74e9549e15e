"""Conversations to tokens and loss weights: rendering, validation, pairs."""

from cookbook_core.chat.conversations import (
    PAIRS,
    Message,
    before_last_answer,
    check_answer,
    check_messages,
    naming,
    split_pair,
)
from cookbook_core.chat.rendering import (
    Boundary,
    last_text,
    render_completion,
    render_messages,
    render_prompt,
    stop_tokens,
)

__all__ = [
    "PAIRS",
    "Boundary",
    "Message",
    "before_last_answer",
    "check_answer",
    "check_messages",
    "last_text",
    "naming",
    "render_completion",
    "render_messages",
    "render_prompt",
    "split_pair",
    "stop_tokens",
]
