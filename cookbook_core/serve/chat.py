"""OpenAI-compatible completions, to look at what was trained: chat programs, evaluation harnesses.

`model` is a base model's name, or the path of saved weights (tinker://...). Logprobs are the
model's own, at temperature 1, of the tokens returned; asking for them costs one more forward.
Streams are sent when the completion is whole: its requests are decoded together with others.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cookbook_core.chat.rendering import render_prompt
from cookbook_core.chat.template import end_token
from cookbook_core.errors import RequestError
from cookbook_core.serve import fields
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.replies import Refused, told
from cookbook_core.serve.samplers import Sampler
from cookbook_core.serve.service import Service
from cookbook_core.types import ModelInput, SampleResponse, SamplingParams

MOST_TOP = 20
"""Likeliest tokens reported at a position."""
MOST_PROMPTS = 256


def routes(service: Callable[[], Service]) -> list[Route]:
    """The routes, over a service that exists once the server has started."""

    def post(path: str, answer: Any) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(service(), Fields(fields.parse_json(_body(request))))
            except Exception as error:
                return _error(error)

        return Route(path, endpoint, methods=["POST"])

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": _models(service())})

    return [
        Route("/v1/models", models),
        post("/v1/completions", _completions),
        post("/v1/chat/completions", _chat),
    ]


def _body(request: Request) -> bytes:
    return request.scope["cookbook.body"]


def _error(error: Exception) -> Response:
    """An error in the form that OpenAI's clients show."""
    shown = told(error)
    body = {"message": str(shown), "type": "invalid_request_error", "param": shown.where}
    status = error.status if isinstance(error, Refused) else 422
    return JSONResponse({"error": {**body, "code": None}}, status)


def _models(service: Service) -> list[dict[str, Any]]:
    saved = [row["tinker_path"] for row in service.saved.checkpoints()]
    about = {"object": "model", "created": int(service.started_at), "owned_by": "local"}
    return [{"id": name, **about} for name in [*service.bases, *saved]]


# ---- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What one request asks for.

    top: likeliest tokens at each position; None without logprobs.
    stop: strings that end a completion and are not part of it.
    """

    model: str
    sampler: Sampler
    tokenizer: Any
    params: SamplingParams
    count: int
    top: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool


async def _wanted(service: Service, body: Fields, *, chat: bool, top: int | None) -> _Wanted:
    """Read the fields that both endpoints have, and refuse the others."""
    model = body.text("model")
    sampler = _sampler_of(service, model)
    tokenizer = await asyncio.to_thread(_tokenizer, sampler.base)
    limit = body.integer("max_tokens", None if chat else 16)
    limit = body.integer("max_completion_tokens", limit)
    stop = body.take("stop", "text, or a list of text", _is_text_or_texts, [])
    options = Fields(body.mapping("stream_options", {}), "stream_options")
    usage = options.flag("include_usage", False)
    options.end()
    params = SamplingParams(
        max_tokens=limit,
        seed=body.integer("seed", None, least=-(2**63)),
        temperature=body.number("temperature", 1.0),
        top_p=body.number("top_p", 1.0),
        top_k=body.integer("top_k", -1, least=-1),
    )
    body.ignore("user", "store", "metadata")
    body.unsupported(
        presence_penalty=0, frequency_penalty=0, logit_bias={}, best_of=1, suffix="", tools=[],
        tool_choice="none", functions=[], response_format={"type": "text"},
    )  # fmt: skip
    wanted = _Wanted(
        model, sampler, tokenizer, params, body.integer("n", 1, least=1), top,
        tuple([stop] if isinstance(stop, str) else stop), body.flag("stream"), usage,
    )  # fmt: skip
    body.end()
    return wanted


def _is_text_or_texts(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and item for item in listed)


def _sampler_of(service: Service, model: str) -> Sampler:
    """The sampler of a base model or of saved weights, opened one time for each state of them."""
    path = model if model.startswith("tinker://") else None
    changed = service.saved.folder_of(path).stat().st_mtime_ns if path else 0
    sampler_id = f"completions of {model} {changed}"
    found = service.samplers.get(sampler_id)
    return found or service.open_sampler(sampler_id, "", path, None if path else model)


@functools.cache
def _tokenizer(base: Any) -> Any:
    return base.backend.engine().base.tokenizer()


async def _completions(service: Service, body: Fields) -> Response:
    top = body.integer("logprobs", None)
    echo = body.flag("echo")
    _check_top(top)
    given = body.take("prompt", "text or token ids, or a list of them", lambda v: v is not None)
    wanted = await _wanted(service, body, chat=False, top=top)
    prompts = _prompts(wanted.tokenizer, given)
    answers = [_complete(service, wanted, prompt, echo) for prompt in prompts]
    done = await asyncio.gather(*answers)
    rows = [row for answer in done for row in answer]
    choices = [
        {
            "index": i,
            "text": row.text,
            "finish_reason": row.finish,
            "logprobs": None if top is None else _legacy_logprobs(row),
        }
        for i, row in enumerate(rows)
    ]
    used = _usage(prompts, rows)
    return _respond(wanted, "text_completion", "cmpl", choices, used, lambda choice: choice)


async def _chat(service: Service, body: Fields) -> Response:
    flag, top = body.flag("logprobs"), body.integer("top_logprobs", 0)
    _check_top(top)
    if top and not flag:
        raise RequestError("top_logprobs", "needs logprobs", fix="Set logprobs to true.")
    messages = [_message(item, i) for i, item in enumerate(body.items("messages"))]
    wanted = await _wanted(service, body, chat=True, top=top if flag else None)
    prompt = await asyncio.to_thread(render_prompt, wanted.tokenizer, messages)
    rows = await _complete(service, wanted, prompt, echo=False)
    choices = [
        {
            "index": i, "finish_reason": row.finish,
            "message": {"role": "assistant", "content": row.text, "refusal": None},
            "logprobs": {"content": _content(row), "refusal": None} if flag else None,
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    used = _usage([prompt], rows)

    def delta(choice: dict[str, Any]) -> dict[str, Any]:
        message = choice.pop("message")
        return {**choice, "delta": {"role": "assistant", "content": message["content"]}}

    return _respond(wanted, "chat.completion", "chatcmpl", choices, used, delta)


def _check_top(top: int | None) -> None:
    if top is not None and top > MOST_TOP:
        rule, fix = f"at most {MOST_TOP}", "Ask for fewer."
        raise RequestError("logprobs", "too many", expected=rule, got=top, fix=fix)


def _message(item: Any, i: int) -> dict[str, str]:
    """A message of text; a list of text parts is joined."""
    body = Fields(item, f"messages[{i}]")
    role = body.text("role")
    content = body.take("content", "text", lambda value: isinstance(value, (str, list)))
    if isinstance(content, list):
        parts = [Fields(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]
        for part in parts:
            part.take("type", '"text"', lambda value: value == "text")
        content = "".join(part.text("text") for part in parts)
    body.ignore("name", "type", "refusal")
    body.end()
    return {"role": role, "content": content}


def _prompts(tokenizer: Any, given: Any) -> list[list[int]]:
    """The prompts of a completion request, as token ids."""
    listed = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    items = given if listed else [given]
    if len(items) > MOST_PROMPTS:
        rule, fix = f"at most {MOST_PROMPTS}", "Send them in several requests."
        raise RequestError("prompt", "too many", expected=rule, got=len(items), fix=fix)
    prompts = []
    for i, item in enumerate(items):
        if isinstance(item, str) and item:
            prompts.append(render_prompt(tokenizer, item))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            prompts.append(item)
        else:
            rule, got = "text or token ids", f"{item!r:.80}"
            what, fix = "empty or not usable", "Leave empty prompts out."
            raise RequestError(f"prompt[{i}]", what, expected=rule, got=got, fix=fix)
    return prompts


# ---- completions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One completion.

    tokens: text and logprob of each, and the likeliest others; logprobs None where there are none.
    """

    text: str
    finish: str
    generated: int
    tokens: list[tuple[str, int, float | None, list[tuple[str, int, float]]]]


async def _complete(service: Service, wanted: _Wanted, prompt: list[int], echo: bool) -> list[_Row]:
    """The completions of one prompt; with echo, the prompt itself precedes them."""
    drawn: list[tuple[list[int], str]] = [([], "length")] * wanted.count
    if wanted.params.max_tokens != 0:
        ends = [end_token(wanted.tokenizer), wanted.tokenizer.eos_token_id]
        texts = [wanted.tokenizer.decode([end]) for end in ends if end is not None]
        stop = [*wanted.stop, *dict.fromkeys(texts)] or []
        params = SamplingParams(**{**vars(wanted.params), "stop": stop})
        response = await _sample(service, wanted.sampler, prompt, wanted.count, params)
        drawn = [(list(s.tokens), s.stop_reason) for s in response.sequences]
    elif not echo:
        raise RequestError("max_tokens", "nothing to return", got=0, fix="Set echo, or raise it.")
    rows = []
    for tokens, reason in drawn:
        whole = [*prompt, *tokens]
        scores = await _scores(service, wanted, whole)
        pieces = _pieces(wanted.tokenizer, whole if echo else tokens)
        begin = 0 if echo else len(prompt)
        found = [
            (piece, whole[i], *_at(wanted.tokenizer, scores, i))
            for i, piece in enumerate(pieces, start=begin)
        ]
        rows.append(_cut(found, wanted, len(prompt) if echo else 0, len(tokens), reason))
    return rows


async def _sample(
    service: Service, sampler: Sampler, prompt: list[int], count: int, params: SamplingParams,
    top: int | None = None,
) -> SampleResponse:  # fmt: skip
    ids = ModelInput.from_ints(prompt)
    promise = service.samplers.submit(
        sampler, None, b"",
        lambda weights: weights.sample(ids, count, params, top is not None, top or 0),
    )  # fmt: skip
    promise.read = True  # nobody polls for it
    return await asyncio.wrap_future(promise.future)


async def _scores(service: Service, wanted: _Wanted, tokens: list[int]) -> SampleResponse | None:
    """Logprobs of all tokens; None where they are not wanted."""
    if wanted.top is None or len(tokens) < 2:
        return None
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    context = wanted.sampler.base.data.max_context_length or len(tokens) + 1
    shown = tokens[: context - 1]  # the last token of a full context has no room to be scored
    return await _sample(service, wanted.sampler, shown, 1, greedy, wanted.top)


def _at(
    tokenizer: Any, scores: SampleResponse | None, i: int
) -> tuple[float | None, list[tuple[str, int, float]]]:
    """The logprob of token i, and the likeliest tokens at its position."""
    if scores is None or scores.prompt_logprobs is None or i >= len(scores.prompt_logprobs):
        return None, []
    table = scores.topk_prompt_logprobs
    top = (table[i] or []) if table else []
    return scores.prompt_logprobs[i], [(tokenizer.decode([t]), t, lp) for t, lp in top]


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; characters of several tokens come with the last of them."""
    pieces, start, shown = [], 0, ""
    for i in range(len(tokens)):
        text = tokenizer.decode(list(tokens[start : i + 1]), clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and i + 1 < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        shown = text
        if i - start > 32:  # decode a window only
            start, shown = i, tokenizer.decode([tokens[i]], clean_up_tokenization_spaces=False)
    return pieces


def _cut(found: Any, wanted: _Wanted, keep: int, generated: int, reason: str) -> _Row:
    """Cut a completion before the string or token that ended it."""
    if reason != "stop":
        return _Row("".join(piece for piece, *_ in found), "length", generated, found)
    head = "".join(piece for piece, *_ in found[:keep])
    tail = "".join(piece for piece, *_ in found[keep:])
    ends = [tail.find(text) for text in wanted.stop if text in tail]
    if ends:
        end = min(ends)
    else:  # an end-of-sequence token
        end = len(tail) - len(found[-1][0])
        if keep:  # harnesses take the last logprob to be that of the token drawn
            return _Row(head + tail[:end], "stop", generated, found)
    kept, length = [], 0
    for row in found[keep:]:
        if length >= end:
            break
        kept.append(row)
        length += len(row[0])
    return _Row(head + tail[:end], "stop", generated, [*found[:keep], *kept])


# ---- replies -------------------------------------------------------------------------------------


def _legacy_logprobs(row: _Row) -> dict[str, Any]:
    """Logprobs as /v1/completions has them."""
    offsets, length = [], 0
    for piece, *_ in row.tokens:
        offsets.append(length)
        length += len(piece)
    return {
        "tokens": [piece for piece, *_ in row.tokens],
        "token_logprobs": [logprob for _, _, logprob, _ in row.tokens],
        "top_logprobs": [
            {text: lp for text, _, lp in top} if logprob is not None else None
            for _, _, logprob, top in row.tokens
        ],
        "text_offset": offsets,
    }


def _content(row: _Row) -> list[dict[str, Any]]:
    """Logprobs as /v1/chat/completions has them."""

    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {**entry(text, lp), "top_logprobs": [entry(other, value) for other, _, value in top]}
        for text, _, lp, top in row.tokens
    ]


def _usage(prompts: Sequence[list[int]], rows: Sequence[_Row]) -> dict[str, int]:
    read, made = sum(map(len, prompts)), sum(row.generated for row in rows)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _respond(
    wanted: _Wanted, kind: str, prefix: str, choices: list[dict[str, Any]], used: dict[str, int],
    delta: Callable[[dict[str, Any]], dict[str, Any]],
) -> Response:  # fmt: skip
    about = {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
        "model": wanted.model,
    }  # fmt: skip
    if not wanted.stream:
        return JSONResponse({**about, "choices": choices, "usage": used})
    if prefix == "chatcmpl":
        about["object"] = "chat.completion.chunk"

    async def events() -> AsyncIterator[str]:
        for choice in choices:
            yield _event({**about, "choices": [delta(choice)]})
        if wanted.usage:
            yield _event({**about, "choices": [], "usage": used})
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
