"""What a chat template puts between two answers of a conversation of several turns.

The tokens of an episode are prompt, answer, reply, answer, reply, ..., where the answers are the
ids that were sampled. Their text is never encoded again: "5" + "92" and "592" may be other tokens,
and the loss would then be on tokens that nobody sampled. Only the replies are encoded, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cookbook_core.chat.conversations import Message, as_text, check_messages
from cookbook_core.chat.images import Images
from cookbook_core.chat.template import apply_template, end_token
from cookbook_core.errors import DataError, ModelError

_FIX = (
    "Use a chat template that renders a turn independently of what follows it, or end the episode "
    "after one answer."
)


def reply_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    answer: Sequence[int],
    reply: Sequence[Message],
    *,
    images: Sequence[Any] = (),
    **arguments: Any,
) -> list[int]:
    """Encode what stands between a sampled answer and the next one.

    That is all that the chat template puts after the answer's end token (often a newline), the
    reply's turns, and the header of the next answer. An answer that was cut off by max_tokens gets
    the end token that it lacks. So the model's next input is

        render_prompt(tokenizer, messages) + answer + reply_tokens(...)    for the first answer

    and, for a later one, its own input + answer + reply_tokens(...).

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: the conversation before the answer, earlier answers and replies included.
        answer: the sampled token ids `(C,)`, with their end token where they have one.
        reply: the messages that follow it, such as `[{"role": "tool", "content": "592"}]`.
        images: of the messages, as for `render_prompt`.
        **arguments: of the chat template, as for `render_prompt`.
    Returns:
        Token ids, none of which was sampled: their loss weight is 0.
    Raises:
        DataError: a malformed reply, one with an answer in it, or a chat template that, as more
            follows, renders the answer or the turns before it in another way (some strip the
            thinking of earlier answers).
        ModelError: no chat template, or one that puts no end token after an answer.
    """
    check_messages(reply, "reply")
    roles = [message["role"] for message in reply]
    if "assistant" in roles:
        rule, fix = "roles tool, user or system", "Let the model write its answers."
        raise DataError("reply", "contains an answer", expected=rule, got=roles, fix=fix)
    reply = [as_text(message, f"reply[{i}]") for i, message in enumerate(reply)]
    messages = Images(tokenizer, messages, images).turns
    before = apply_template(tokenizer, messages, True, **arguments)
    end = end_token(tokenizer)
    if end is None:
        what = "puts no end token after an answer, so that no reply can follow"
        raise ModelError("chat template", what, fix="Add one to the template.")
    ids = [int(token) for token in answer]
    ended = ids[-1:] == [end]
    text = tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False)
    turns = [*messages, {"role": "assistant", "content": text}, *reply]
    whole = apply_template(tokenizer, turns, True, **arguments)
    rest = _after_answer(whole, before, text)
    tokens = _encode(tokenizer, rest)
    at = tokens.index(end) if end in tokens else 0
    if end not in tokens or tokenizer.decode(tokens[:at]).strip():
        what = "the chat template ends an answer in another way when a reply follows"
        rule, got = repr(tokenizer.decode([end])), repr(rest[:60])
        raise DataError("the sampled answer", what, expected=rule, got=got, fix=_FIX)
    if _encode(tokenizer, whole)[-len(tokens) + at :] != tokens[at:]:
        what = "encodes to other tokens after a conversation than alone"
        fix = "Use the model's fast tokenizer, whose special tokens split the text."
        raise DataError("reply", what, got=repr(rest[-60:]), fix=fix)
    return tokens[at + 1 :] if ended else tokens


def _after_answer(whole: str, before: str, text: str) -> str:
    """Cut the text before and of the answer off the rendered whole; raise if it does not begin so.

    Whitespace around the answer may differ, since some templates trim it.
    """
    if not whole.startswith(before):
        at = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole)
        )
        what = "the chat template renders them differently when an answer and a reply follow"
        near = slice(max(0, at - 20), at + 40)
        rule, got = repr(before[near]), repr(whole[near])
        raise DataError(f"messages, character {at}", what, expected=rule, got=got, fix=_FIX)
    tail = whole[len(before) :]
    for rendered, written in ((tail, text), (tail.lstrip(), text.strip())):
        if rendered.startswith(written):
            return rendered[len(written) :]
    what = "the chat template renders it differently when a reply follows"
    raise DataError(
        "the sampled answer", what, expected=repr(text[:60]), got=repr(tail[:60]), fix=_FIX
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
