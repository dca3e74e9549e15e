"""Completions of one prompt as text: drawn, cut where they stop, with the logprob of each token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cookbook_core.chat.template import end_token
from cookbook_core.errors import RequestError
from cookbook_core.serve.samplers import Sampler, Samplers
from cookbook_core.types import ModelInput, SampleResponse, SamplingParams

OnToken = Callable[[int, int, int], None]
"""See `SampleRequest.on_token`."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    params: their `stop` are strings, which end a completion and are not part of it.
    top: likeliest tokens at each position; None without logprobs.
    echo: the prompt precedes each completion.
    """

    sampler: Sampler
    tokenizer: Any
    params: SamplingParams
    count: int
    top: int | None
    echo: bool

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """The strings at which to stop, then the texts of the end-of-sequence tokens."""
        ends = [end_token(self.tokenizer)] if self.tokenizer.chat_template else []
        ends.append(self.tokenizer.eos_token_id)
        texts = [self.tokenizer.decode([end]) for end in ends if end is not None]
        return (*(self.params.stop or ()), *dict.fromkeys(texts))  # pyright: ignore


@dataclass(frozen=True)
class Token:
    """The text that a token adds, its logprob (None where there is none), the likeliest others."""

    text: str
    logprob: float | None
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Completion:
    """One completion, `generated` tokens of it drawn."""

    text: str
    finish: str
    generated: int
    tokens: list[Token]


class Pieces:
    """The text that each token adds; characters of several tokens come with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""

    def add(self, token: int, last: bool = False) -> str:
        """The text that the next token adds."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and not last:
            return ""
        piece, self._shown = text[len(self._shown) :], text
        if len(self._window) > 32:
            self._window, self._shown = [token], self._decode([token])
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


class Growing:
    """The text of a completion that is being decoded, as far as no stop can take it back."""

    def __init__(self, wanted: Wanted) -> None:
        self._stop, self._pieces = wanted.stop, Pieces(wanted.tokenizer)
        self._count, self._text = 0, ""
        self.sent = ""

    def add(self, n: int, token: int) -> str:
        """The text to send once the n-th token is there; tokens drawn again add none."""
        if n != self._count + 1:
            return ""
        self._count = n
        self._text += self._pieces.add(token)
        return self._send(self._text[: self._certain()])

    def rest(self, text: str) -> str:
        """What is left of the whole text.

        Raises:
            RequestError: it does not begin with what was sent.
        """
        if not text.startswith(self.sent):  # where memory ran out, tokens drawn again may differ
            what, fix = "the whole answer does not begin with what was sent", "Ask again."
            raise RequestError("stream", what, fix=fix)
        return self._send(text)

    def _certain(self) -> int:
        """Characters that are neither a stop nor the beginning of one."""
        found = [self._text.find(stop) for stop in self._stop if stop in self._text]
        begun = [
            size for stop in self._stop for size in range(1, len(stop))
            if self._text.endswith(stop[:size])
        ]  # fmt: skip
        return min([*found, len(self._text) - max(begun, default=0)])

    def _send(self, text: str) -> str:
        new, self.sent = text[len(self.sent) :], max(self.sent, text, key=len)
        return new


async def complete(
    samplers: Samplers, wanted: Wanted, prompt: ModelInput, on_token: OnToken | None = None
) -> list[Completion]:
    """The completions of one prompt.

    Raises:
        CookbookError: the request cannot be served.
    """
    drawn: list[tuple[list[int], str]] = [([], "length")] * wanted.count
    if wanted.params.max_tokens != 0:
        params = replace(wanted.params, stop=list(wanted.stop))
        response = await _sample(samplers, wanted, prompt, wanted.count, params, on_token=on_token)
        drawn = [(list(s.tokens), s.stop_reason) for s in response.sequences]
    elif not wanted.echo:
        raise RequestError("max_tokens", "nothing to return", got=0, fix="Set echo, or raise it.")
    return [await _completion(samplers, wanted, prompt, *each) for each in drawn]


async def _completion(
    samplers: Samplers, wanted: Wanted, prompt: ModelInput, drawn: list[int], reason: str
) -> Completion:
    scores = await _scores(samplers, wanted, prompt + drawn)
    whole, length = [*prompt.ids(), *drawn], prompt.length
    begin, pieces = (0 if wanted.echo else length), Pieces(wanted.tokenizer)
    tokens = [
        Token(pieces.add(whole[i], i + 1 == len(whole)), *_at(wanted.tokenizer, scores, i))
        for i in range(begin, len(whole))
    ]
    keep = length - begin
    if reason == "stop":
        tokens = _cut(tokens[:keep], tokens[keep:], wanted)
    return Completion("".join(t.text for t in tokens), reason, len(drawn), tokens)


def _cut(head: list[Token], tail: list[Token], wanted: Wanted) -> list[Token]:
    """Cut a completion, `tail`, before the string or token that ended it.

    After an echoed prompt, `head`, an end-of-sequence token stays, without its text: harnesses take
    the last logprob to be that of the token drawn.
    """
    text = "".join(token.text for token in tail)
    stops = wanted.params.stop or ()
    ends = [text.find(stop) for stop in stops if stop in text]  # pyright: ignore
    if head and not ends:
        return [*head, *tail[:-1], replace(tail[-1], text="")]
    room = min(ends, default=len(text) - len(tail[-1].text))  # else an end-of-sequence token
    kept = []
    for token in tail:
        if room <= 0:
            break
        kept.append(replace(token, text=token.text[:room]))
        room -= len(token.text)
    return [*head, *kept]


async def _sample(
    samplers: Samplers, wanted: Wanted, prompt: ModelInput, count: int, params: SamplingParams,
    top: int | None = None, on_token: OnToken | None = None,
) -> SampleResponse:  # fmt: skip
    promise = samplers.submit(
        wanted.sampler, None, b"",
        lambda weights: weights.sample(
            prompt, count, params, top is not None, top or 0, on_token=on_token
        ),
    )  # fmt: skip
    promise.read = True  # nobody polls for it
    return await asyncio.wrap_future(promise.future)


async def _scores(samplers: Samplers, wanted: Wanted, tokens: ModelInput) -> SampleResponse | None:
    """Logprobs of all tokens; None where they are not wanted."""
    if wanted.top is None or tokens.length < 2:
        return None
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    context = wanted.sampler.base.data.max_context_length or tokens.length + 1
    shown = tokens.first(context - 1)  # the last token of a full context cannot be scored
    return await _sample(samplers, wanted, shown, 1, greedy, wanted.top)


def _at(
    tokenizer: Any, scores: SampleResponse | None, i: int
) -> tuple[float | None, list[tuple[str, float]]]:
    """The logprob of token i, and the likeliest tokens at its position."""
    if scores is None or scores.prompt_logprobs is None or i >= len(scores.prompt_logprobs):
        return None, []
    table = scores.topk_prompt_logprobs
    top = (table[i] or []) if table else []
    return scores.prompt_logprobs[i], [(tokenizer.decode([t]), lp) for t, lp in top]
