"""OpenAI-compatible completions, to look at what was trained: chat programs, evaluation harnesses.

`model` is a base model's name, or the path of saved weights (tinker://...). Logprobs are the
model's own, at temperature 1, of the tokens returned; asking for them costs one more forward.
Streams send text as it is decoded; with logprobs or echo, each answer when it is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook_core.chat.rendering import render_prompt
from cookbook_core.datums import as_sequence
from cookbook_core.errors import RequestError
from cookbook_core.image_files import image_in_memory
from cookbook_core.serve.completions import Completion, Growing, OnToken, Wanted, complete
from cookbook_core.serve.fields import Fields, base64_in, fields_of
from cookbook_core.serve.replies import plain, refusal
from cookbook_core.serve.samplers import Sampler
from cookbook_core.serve.service import Service
from cookbook_core.types import ModelInput, SamplingParams

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MOST_TOP = 20
"""Likeliest tokens reported at a position."""
MOST_PROMPTS = 256


def routes(service: Service) -> list[Route]:
    """The routes."""

    def post(path: str, answer: Any) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(service, await fields_of(request))
            except Exception as error:
                status, body = _error(error)
                return JSONResponse(body, status)

        return Route(path, endpoint, methods=["POST"])

    async def models(_: Request) -> Response:
        rows = await asyncio.to_thread(service.saved.checkpoints)
        about = {"object": "model", "created": int(service.started_at), "owned_by": "local"}
        names = [*service.bases, *(row["tinker_path"] for row in rows)]
        return JSONResponse({"object": "list", "data": [{"id": name, **about} for name in names]})

    return [
        Route("/v1/models", models),
        post("/v1/completions", _completions),
        post("/v1/chat/completions", _chat),
    ]


def _error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """A status, and an error in the form that OpenAI's clients show."""
    status, shown = refusal(error)
    body = {"message": plain(str(shown)), "type": "invalid_request_error", "code": None}
    return status, {"error": {**body, "param": plain(shown.where)}}


# ---- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    """A request: what is wanted of each prompt, and the form of the reply."""

    model: str
    wanted: Wanted
    prompts: list[ModelInput]
    stream: bool
    usage: bool


async def _chat(service: Service, body: Fields) -> Response:
    flag, top = body.flag("logprobs"), body.integer("top_logprobs", 0)
    if top and not flag:
        raise RequestError("top_logprobs", "needs logprobs", fix="Set logprobs to true.")
    given = body.items("messages")
    messages = await asyncio.to_thread(lambda: [_message(x, i) for i, x in enumerate(given)])
    limit = body.integer("max_tokens", None)

    def prompts(tokenizer: Any) -> list[Any]:
        return [render_prompt(tokenizer, messages)]

    ask = await _ask(service, body, limit, top if flag else None, False, prompts)
    return await _answer(service, ask, CHAT)


async def _completions(service: Service, body: Fields) -> Response:
    top, echo, limit = (
        body.integer("logprobs", None),
        body.flag("echo"),
        body.integer("max_tokens", 16),
    )
    given = body.take("prompt", "text or token ids, or a list of them", lambda v: v is not None)
    prompts = functools.partial(_prompts, given)
    return await _answer(service, await _ask(service, body, limit, top, echo, prompts), LEGACY)


async def _ask(
    service: Service, body: Fields, limit: int | None, top: int | None, echo: bool,
    prompts: Callable[[Any], list[Any]],
) -> _Ask:  # fmt: skip
    """Read the fields that both endpoints have, and refuse the others."""
    if top is not None and top > MOST_TOP:
        rule, fix = f"at most {MOST_TOP}", "Ask for fewer."
        raise RequestError("logprobs", "too many", expected=rule, got=top, fix=fix)
    model = body.text("model")
    sampler = _sampler_of(service, model)
    tokenizer = await asyncio.to_thread(_tokenizer, sampler.base)
    stop = body.take("stop", "text, or a list of text", _is_text_or_texts, [])
    options = Fields(body.mapping("stream_options", {}), "stream_options")
    usage = options.flag("include_usage", False)
    options.end()
    params = SamplingParams(
        max_tokens=body.integer("max_completion_tokens", limit),
        seed=body.integer("seed", None, least=-(2**63)),
        stop=[stop] if isinstance(stop, str) else stop,
        temperature=body.number("temperature", 1.0),
        top_p=body.number("top_p", 1.0),
        top_k=body.integer("top_k", -1, least=-1),
    )
    count, stream = body.integer("n", 1, least=1), body.flag("stream")
    body.ignore("user", "store", "metadata")
    body.unsupported(
        presence_penalty=0, frequency_penalty=0, logit_bias={}, best_of=1, suffix="", tools=[],
        tool_choice="none", functions=[], response_format={"type": "text"},
    )  # fmt: skip
    body.end()
    wanted = Wanted(sampler, tokenizer, params, count, top, echo)
    inputs = await asyncio.to_thread(lambda: _read(sampler, prompts(tokenizer)))
    return _Ask(model, wanted, inputs, stream, usage)


def _read(sampler: Sampler, prompts: Sequence[Any]) -> list[ModelInput]:
    """Token ids, and prompts with images, as inputs whose images have been read."""
    inputs = [as_sequence(prompt) for prompt in prompts]
    for value in inputs:
        sampler.base.backend.engine().check_prompt(value, "messages")
    return inputs


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


def _message(item: Any, i: int) -> dict[str, Any]:
    """A message of text, or of text and images; a list of text parts is joined."""
    body = Fields(item, f"messages[{i}]")
    role = body.text("role")
    content = body.take("content", "text", lambda value: isinstance(value, (str, list)))
    if isinstance(content, list):
        parts = [_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]
        plain = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if plain else parts
    body.ignore("name", "type", "refusal")
    body.end()
    return {"role": role, "content": content}


def _part(item: Any, where: str) -> dict[str, Any]:
    """A part of a message: text, or an image with its bytes."""
    part, kinds = Fields(item, where), ("text", "image_url")
    if part.take("type", '"text" or "image_url"', lambda value: value in kinds) == "text":
        return {"type": "text", "text": part.text("text")}
    given = part.inner("image_url")
    given.ignore("detail")
    url, where = given.text("url"), given.name_of("url")
    given.end()
    kind, _, data = url.partition(",")
    if not kind.startswith("data:image/") or not kind.endswith(";base64"):
        what, rule = "not an image in the request", "data:image/png;base64,..."
        fix = "Send the file itself: this server fetches nothing."
        raise RequestError(where, what, expected=rule, got=f"{url:.60}", fix=fix)
    return {"type": "image", "image": image_in_memory(base64_in(data, where), where)}


def _prompts(given: Any, tokenizer: Any) -> list[list[int]]:
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


# ---- replies -------------------------------------------------------------------------------------


def _legacy_logprobs(row: Completion) -> dict[str, Any]:
    """Logprobs as /v1/completions has them."""
    ends = [sum(len(t.text) for t in row.tokens[:i]) for i in range(len(row.tokens))]
    return {
        "tokens": [t.text for t in row.tokens],
        "token_logprobs": [t.logprob for t in row.tokens],
        "top_logprobs": [None if t.logprob is None else dict(t.top) for t in row.tokens],
        "text_offset": ends,
    }


def _chat_logprobs(row: Completion) -> dict[str, Any]:
    """Logprobs as /v1/chat/completions has them."""

    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(t.text, t.logprob), "top_logprobs": [entry(*other) for other in t.top]}
        for t in row.tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True)
class _Style:
    """The form of an endpoint's replies.

    whole: how a choice has its text; piece: how a part of a stream has it.
    """

    kind: str
    streamed: str
    prefix: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Completion], dict[str, Any]]


CHAT = _Style(
    "chat.completion", "chat.completion.chunk", "chatcmpl",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
    _chat_logprobs,
)  # fmt: skip
LEGACY = _Style(
    "text_completion", "text_completion", "cmpl",
    lambda text: {"text": text}, lambda text: {"text": text}, _legacy_logprobs,
)  # fmt: skip


async def _answer(service: Service, ask: _Ask, style: _Style) -> Response:
    """The reply: whole, or a stream of events."""
    about = {
        "id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
        "object": style.streamed if ask.stream else style.kind, "model": ask.model,
    }  # fmt: skip
    if ask.stream:
        events = _events(service, ask, style)
        first = await anext(events)  # an error here is still an HTTP error

        async def lines() -> AsyncIterator[str]:
            yield _event({**about, **first})
            async with contextlib.aclosing(events):  # also where the client leaves
                try:
                    async for event in events:
                        yield _event({**about, **event})
                except Exception as error:
                    yield _event(_error(error)[1])
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")
    jobs = [complete(service.samplers, ask.wanted, prompt) for prompt in ask.prompts]
    rows = [row for each in await asyncio.gather(*jobs) for row in each]
    choices = [
        {**_choice(ask, style, i, row), **style.whole(row.text)} for i, row in enumerate(rows)
    ]
    return JSONResponse({**about, "choices": choices, "usage": _usage(ask, rows)})


async def _events(
    service: Service, ask: _Ask, style: _Style
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream, of which each has one choice; choices alternate.

    Raises:
        CookbookError: the request cannot be served.
    """
    count, queue, loop = ask.wanted.count, asyncio.Queue[Any](), asyncio.get_running_loop()
    plainly = ask.wanted.top is None and not ask.wanted.echo

    def to_queue(first: int) -> OnToken:
        def put(sample: int, n: int, token: int) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (first + sample, n, token))

        return put

    async def one(first: int, prompt: ModelInput) -> None:
        try:
            on_token = to_queue(first) if plainly else None
            found = await complete(service.samplers, ask.wanted, prompt, on_token)
        except Exception as error:
            queue.put_nowait(error)
        else:
            for i, row in enumerate(found, start=first):
                queue.put_nowait((i, row))

    texts = [Growing(ask.wanted) for _ in range(count * len(ask.prompts))]
    rows: list[Completion] = []
    jobs = [asyncio.create_task(one(i * count, p)) for i, p in enumerate(ask.prompts)]
    try:
        while len(rows) < len(texts):
            match await queue.get():
                case Exception() as error:
                    raise error
                case i, Completion() as row:
                    rows.append(row)
                    last = style.piece(texts[i].rest(row.text))
                    yield {"choices": [{**_choice(ask, style, i, row), **last}]}
                case i, n, token:
                    if text := texts[i].add(n, token):
                        more = {"index": i, "finish_reason": None, "logprobs": None}
                        yield {"choices": [{**more, **style.piece(text)}]}
    finally:
        for job in jobs:
            job.cancel()
    if ask.usage:
        yield {"choices": [], "usage": _usage(ask, rows)}


def _choice(ask: _Ask, style: _Style, i: int, row: Completion) -> dict[str, Any]:
    """A choice that is complete, without its text."""
    logprobs = None if ask.wanted.top is None else style.logprobs(row)
    return {"index": i, "finish_reason": row.finish, "logprobs": logprobs}


def _usage(ask: _Ask, rows: Sequence[Completion]) -> dict[str, int]:
    read, made = sum(x.length for x in ask.prompts), sum(row.generated for row in rows)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
