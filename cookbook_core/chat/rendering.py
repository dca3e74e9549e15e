"""Conversations in, tokens and loss weights out, checked.

Every function keeps one promise: the tokens a model is trained on begin with exactly the tokens
it will be given when it generates. So `tokens(prompt)` is a prefix of `tokens(prompt + completion)`
or there is an error; the loss starts right after the generation prompt (the header of the answer)
and ends with the end-of-turn token; there is one BOS at most and one EOS at the end.

Two forms, as in TRL: plain text (str), encoded as it is, and messages
(`[{"role": "user", "content": "..."}]`), rendered by the tokenizer's chat template. On the chat
path the template alone decides about BOS and EOS, as it does when the model is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cookbook_core.chat.checks import check_generation_tags, require_prefix
from cookbook_core.chat.conversations import (
    Message,
    before_last_answer,
    check_answer,
    check_messages,
)
from cookbook_core.errors import (
    ConfigError,
    DataError,
    ModelError,
    check_choice,
    check_text,
)

Boundary = Literal["check", "split"]

_REWRITTEN = "the chat template renders it differently when more messages follow"
_MEND_REWRITTEN = (
    'Train on the last message only (train_on="last", nothing after it), or use a chat template '
    "that renders a turn the same whatever follows."
)
_CHANGING = "the chat template renders the same messages differently each time"
_MEND_CHANGING = "Take the time, or what else changes in it, out of the chat template."
_MEND_REFUSED = (
    "Join neighbours of one role into one message, and put a system message's text before the "
    "first user's, where the template has no such role."
)
_MERGED = "its tokens do not begin the tokens of the whole: one token spans the boundary"
_MEND_MERGED = "Move the blank at the boundary from one side to the other"
_MEND_HEADER = "Take the blank at the end of its generation prompt out of the chat template"


def render_prompt(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """Encode what the model is given before it generates.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: plain text, encoded with the BOS that the tokenizer itself adds (never two, and no
            EOS); or messages, rendered with the generation prompt at their end.
    Raises:
        DataError: no tokens, or a message that cannot be rendered.
        ModelError: messages, but the tokenizer has no chat template.
    """
    text = _prompt_text(tokenizer, prompt)
    tokens = _encode(tokenizer, text, special=isinstance(prompt, str))
    if not tokens:
        raise DataError("prompt", "no tokens", expected="some text", got=repr(prompt))
    return tokens


def render_completion(
    tokenizer: Any,
    prompt: Any,
    completion: Any,
    *,
    boundary: Boundary = "check",
) -> tuple[list[int], list[int]]:
    """Encode a prompt and its completion; all loss belongs on the completion's tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: text or messages, as for `render_prompt`.
        completion: plain text if the prompt is, else a list of one assistant message.
        boundary: what to do where one token would span the end of the prompt and the start of the
            completion ("2+" and "+3" may meet in the token "++"). "check" raises, since such a row
            trains a token sequence that no prompt can lead to. "split" encodes the two texts of
            that row apart, which is what a model sees that is given the prompt and generates.
    Returns:
        prompt_tokens, equal to `render_prompt(tokenizer, prompt)`; and completion_tokens, whose
        last is the one end-of-turn token (EOS is appended where text or template gives none; what
        a template puts after it, such as a newline, is cut).
    Raises:
        DataError: the prompt's tokens do not begin the whole; mixed or malformed arguments; an end
            token inside the completion.
        ModelError: the tokenizer lacks a chat template or an EOS.
    """
    plain = isinstance(prompt, str)
    if plain != isinstance(completion, str) or (plain and not completion):
        rule = "non-empty text" if plain else "a list of one assistant message"
        mend = "Prompt and completion are both plain text or both messages."
        raise DataError(
            "completion", "does not fit the prompt", expected=rule, got=repr(completion), fix=mend
        )
    check_choice(ConfigError, "boundary", "unknown", boundary, ("check", "split"))
    before = _prompt_text(tokenizer, prompt)
    if plain:
        whole = prompt + completion
    else:
        check_messages(completion, "completion")
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            roles = [entry["role"] for entry in completion]
            mend = "For longer conversations use render_messages()."
            raise DataError(
                "completion",
                "not one answer",
                expected="one assistant message",
                got=roles,
                fix=mend,
            )
        check_answer(completion[0], "completion[0]")
        whole = _apply_template(tokenizer, [*prompt, *completion])
        _require_same(tokenizer, before, whole, [*prompt, *completion], "prompt")

    prompt_tokens = render_prompt(tokenizer, prompt)
    tokens = _encode(tokenizer, whole, special=plain)
    if boundary == "check":
        mend = f'{_MEND_MERGED if plain else _MEND_HEADER}, or pass boundary="split".'
        spell = tokenizer.convert_ids_to_tokens
        require_prefix(prompt_tokens, tokens, "prompt", _MERGED, mend, spell)
    elif tokens[: len(prompt_tokens)] != prompt_tokens:
        joint = tokenizer.decode(tokens)
        tokens = prompt_tokens + _encode(tokenizer, whole[len(before) :], special=False)
        if tokenizer.decode(tokens) != joint:
            what = "encoded apart from its prompt it reads as another text"
            got = repr(tokenizer.decode(tokens)[-60:])
            mend = "Begin the completion with a space or newline, or end the prompt with one."
            raise DataError("completion", what, expected=repr(joint[-60:]), got=got, fix=mend)
    completion_tokens = tokens[len(prompt_tokens) :]
    return prompt_tokens, _ended(tokenizer, completion_tokens, "completion", only_eos=plain)


def render_messages(
    tokenizer: Any, messages: Sequence[Message], train_on: Literal["last", "all"] = "last"
) -> tuple[list[int], list[float]]:
    """Encode a conversation with a loss weight for each token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each with "role" and "content"; an assistant message may carry "weight", a
            number >= 0 (default 1): the weight of all its tokens, 0 = read but not learnt.
        train_on: "last" assistant message, or "all" of them.
    Returns:
        tokens and weights, both (T,). Weights are 0 everywhere but on the trained messages'
        content and end-of-turn token: headers, generation prompt and the newline after are 0.
    Raises:
        DataError: a malformed message (with its index and keys), no assistant message, an empty
            one that is trained, all weights 0, a turn that is rendered otherwise in the whole
            conversation than when it is generated, or a template whose {% generation %} tags
            disagree with these weights.
        ModelError: the tokenizer has no chat template.
    """
    before_last_answer(messages, "messages")
    check_choice(ConfigError, "train_on", "unknown", train_on, ("last", "all"))
    answers = [i for i, entry in enumerate(messages) if entry["role"] == "assistant"]
    trained = answers if train_on == "all" else answers[-1:]
    for i in trained:
        if messages[i].get("weight", 1):
            check_answer(messages[i], f"messages[{i}]")

    whole = _apply_template(tokenizer, messages)
    tokens = _encode(tokenizer, whole, special=False)
    weights = [0.0] * len(tokens)
    spans = []  # start of the content, end after the end-of-turn token, end of the turn
    for i in trained:
        where = f"messages[{i}]"
        edges = []
        turn = _apply_template(tokenizer, messages[: i + 1])
        if not whole.startswith(turn):  # some put an EOS after the last turn only
            turn = turn.removesuffix(tokenizer.eos_token or "")
        for text in (_apply_template(tokenizer, messages[:i], generation_prompt=True), turn):
            _require_same(tokenizer, text, whole, messages, where)
            part = _encode(tokenizer, text, special=False)
            spell = tokenizer.convert_ids_to_tokens
            require_prefix(part, tokens, where, _MERGED, f"{_MEND_HEADER}.", spell)
            edges.append(len(part))
        start, turn_end = edges
        content = tokens[start:turn_end]
        ended = _ended(tokenizer, content, where, append=i == len(messages) - 1)
        if len(ended) > len(content):
            tokens, weights = [*tokens, ended[-1]], [*weights, 0.0]
        end = start + len(ended)
        spans.append((start, end, max(end, turn_end)))
        weights[start:end] = [float(messages[i].get("weight", 1.0))] * (end - start)
    if not any(weights):
        what = "every trained message has weight 0"
        raise DataError("messages", what, expected="a weight above 0", got="none")
    check_generation_tags(tokenizer, messages, tokens, spans, everything=train_on == "all")
    return tokens, weights


def last_text(turns: str | Sequence[Message]) -> str:
    """Text as it is; of messages the content of the last: for showing to people."""
    if isinstance(turns, str):
        return turns
    check_messages(turns, "messages")
    return turns[-1]["content"]


def stop_tokens(tokenizer: Any) -> list[int]:
    """List the token ids that end an answer: EOS, and the chat template's end of turn if another.

    Pass them as `stop` when sampling: a template may end turns with a token that is not
    `tokenizer.eos_token` (Gemma's <end_of_turn>), and a model trained on it never emits EOS.
    """
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        end = _end_token(tokenizer)
        if end is not None and end not in stops:
            stops.append(end)
    return stops


# ---- rendering and encoding ----------------------------------------------------------------


def _prompt_text(tokenizer: Any, prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    check_messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        mend = "Move the answer to the completion."
        where = f"prompt[{len(prompt) - 1}]"
        raise DataError(where, "ends the prompt", expected="a question", got="assistant", fix=mend)
    return _apply_template(tokenizer, prompt, generation_prompt=True)


def _apply_template(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        mend = "Give prompts as plain text, use the model's chat variant, or set chat_template."
        raise ModelError(
            "tokenizer", "no chat template", expected="one for messages", got=None, fix=mend
        )
    rendered, refused = _try_template(tokenizer, messages, generation_prompt)
    if not refused:
        return rendered
    # the turn that is not to be had: the first with which it says the same
    turns = (
        i for i in range(len(messages)) if _try_template(tokenizer, messages[: i + 1])[1] == refused
    )
    where = f"messages[{next(turns, len(messages) - 1)}]"
    roles = [entry["role"] for entry in messages]
    what = f"refused by the chat template ({refused})"
    raise DataError(where, what, expected="roles it knows", got=roles, fix=_MEND_REFUSED)


def _try_template(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> tuple[str, str]:
    """What the template gives, and what it says where it refuses; one of the two is empty."""
    from jinja2 import TemplateError

    kept = [{key: m[key] for key in m if key != "weight"} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            kept, tokenize=False, add_generation_prompt=generation_prompt
        ), ""
    except TemplateError as error:
        return "", str(error) or type(error).__name__


def _require_same(
    tokenizer: Any, part: str, whole: str, messages: Sequence[Message], where: str
) -> None:
    """Raise DataError unless the rendering of some turns begins that of them all."""
    what, mend = _REWRITTEN, _MEND_REWRITTEN
    if not whole.startswith(part) and whole != _apply_template(tokenizer, messages):
        what, mend = _CHANGING, _MEND_CHANGING
    require_prefix(part, whole, where, what, mend, repr)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Encode text: one leading BOS at most, and no EOS that the text does not spell out."""
    check_text(DataError, "text", text)
    # verbose: no warning of a text longer than the model reads, since such rows are dropped
    tokens = list(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    while len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
        del tokens[0]
    if special and tokens and tokens[-1] == tokenizer.eos_token_id:
        spelt_out = tokenizer.encode(text, add_special_tokens=False)
        if tokens[-len(spelt_out) :] != spelt_out:
            del tokens[-1]
    return tokens


def _turn_end(tokenizer: Any, tokens: list[int], only_eos: bool = False) -> int | None:
    """Find the index after the end token: the last, or the template's own if it is before that,
    that has nothing but blanks and end tokens after it."""
    own = None if only_eos else _end_token(tokenizer)
    end = None
    for i in reversed(range(len(tokens))):
        special = tokens[i] == tokenizer.eos_token_id or (
            not only_eos and _is_special(tokenizer, tokens[i])
        )
        if special and (end is None or tokens[i] == own):
            end = i + 1
        if not special and tokenizer.decode([tokens[i]]).strip():
            break
    return end


def _is_special(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return bool(text) and not tokenizer.decode([token], skip_special_tokens=True)


def _end_token(tokenizer: Any) -> int | None:
    """The first special token that the chat template puts after an answer; None: it puts none."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qz"}]
    rendered, _ = _try_template(tokenizer, probe)
    tokens = _encode(tokenizer, rendered.rpartition("qz")[2], special=False)
    return next((token for token in tokens if _is_special(tokenizer, token)), None)


def _ended(
    tokenizer: Any, tokens: list[int], where: str, only_eos: bool = False, append: bool = True
) -> list[int]:
    """Cut the tokens of one turn after its end token, or append EOS; check there is only one."""
    end = _turn_end(tokenizer, tokens, only_eos)
    if end is not None:
        tokens = tokens[:end]
    elif not append:  # a template without end tokens between turns
        return tokens
    elif tokenizer.eos_token_id is None:
        mend = "Set tokenizer.eos_token to the token that ends an answer."
        raise ModelError("tokenizer.eos_token", "not set", expected="a token", got=None, fix=mend)
    else:
        tokens = [*tokens, tokenizer.eos_token_id]
    for i, token in enumerate(tokens[:-1]):
        if token in (tokens[-1], tokenizer.eos_token_id):
            got = f"{tokenizer.decode([token])!r} also at position {i} of {len(tokens)}"
            mend = "Remove it from the text: it is added for you."
            raise DataError(
                where, "an end token before the end", expected="one, the last", got=got, fix=mend
            )
    return tokens
