"""Render prompts, completions and conversations to tokens and loss weights.

Every function guarantees that the prompt's tokens are a prefix of the tokens trained on, so a model
is trained on exactly what it is given when it generates; where that does not hold, it raises. The
loss starts right after the generation prompt (the header of the answer) and ends with the
end-of-turn token; there is at most one BOS, and one EOS at the end.

Two forms, as in TRL: plain text (str), encoded as it is, and messages
(`[{"role": "user", "content": "..."}]`), rendered by the tokenizer's chat template. For messages
the template alone decides about BOS and EOS, as it does when the model is served. Further arguments
of the template, such as tools and enable_thinking, are keywords of every function here, as they are
of `tokenizer.apply_chat_template`; `template_arguments` reads them from a row.

With images (see `chat.images`) a prompt is a ModelInput, which adds to token ids and has a length
as lists do; its tokens are those that the model's own processor makes.

A prompt of messages may end with an assistant message, a prefill: the answer continues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cookbook_core.chat.conversations import (
    Message,
    as_text,
    before_last_answer,
    check_answer,
    check_turns,
    join_answer,
    text_of,
)
from cookbook_core.chat.images import Images
from cookbook_core.chat.template import Template, check_generation_tags, end_token, is_special
from cookbook_core.errors import ConfigError, DataError, ModelError, check_choice, check_text

Boundary = Literal["check", "split"]

_NOT_A_PREFIX = (
    "the prompt's tokens are not a prefix of the conversation's tokens: one token spans the "
    "boundary between prompt and answer"
)
_FIX_TEXT = (
    'Put the space at the start of the completion, as in "Answer:" + " yes", or write prompt and '
    "completion as messages."
)
_FIX_PREFILL = "End the prefill after a word, and put the space at the start of the completion."
_FIX_TEMPLATE = (
    "Remove the whitespace at the end of the generation prompt from the chat template "
    "(chat_template.jinja or tokenizer_config.json in the model folder)."
)


def render_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], *, images: Sequence[Any] = (), **arguments: Any
) -> Any:
    """Encode what the model is given before it generates.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: plain text, encoded with the BOS that the tokenizer itself adds (never two, and no
            EOS); or messages, rendered with the generation prompt at their end or, after a
            prefill, up to where its text ends.
        images: of the row's columns, as `image_files.image_file` takes them.
        arguments: of the chat template, such as tools=[...] and enable_thinking=False.
    Returns:
        Token ids, a list; with images a ModelInput.
    Raises:
        DataError: neither text nor messages, no tokens, a message that cannot be rendered,
            arguments, tool calls or tool results that the template does not render, or as
            `chat.images.Images`.
        ModelError: messages, but the tokenizer has no chat template.
    """
    template = _template(tokenizer, prompt, arguments)
    given = Images(tokenizer, prompt, images)
    if template is not None:
        template.check(given.turns)
    text = given.expand(_prompt_text(template, given.turns))
    return given.cut(_prompt_tokens(tokenizer, template, prompt, text))


def _prompt_tokens(tokenizer: Any, template: Template | None, prompt: Any, text: str) -> list[int]:
    tokens = _encode(tokenizer, text, special=template is None)
    if not tokens:
        raise DataError("prompt", "no tokens", got=repr(prompt), fix="Drop the row, or add text.")
    return tokens


def render_completion(
    tokenizer: Any,
    prompt: Any,
    completion: Any,
    *,
    boundary: Boundary = "check",
    images: Sequence[Any] = (),
    **arguments: Any,
) -> tuple[Any, list[int]]:
    """Encode a prompt and its completion; train on the completion's tokens only.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: text or messages, as for `render_prompt`.
        completion: plain text if the prompt is, else a list of one assistant message.
        boundary: what to do if one token spans the end of the prompt and the start of the
            completion ("2+" and "+3" may meet in the token "++"). "check" raises, since such a row
            trains on tokens that the model never generates after this prompt. "split" encodes the
            two texts of that row separately, as happens when the model is given the prompt and
            generates.
        images: of the prompt, as for `render_prompt`.
        arguments: of the chat template, as for `render_prompt`.
    Returns:
        prompt_tokens, equal to `render_prompt(tokenizer, prompt)`; and completion_tokens, whose
        last is the one end-of-turn token (EOS is appended where text or template gives none; what
        a template puts after it, such as a newline, is cut).
    Raises:
        DataError: the prompt's tokens are not a prefix of the whole; mixed or malformed arguments;
            an end token inside the completion.
        ModelError: the tokenizer lacks a chat template or an EOS.
    """
    check_choice(ConfigError, "boundary", "unknown", boundary, ("check", "split"))
    _check_completion(prompt, completion)
    template, fix = _template(tokenizer, prompt, arguments), _FIX_TEXT
    given = Images(tokenizer, prompt, images)
    prompt = given.turns
    before = _prompt_text(template, prompt)
    if template is None:
        whole = prompt + completion
    else:
        messages = join_answer(prompt, as_text(completion[0], "completion[0]"))
        template.check(messages)
        whole = template.render(messages)
        _require_stable(template, before, whole, messages, "prompt")
        fix = _FIX_PREFILL if prompt[-1]["role"] == "assistant" else _FIX_TEMPLATE

    before, whole = given.expand(before), given.expand(whole)
    prompt_tokens = _prompt_tokens(tokenizer, template, prompt, before)
    tokens = _encode(tokenizer, whole, special=template is None)
    if boundary == "check":
        show = tokenizer.convert_ids_to_tokens
        _require_prefix(prompt_tokens, tokens, "prompt", _NOT_A_PREFIX, fix, show)
    elif tokens[: len(prompt_tokens)] != prompt_tokens:
        together = tokenizer.decode(tokens)
        tokens = prompt_tokens + _encode(tokenizer, whole[len(before) :], special=False)
        if (separate := tokenizer.decode(tokens)) != together:
            what = "encoded separately from its prompt, the text changes"
            rule, got = repr(together[-60:]), repr(separate[-60:])
            fix = "Begin the completion with a space or newline, or end the prompt with one."
            raise DataError("completion", what, expected=rule, got=got, fix=fix)
    completion_tokens = tokens[len(prompt_tokens) :]
    only_eos = template is None
    answer = _end_turn(tokenizer, completion_tokens, "completion", only_eos=only_eos)
    return given.cut(prompt_tokens), answer


def render_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    train_on: Literal["last", "all"] = "last",
    *,
    images: Sequence[Any] = (),
    **arguments: Any,
) -> tuple[Any, list[float]]:
    """Encode a conversation, with a loss weight for each token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each with "role" and "content"; an assistant message may carry "weight", a
            number >= 0 (default 1): the loss weight of all its tokens, 0 = not trained on.
        train_on: "last" assistant message, or "all" of them.
        images: of the messages, as for `render_prompt`.
        arguments: of the chat template, as for `render_prompt`.
    Returns:
        tokens and weights, both (T,). Weights are 0 except on the content and end-of-turn token of
        the trained messages: headers, generation prompt and the newline after a turn get 0.
    Raises:
        DataError: a malformed message (with its index and keys), no assistant message, an empty
            one that is trained on, all weights 0, a turn that the template renders differently in
            the whole conversation than when it is generated, or {% generation %} tags that
            disagree with these weights.
        ModelError: the tokenizer has no chat template.
    """
    before_last_answer(messages, "messages")
    check_choice(ConfigError, "train_on", "unknown", train_on, ("last", "all"))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = answers if train_on == "all" else answers[-1:]
    for i in trained:
        if messages[i].get("weight", 1):
            check_answer(messages[i], f"messages[{i}]")

    template = Template(tokenizer, arguments)
    given = Images(tokenizer, messages, images)
    messages = given.turns
    template.check(messages)
    whole = template.render(messages)
    tokens = _encode(tokenizer, given.expand(whole), special=False)
    weights = [0.0] * len(tokens)
    spans = []  # of each answer: its first token, after its end token, after its turn
    for i in trained:
        where = f"messages[{i}]"
        lengths = []
        turn = template.render(messages[: i + 1])
        if not whole.startswith(turn):  # some put an EOS after the last turn only
            turn = turn.removesuffix(tokenizer.eos_token or "")
        for text in (template.render(messages[:i], generation_prompt=True), turn):
            _require_stable(template, text, whole, messages, where)
            part, show = given.expand(text), tokenizer.convert_ids_to_tokens
            part = _encode(tokenizer, part, special=False)
            _require_prefix(part, tokens, where, _NOT_A_PREFIX, _FIX_TEMPLATE, show)
            lengths.append(len(part))
        start, turn_end = lengths
        turn_tokens = tokens[start:turn_end]
        answer = _end_turn(tokenizer, turn_tokens, where, append=i == len(messages) - 1)
        if len(answer) > len(turn_tokens):
            tokens, weights = [*tokens, answer[-1]], [*weights, 0.0]
        end = start + len(answer)
        spans.append((start, end, max(end, turn_end)))
        weights[start:end] = [float(messages[i].get("weight", 1.0))] * (end - start)
    if not any(weights):
        fix = "Drop the row, or give an answer a weight above 0."
        raise DataError("messages", "every trained message has weight 0", fix=fix)
    if not given:  # the tags are of text whose images are not written out
        check_generation_tags(template, messages, tokens, spans, everything=train_on == "all")
    return given.cut(tokens), weights


def stop_tokens(tokenizer: Any) -> list[int]:
    """Return the token ids that end an answer: EOS, and the chat template's end-of-turn token.

    Pass them as `stop` when sampling: a template may end turns with a token that is not
    `tokenizer.eos_token` (Gemma's <end_of_turn>), and a model trained on it never emits EOS.
    """
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        end = end_token(tokenizer)
        if end is not None and end not in stops:
            stops.append(end)
    return stops


# ---- rendering and encoding ----------------------------------------------------------------


def _template(tokenizer: Any, prompt: Any, arguments: dict[str, Any]) -> Template | None:
    """Return the template that renders a prompt; None for plain text, which has no arguments."""
    check_turns(prompt, "prompt")
    if not isinstance(prompt, str):
        return Template(tokenizer, arguments)
    unused = {**getattr(tokenizer, "chat_template_kwargs", {}), **arguments}
    if unused:
        what, fix = "no effect on plain text", "Write the prompt as messages, or leave them out."
        raise DataError("tools" if "tools" in unused else "chat_template_kwargs", what, fix=fix)
    return None


def _prompt_text(template: Template | None, prompt: Any) -> str:
    """Return the text that the model is given: plain text, or messages with generation prompt or
    prefill."""
    if template is None:
        return prompt
    last, where = prompt[-1], f"prompt[{len(prompt) - 1}]"
    if last["role"] != "assistant":
        return template.render(prompt, generation_prompt=True)
    if last.get("tool_calls") or not text_of(last).strip():
        what = "an assistant message at the end of the prompt that no answer can continue"
        rule, fix = "text, and no tool_calls", "Move it to the column completion."
        raise DataError(where, what, expected=rule, got=last, fix=fix)
    return template.render(prompt, continued=True)


def _check_completion(prompt: Any, completion: Any) -> None:
    """Check that a completion is one answer, as text if the prompt is text, else as messages."""
    check_turns(prompt, "prompt")
    check_turns(completion, "completion")
    plain = isinstance(prompt, str)
    if plain != isinstance(completion, str):
        forms = ("a list of one assistant message", "plain text")
        what, fix = "not in the form of the prompt", "Write both as text or both as messages."
        got = repr(completion)
        raise DataError("completion", what, expected=forms[plain], got=got, fix=fix)
    if plain and not completion:
        raise DataError("completion", "empty", fix="Drop the row, or add text.")
    if not plain:
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            roles, rule = [message["role"] for message in completion], "one assistant message"
            fix = "Write longer conversations as a column messages (render_messages)."
            raise DataError("completion", "not one answer", expected=rule, got=roles, fix=fix)
        check_answer(completion[0], "completion[0]")


def _require_prefix(part: Any, whole: Any, where: str, what: str, fix: str, show: Any) -> None:
    """Raise DataError unless `part` is a prefix of `whole`; show both from where they differ."""
    if whole[: len(part)] == part:
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    near = slice(max(0, at - 3), at + 20)
    spot = f"{where}, {'character' if isinstance(part, str) else 'token'} {at} of {len(part)}"
    raise DataError(spot, what, expected=show(part[near]), got=show(whole[near]), fix=fix)


def _require_stable(
    template: Template, part: str, whole: str, messages: Sequence[Message], where: str
) -> None:
    """Raise DataError unless the rendering of the first turns is a prefix of the rendered whole."""
    what = "the chat template renders it differently when more messages follow"
    fix = "Use a chat template that renders a turn independently of what follows it"
    last = "train on each answer in a datum of its own (--train_on each)"
    fix = f"{fix}." if where == "prompt" else f"{fix}, or {last}."
    if not whole.startswith(part) and whole != template.render(messages):
        what = "the chat template renders the same messages differently each time"
        fix = "Remove the time, or whatever else changes, from the chat template."
    _require_prefix(part, whole, where, what, fix, repr)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Encode text with at most one leading BOS, and with an EOS only where the text has it."""
    check_text(DataError, "text", text)
    # verbose=False: no warning about texts over the model's length, which recipes drop and count
    tokens = list(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    while len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
        del tokens[0]
    if special and tokens and tokens[-1] == tokenizer.eos_token_id:
        written = tokenizer.encode(text, add_special_tokens=False)
        if tokens[-len(written) :] != written:
            del tokens[-1]
    return tokens


def _turn_end(tokenizer: Any, tokens: list[int], only_eos: bool = False) -> int | None:
    """Return the index after the end token of an answer; None if it has none.

    Only whitespace and special tokens may follow it. Of several, it is the template's own end
    token, else the last.
    """
    own = None if only_eos else end_token(tokenizer)
    end = None
    for i in reversed(range(len(tokens))):
        special = tokens[i] == tokenizer.eos_token_id or (
            not only_eos and is_special(tokenizer, tokens[i])
        )
        if special and (end is None or tokens[i] == own):
            end = i + 1
        if not special and tokenizer.decode([tokens[i]]).strip():
            break
    return end


def _end_turn(
    tokenizer: Any, tokens: list[int], where: str, only_eos: bool = False, append: bool = True
) -> list[int]:
    """Cut one turn's tokens after the end token, or append EOS; raise if there is another."""
    end = _turn_end(tokenizer, tokens, only_eos)
    if end is not None:
        tokens = tokens[:end]
    elif not append:  # a template without end tokens between turns
        return tokens
    elif tokenizer.eos_token_id is None:
        fix = "Set tokenizer.eos_token to the token that ends an answer."
        raise ModelError("tokenizer.eos_token", "not set", fix=fix)
    else:
        tokens = [*tokens, tokenizer.eos_token_id]
    for i, token in enumerate(tokens[:-1]):
        if token in (tokens[-1], tokenizer.eos_token_id):
            got = f"{tokenizer.decode([token])!r} also at position {i} of {len(tokens)}"
            what, rule = "an end token before the end", "only one, the last"
            fix = "Remove it from the text; the one at the end is added automatically."
            raise DataError(where, what, expected=rule, got=got, fix=fix)
    return tokens
