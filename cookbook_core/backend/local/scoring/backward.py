"""One pass for the micro-batches whose graphs fit in memory, two for the others: same gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from cookbook_core.backend.local.scoring.scorer import Batch, Scorer, in_order
from cookbook_core.backend.local.scoring.vocab_logprobs import VocabLogprobs
from cookbook_core.custom_loss import LossFn, LossResult, differentiate
from cookbook_core.types import Datum

Tensors: TypeAlias = Sequence[torch.Tensor]
Score: TypeAlias = Callable[[Batch], list[torch.Tensor]]
Scored: TypeAlias = tuple[list[torch.Tensor], LossResult]
"""Logprobs for the caller, and the loss with its gradient."""
LossOf: TypeAlias = Callable[[Tensors], Scored]
Pass: TypeAlias = tuple[list[torch.Tensor], LossResult, list[torch.Tensor]]


def on_targets(loss_fn: LossFn, data: Sequence[Datum], scored: Tensors) -> Scored:
    """The loss sees logprobs of target_tokens, on the CPU."""
    logprobs = [lp.detach().cpu() for lp in scored]
    return logprobs, differentiate(loss_fn, data, logprobs)


def on_vocabulary(
    loss_fn: LossFn, data: Sequence[Datum], scorer: Scorer, params: list[Any], hidden: Tensors
) -> Scored:
    """The loss sees logprobs of the whole vocabulary, computed from hidden states on demand.

    A trained unembedding takes part in the loss's own graph: hence `params`.
    """
    vocab_size = scorer.model.get_input_embeddings().weight.shape[0]

    def view(states: torch.Tensor) -> VocabLogprobs:
        return VocabLogprobs(states, lambda h: scorer.vocab_logprobs(h).cpu(), vocab_size)

    leaves = [h.detach() for h in hidden]
    return [], differentiate(loss_fn, data, leaves, view=view, params=params)


def once(loss_of: LossOf) -> LossOf:
    """A loss that runs the first time only and then gives what it gave: a user's loss runs exactly
    once, also where the forward has to be done again with less at a time."""
    found: list[Scored] = []

    def run(scored: Tensors) -> Scored:
        if not found:
            found.append(loss_of(scored))
        return found[0]

    return run


def backward(
    score: Score,
    loss_of: LossOf,
    params: list[Any],
    kept: Sequence[Batch],
    again: Sequence[Batch],
) -> Pass:
    """The loss of all batches and its gradient: graphs of `kept` are kept, `again` runs twice."""
    with torch.enable_grad():
        graphs = [(batch, score(batch)) for batch in kept]
    with torch.no_grad():
        bare = [(batch, score(batch)) for batch in again]
    logprobs, result = loss_of(in_order([*graphs, *bare]))
    total = [torch.zeros_like(p) for p in params]
    if graphs:
        scored = [lp for _, each in graphs for lp in each]
        at = [i for batch in kept for i in batch.indices]
        total = _pull_back(scored, params, [result.grads[i] for i in at])
        del graphs, scored
    for batch in again:
        with torch.enable_grad():
            scored = score(batch)
        grads = _pull_back(scored, params, [result.grads[i] for i in batch.indices])
        total = [t + g for t, g in zip(total, grads, strict=True)]
    return logprobs, result, total


def _pull_back(
    logprobs: Sequence[torch.Tensor], params: Sequence[Any], grads: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """d loss / d params from d loss / d logprobs, through the graph of the logprobs."""
    cotangents = [g.to(lp) for g, lp in zip(grads, logprobs, strict=True)]
    found = torch.autograd.grad(logprobs, params, cotangents, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
