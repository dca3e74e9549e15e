"""Generation with logprobs: pure functions over a Hugging Face causal language model.

`sample_batch` decodes any mix of requests in one loop. Rows are left-padded to the longest prompt,
so the newest token of every row is in the same column, and a sliding window in columns equals one
in positions. Each distinct prompt is prefilled once; its keys and values are copied to all of its
samples. Rows that stop are removed from the batch.

    prompts -> Decoder.prefill -> _decode: step, draw, append -> SampleResponse

The model folder's generation_config is never read.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory, release_cached
from cookbook_core.backend.local.model.sharding import is_sharded
from cookbook_core.backend.local.model.vision import VisionTower
from cookbook_core.backend.local.sampling.cache_budget import CacheBudget
from cookbook_core.backend.local.sampling.decoder import Decoder, Prompt
from cookbook_core.backend.local.sampling.draw import (
    DRAWS,
    SamplingTensors,
    StopRule,
    draw_device,
    draw_tokens,
    eos_ids,
    take_uniforms,
    top_tokens,
)
from cookbook_core.backend.local.sampling.graph import GraphError, allocation, can_capture, refuse
from cookbook_core.backend.local.sampling.graph import decode as decode_in_graphs
from cookbook_core.backend.local.sampling.rows import Row, close_gaps, columns_of
from cookbook_core.backend.local.scoring.target_logprobs import Head
from cookbook_core.backend.sampling_requests import SampleRequest, check_request
from cookbook_core.types import SampleResponse

import torch

log = logging.getLogger(__name__)


def sample_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[SampleRequest],
    *,
    generator: torch.Generator | None = None,
    max_context_length: int | None = None,
    budget: CacheBudget | None = None,
    head: Head | None = None,
    tower: VisionTower | None = None,
) -> list[SampleResponse]:
    """Decode all requests together.

    Sample j of a request with a seed is a function of (seed, j), whatever else is in the batch, up
    to last bits: batch shapes move those of the logits. Temperature 0 is greedy; its logprobs are
    those at temperature 1.

    Args:
        model: causal LM, or a PeftModel with the LoRA to use active. Unchanged afterwards.
        tokenizer: for `stop=None` (see `eos_ids`) and for stop strings.
        requests: validated before any work.
        generator: one number is drawn from it per request without a seed; None: torch's global.
        max_context_length: of prompt and completion together, in tokens; None: the model
            config's limit.
        budget: most rows x columns of one KV cache; other rows wait for the next loop. An
            open-ended request (max_tokens None) counts as 1024 tokens. None: the CPU's.
        head: the model's (see `find_head`), for logits that are not rounded to 16 bits.
        tower: the model's, for prompts with images.

    Returns:
        One response per request, in order; logprobs in nats.
    Raises:
        RequestError: a sample does not fit into memory by itself.
        ModelError: the model's output is not finite.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = core.config.get_text_config(decoder=True)
    max_context_length = max_context_length or getattr(config, "max_position_embeddings", None)
    vocab_size = config.vocab_size
    for i, request in enumerate(requests):
        check_request(
            request,
            vocab_size=vocab_size,
            max_context_length=max_context_length,
            where=f"requests[{i}]",
        )
    eos = eos_ids(tokenizer, core.config)
    prompts: dict[tuple[int, ...], Prompt] = {}
    rows: list[list[Row]] = []
    for request in requests:
        scored_elsewhere = request.model_input is None or not request.include_prompt_logprobs
        assert scored_elsewhere, "prompts with images are scored by sample_and_score"
        prompt = Prompt(list(request.prompt), request.model_input)
        prompt = prompts.setdefault(tuple(request.prompt), prompt)
        prompt.top_k = max(prompt.top_k, request.topk_prompt_logprobs)
        prompt.scored |= request.include_prompt_logprobs or prompt.top_k > 0
        rows.append(_rows_of(request, prompt, tokenizer, eos, generator, max_context_length))
    with _inference(core):
        flat = [row for group in rows for row in group]
        _decode_all(Decoder(core, head, tower), flat, budget or CacheBudget())
    return [
        _response(request, prompts[tuple(request.prompt)], group)
        for request, group in zip(requests, rows, strict=True)
    ]


def _rows_of(
    request: SampleRequest,
    prompt: Prompt,
    tokenizer: Any,
    eos: frozenset[int],
    generator: torch.Generator | None,
    max_context_length: int | None,
) -> list[Row]:
    """The samples of one request, ready to decode."""
    params, seed = request.params, request.params.seed
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    stop = StopRule.of(params.stop, eos)
    limit = params.max_tokens or (max_context_length or 0) - len(request.prompt)
    return [
        Row(
            prompt=prompt,
            params=params,
            limit=limit,
            stop=stop,
            seed=seed,
            sample=sample,
            tokenizer=tokenizer,
            top_k=request.topk_sample_logprobs,
            on_token=request.on_token,
        )
        for sample in range(request.num_samples)
    ]


def _response(request: SampleRequest, prompt: Prompt, rows: list[Row]) -> SampleResponse:
    k = request.topk_prompt_logprobs
    return SampleResponse(
        sequences=[row.result() for row in rows],
        prompt_logprobs=[None, *prompt.logprobs] if request.include_prompt_logprobs else None,
        topk_prompt_logprobs=[None, *(top[:k] for top in prompt.top)] if k else None,
    )


@contextlib.contextmanager
def _inference(core: Any) -> Iterator[None]:
    """Inside, no gradients and no dropout; afterwards every module has its former mode."""
    training = [module for module in core.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# ---- the loop -----------------------------------------------------------------------------------


def _decode_all(decoder: Decoder, rows: list[Row], budget: CacheBudget) -> None:
    """Decode rows in loops whose caches fit the budget, which is lowered where memory runs out.

    Prompts are sorted by length, so that rows of similar length share a loop.
    """
    rows = sorted(rows, key=lambda row: (len(row.prompt.tokens), row.prompt.tokens))
    while rows:
        wave = rows[: _count_fitting(rows, decoder, budget.now)]
        if _fits(decoder, wave):
            rows = rows[len(wave) :]
            continue
        release_cached(decoder.device)
        budget.lower(len(wave), columns_of(wave))
        for row in wave:
            row.start()


def _count_fitting(rows: list[Row], decoder: Decoder, budget: int) -> int:
    """How many of the sorted rows, from the first on, share a loop; samples stay together."""
    longest, captured = 0, can_capture(decoder, rows)
    for count, row in enumerate(rows):
        uneven = len(rows[0].prompt.tokens) != len(row.prompt.tokens)
        longest = max(longest, row.completion)
        shape = count + 1, len(row.prompt.tokens) + longest  # prompts are sorted by length
        shape = allocation(*shape) if captured else shape
        if count and (math.prod(shape) > budget or (uneven and not decoder.pads)):
            return count
    return len(rows)


def _fits(decoder: Decoder, wave: list[Row]) -> bool:
    """Decode the rows; return False where memory runs out."""
    try:
        _decode(decoder, wave)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or is_sharded(decoder.core):
            raise  # the other processes are in the middle of the same forward
        return False
    finally:
        decoder.release()
    return True


def _decode(decoder: Decoder, rows: list[Row]) -> None:
    """Read the prompts of `rows`, then sample until every row has stopped."""
    if can_capture(decoder, rows):
        try:
            decode_in_graphs(decoder, rows)
            return
        except GraphError as error:
            refuse(decoder)
            log.warning(
                "sampling without CUDA graphs, several times slower, because %s. Samples are the "
                "same; their logprobs may differ in their last bits.",
                error,
            )
        for row in rows:
            row.start()
    _decode_by_steps(decoder, rows)


def _decode_by_steps(decoder: Decoder, rows: list[Row]) -> None:
    """One launch of every operation, and one transfer to the host, per token."""
    tokens = decoder.prefill([row.prompt for row in rows], [row.limit for row in rows])
    device = draw_device(decoder.device)
    tensors = SamplingTensors.of([row.params for row in rows], device)
    uniforms = torch.empty(0)
    for step in itertools.count():
        if step % DRAWS == 0:
            uniforms = take_uniforms([row.uniforms for row in rows]).to(device)
        logits = decoder.step(tokens.to(decoder.device)).to(device)
        tokens, logprobs = draw_tokens(logits, uniforms[step % DRAWS], tensors)
        _keep_top(rows, logits, tensors)
        # ids are exact in float64: one transfer for both
        drawn = torch.stack([tokens.double(), logprobs.double()]).tolist()
        ended = [
            row.push(int(token), logprob) for row, token, logprob in zip(rows, *drawn, strict=True)
        ]
        if any(ended):
            order = close_gaps(ended)
            if not order:
                return
            rows = [rows[i] for i in order]
            index = decoder.keep(order).to(device)
            tokens, uniforms = tokens[index], uniforms[:, index]
            tensors = SamplingTensors.of([row.params for row in rows], device)


def _keep_top(rows: list[Row], logits: torch.Tensor, tensors: SamplingTensors) -> None:
    """Store with each row that asks for them the likeliest tokens of this step, `(R, V)` logits."""
    if not (most := max(row.top_k for row in rows)):
        return
    columns = (x.tolist() for x in top_tokens(logits, tensors, most))
    for row, ids, values in zip(rows, *columns, strict=True):
        if row.top_k:
            row.top.append(list(zip(ids, values, strict=True))[: row.top_k])
