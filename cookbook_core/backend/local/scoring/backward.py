"""A batch that was scored, and its backward: one pass where graphs are kept, two where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
from typing import Protocol, TypeAlias

from cookbook_core.backend.local.scoring.memory_limits import Graph, Limits, MemoryLimits
from cookbook_core.backend.local.scoring.micro_batches import MicroBatch
from cookbook_core.backend.local.scoring.scorer import (
    Scorer,
    in_order,
    logprob_cotangents,
    logprobs_of_data,
)
from cookbook_core.backend.local.scoring.vocab_logprobs import VocabLogprobs
from cookbook_core.custom_loss import LossTypeInput
from cookbook_core.datums import temperature_of
from cookbook_core.errors import RequestError
from cookbook_core.types import Datum

import torch

View: TypeAlias = Callable[[torch.Tensor], VocabLogprobs]


class BatchScores(Protocol):
    """A scored batch whose gradient can be pulled back; see `ScoredBatch` for the attributes."""

    logprobs: list[torch.Tensor]
    limits: Limits
    views: list[View] | None
    loss_params: list[torch.Tensor]
    passes: int

    def pull_back(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute d loss / d params, one tensor per parameter, from d loss / d logprobs."""
        ...


class ScoredBatch:
    """The scores of a batch, and what is needed to push their gradient back to the parameters.

    Micro-batches are independent: each is scored, and each pulled back by itself, in order. The
    gradients are summed in that order too, so it makes no difference to the bit which of the
    graphs were kept.

    Args:
        scorer: scores micro-batches.
        memory: decides which graphs are kept.
        data: D checked datums.
        params: parameters to differentiate.
        loss_type_input: "logprobs", or "vocab_logprobs".
        datum_indices: each datum's index in the caller's batch, for errors; None: 0 to D-1.
    Attributes:
        logprobs: D detached tensors. For "logprobs" those of the target tokens, `(N,)` or `(N, K)`,
            nats, on the CPU. For "vocab_logprobs" hidden states `(N, H)` on the device; `views`
            make logprobs `(N, V)` of them.
        limits: those that the batch was scored with.
        views: one for each datum, see `logprobs`; None for "logprobs".
        loss_params: parameters that the loss depends on through `views`: a trained unembedding.
        passes: 1, or 2 where a micro-batch was scored twice.
    """

    def __init__(
        self,
        scorer: Scorer,
        memory: MemoryLimits,
        data: Sequence[Datum],
        params: Sequence[torch.Tensor],
        loss_type_input: LossTypeInput = "logprobs",
        datum_indices: Sequence[int] | None = None,
    ) -> None:
        self._scorer, self._memory = scorer, memory
        self._data, self._params, self._datum_indices = data, params, datum_indices
        self._batches: list[MicroBatch] = []
        self._micro_batch_tokens = 0
        self._graphs: dict[int, torch.Tensor] = {}
        """By number of the micro-batch, scores with their graph."""
        self._whole_vocabulary = loss_type_input == "vocab_logprobs"
        self.passes = 1
        self.views = views_of(scorer, data) if self._whole_vocabulary else None
        self.loss_params = list(params) if self._whole_vocabulary else []
        self.limits = memory.limits(
            max((datum.model_input.length for datum in data), default=0), params
        )
        self.logprobs = self._fit(self._score_all)

    def pull_back(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute d loss / d params from d loss / d logprobs; uses the graphs up.

        Args:
            grads: D tensors shaped like logprobs.

        Returns:
            One tensor per parameter, in its shape.
        """
        return self._fit(partial(self._pull_back_all, grads))

    def _fit(self, run: Callable[[Limits], list[torch.Tensor]]) -> list[torch.Tensor]:
        # free memory is asked for once, before the first graph takes some of it
        indices, params = self._datum_indices, self._params
        return self._memory.fit(self._data, run, indices, params, self.limits)

    def _score_all(self, limits: Limits) -> list[torch.Tensor]:
        """Detached scores in the order of the data; the graphs that fit are kept."""
        self.limits, self._graphs = limits, {}
        batches = self._micro_batches(limits)
        plan = self._memory.plan(batches, limits)
        self.passes = 2 if None in plan else 1
        scores = []
        for number, (batch, graph) in enumerate(zip(batches, plan, strict=True)):
            own = self._score(batch, graph)
            if graph is not None:
                self._graphs[number] = own
            scores.append(own.detach())
        if not self._whole_vocabulary:
            return logprobs_of_data(batches, scores)
        pairs = zip(batches, scores, strict=True)
        return in_order(batches, [self._scorer.hidden_of_data(b, own) for b, own in pairs])

    def _pull_back_all(self, grads: Sequence[torch.Tensor], limits: Limits) -> list[torch.Tensor]:
        batches = self._micro_batches(limits)
        graphs, self._graphs = self._graphs, {}  # released even if this attempt fails
        cotangents = None
        if not self._whole_vocabulary:
            cotangents = logprob_cotangents(batches, grads, self._scorer.device)
        totals: list[torch.Tensor | None] = [None] * len(self._params)
        for number, batch in enumerate(batches):
            scores = graphs.pop(number, None)
            if scores is None:
                self.passes = 2
                scores = self._score(batch, self._memory.graph_alone(batch, limits))
            if not batch.data:
                own = torch.zeros_like(scores)
            elif cotangents is None:
                own = self._scorer.hidden_cotangent(batch, [grads[i] for i in batch.indices])
            else:
                own = cotangents[number]
            parts = torch.autograd.grad(scores, self._params, own, allow_unused=True)
            del scores
            _add(totals, parts)
        return [
            torch.zeros_like(p) if t is None else t
            for t, p in zip(totals, self._params, strict=True)
        ]

    def _micro_batches(self, limits: Limits) -> list[MicroBatch]:
        if limits.micro_batch_tokens != self._micro_batch_tokens:
            self._batches = self._scorer.batches(self._data, limits.micro_batch_tokens)
            self._micro_batch_tokens = limits.micro_batch_tokens
            self._graphs = {}
        return self._batches

    def _score(self, batch: MicroBatch, graph: Graph | None) -> torch.Tensor:
        score = self._scorer.hidden_batch if self._whole_vocabulary else self._scorer.score_batch
        with self._memory.making(graph, batch, self._params):
            return score(batch)


def views_of(scorer: Scorer, data: Sequence[Datum], over: Event | None = None) -> list[View]:
    """For each datum: hidden states `(N, H)` -> the logprobs `(N, V)` that they give, at the
    datum's temperature, lazily by row.

    With a frozen unembedding, rows may be computed later, whichever adapter is active then; with a
    trained one they are refused once `over` is set.

    No method of a batch: one that holds its own method is freed by the garbage collector alone, and
    its tensors with it.
    """
    vocab_size = scorer.model.get_input_embeddings().weight.shape[0]
    linear = scorer.head.frozen() if scorer.head else None

    def to_logprobs(rows: torch.Tensor, temperature: float) -> torch.Tensor:
        if over is not None and over.is_set() and linear is None and scorer.head is not None:
            raise RequestError(
                "vocab_logprobs",
                "rows were asked for after the request",
                expected="an adapter without LoRA on the unembedding",
                got="one that trains it, and whose weights may have changed",
                fix="Index the rows inside the loss: rows[:].",
            )
        found = scorer.vocab_logprobs(rows, temperature, linear)
        # a Mac's CPU shares the memory, and mps lacks the float64 of other operands
        return found.cpu() if found.device.type == "mps" else found

    def view(temperature: float, hidden: torch.Tensor) -> VocabLogprobs:
        return VocabLogprobs(hidden, partial(to_logprobs, temperature=temperature), vocab_size)

    return [partial(view, temperature_of(datum)) for datum in data]


def _add(totals: list[torch.Tensor | None], parts: Sequence[torch.Tensor | None]) -> None:
    """Add a micro-batch's gradients to the sums so far, in place; None is zero."""
    sums, more = [], []
    for i, (total, part) in enumerate(zip(totals, parts, strict=True)):
        if total is None:
            totals[i] = part
        elif part is not None:
            sums.append(total)
            more.append(part)
    if sums:
        torch._foreach_add_(sums, more)  # pyright: ignore[reportPrivateImportUsage]
