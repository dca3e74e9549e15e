"""What a `sample` asks of its prompt beside its own logprobs, through the scoring code.

So the logprobs of the tokens it names equal those of a `forward` over the same batch, bit for bit.
A prompt with images has its own logprobs from there too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.adapters import Adapter
from cookbook_core.backend.local.sampling.draw import draw_alternatives, draw_device
from cookbook_core.backend.sampling_requests import PromptScores, SampleRequest
from cookbook_core.datums import shift_sequence
from cookbook_core.types import Datum, ModelInput, PromptAltTokens, SampleResponse, TensorData

import numpy as np
import torch

Item = tuple[SampleRequest, PromptScores]
_ROWS = 256
"""Rows of the vocabulary's logprobs in memory at a time."""


def sample_and_score(
    engine: Engine, adapter: Adapter | None, items: Sequence[Item]
) -> list[SampleResponse]:
    """Completions of all requests, decoded together, and what each asks of its prompt.

    Args:
        engine: of the model.
        adapter: the adapter to compute with; None for the base model.
        items: checked requests.
    """
    responses = engine.sample(adapter, [_sampled(request) for request, _ in items])
    for i, logprobs in _score_pictured(engine, adapter, items).items():
        responses[i] = dataclasses.replace(responses[i], prompt_logprobs=logprobs)
    targets = _score_targets(engine, adapter, items)
    alternatives = _draw(engine, adapter, items)
    return [
        dataclasses.replace(
            _last_only(response, scores.last_n),
            target_prompt_logprobs=targets.get(i),
            prompt_alt_tokens=alternatives.get(i),
        )
        for i, (response, (_, scores)) in enumerate(zip(responses, items, strict=True))
    ]


def _sampled(request: SampleRequest) -> SampleRequest:
    """The part of a request that the sampler answers."""
    if request.model_input is None:
        return request
    return dataclasses.replace(request, include_prompt_logprobs=False)


def _score_pictured(
    engine: Engine, adapter: Adapter | None, items: Sequence[Item]
) -> dict[int, list[float | None]]:
    """log p of the tokens of each prompt with images that asks for it, scored as one batch."""
    wanted = {}
    for i, (request, _) in enumerate(items):
        if request.model_input is not None and request.include_prompt_logprobs:
            inputs, targets = shift_sequence(request.model_input)
            wanted[i] = Datum(inputs, {"target_tokens": targets})
    found = engine.compute_logprobs(adapter, list(wanted.values())) if wanted else []
    return dict(zip(wanted, found, strict=True))


def _inputs(request: SampleRequest) -> ModelInput:
    """The prompt without its last token."""
    return shift_sequence(request.model_input or ModelInput.from_ints(request.prompt))[0]


def _last_only(response: SampleResponse, last_n: int | None) -> SampleResponse:
    """The response without logprobs of prompt tokens before the last n."""
    if last_n is None or response.prompt_logprobs is None:
        return response
    before = len(response.prompt_logprobs) - last_n
    own, top = response.prompt_logprobs, response.topk_prompt_logprobs
    return dataclasses.replace(
        response,
        prompt_logprobs=[None] * before + own[before:],
        topk_prompt_logprobs=None if top is None else [None] * before + top[before:],
    )


def _score_targets(
    engine: Engine, adapter: Adapter | None, items: Sequence[Item]
) -> dict[int, TensorData]:
    """log p of the targets of each item that has some, scored as one batch."""
    found, wanted = {}, []
    for i, (request, scores) in enumerate(items):
        if scores.targets is not None:
            found[i] = TensorData(np.zeros(scores.targets.shape), "float32")
            if (scores.targets >= 0).any():
                wanted.append((i, _inputs(request), scores.targets))
    if wanted:
        data = [
            Datum(inputs, {"target_tokens": ids.clip(0), "score_mask": (ids >= 0).any(axis=1)})
            for _, inputs, ids in wanted
        ]
        for (i, _, ids), logprobs in zip(wanted, engine.score(adapter, data), strict=True):
            found[i] = TensorData(np.where(ids < 0, 0.0, logprobs.numpy()), "float32")
    return found


def _draw(
    engine: Engine, adapter: Adapter | None, items: Sequence[Item]
) -> dict[int, PromptAltTokens]:
    """The alternatives of each item that asks for some, of which one forward has all prompts."""
    wanted = [i for i, (_, scores) in enumerate(items) if scores.alternatives]
    found = {i: _alternatives(*items[i], torch.zeros(0, 1)) for i in wanted}
    longer = [i for i in wanted if len(items[i][0].prompt) > 1]

    def draw(_: Any, tables: Any) -> tuple[torch.Tensor, dict[str, float]]:
        for i, table in zip(longer, tables, strict=True):
            found[i] = _alternatives(*items[i], table)
        return torch.zeros(()), {}

    if longer:
        data = [Datum(_inputs(items[i][0])) for i in longer]
        engine.forward(adapter, data, draw, "vocab_logprobs")
    return found


def _alternatives(request: SampleRequest, scores: PromptScores, table: Any) -> PromptAltTokens:
    """Draws of each row of `table` `(N - 1, V)`, nats: functions of the seed and the position."""
    seed, shape = request.params.seed, (len(table), scores.alternatives)
    # beside the seed a number that no sample of the request has
    generator = np.random.default_rng(None if seed is None else [seed % 2**64, 2**63])
    uniforms = torch.from_numpy(generator.random(shape))
    parts = [(torch.zeros(0, shape[1], dtype=torch.int64), torch.zeros(0, shape[1]))]
    device = draw_device(table.device)
    for start in range(0, len(table), _ROWS):
        logprobs = table[start : start + _ROWS].to(device)
        drawn = draw_alternatives(logprobs, uniforms[start : start + _ROWS].to(device))
        parts.append((drawn[0].cpu(), drawn[1].cpu()))
    tokens, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return PromptAltTokens(TensorData.from_torch(tokens), TensorData.from_torch(logprobs))
