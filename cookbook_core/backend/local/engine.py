"""The local backend: one base model, one queue, any number of adapters, on this machine's torch.

`forward_backward` is the whole idea in a few lines: score with the graph kept, run the loss on
detached logprobs, push its gradient back through the kept graph. One forward, one backward, for
any loss. Micro-batches whose graphs would not fit in memory are scored without a graph first and
then again, one by one, with the gradient known: same result, one more forward for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cookbook_core.backend.local.model.adapters import Adapter, AdapterBank
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.sampling.sampler import sample_batch
from cookbook_core.backend.local.scoring.backward import (
    LossOf,
    Pass,
    backward,
    on_targets,
    on_vocabulary,
    once,
)
from cookbook_core.backend.local.scoring.memory_limits import Room
from cookbook_core.backend.local.scoring.scorer import Scorer
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.custom_loss import LossFn, LossResult, LossTypeInput, evaluate, merge_metrics
from cookbook_core.types import (
    Datum,
    ForwardBackwardOutput,
    SampleResponse,
    TensorData,
)

MERGE_FROM = 16
"""Completion tokens from which merging the adapter costs less than it saves (a pass or two)."""


class Engine:
    """The model and what computes with it. Every method runs in the worker thread."""

    def __init__(self, base: BaseModel, gradient_checkpointing: str = "auto") -> None:
        self.base = base
        self.scorer = Scorer(base.model, base.device)
        self.bank = AdapterBank(base)
        self.room = Room(base, self.scorer, gradient_checkpointing)

    def forward(
        self, adapter: Adapter, data: Sequence[Datum], loss_fn: LossFn
    ) -> ForwardBackwardOutput:
        """Logprobs and the value of `loss_fn`, without a gradient."""
        logprobs = self.score(adapter, data)
        return _output(logprobs, evaluate(loss_fn, data, logprobs), {})

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> ForwardBackwardOutput:
        """Accumulate the gradient of `loss_fn`; on any error nothing is accumulated."""
        tokens = sum(datum.model_input.length for datum in data)
        loss_of = partial(on_targets, loss_fn, data)
        if loss_type_input == "vocab_logprobs":
            params = list(adapter.slot.params.values())
            loss_of = partial(on_vocabulary, loss_fn, data, self.scorer, params)
        (logprobs, result, grads), passes = self.gradient(adapter, data, loss_of, loss_type_input)
        grads = [
            g if more is None else g + more
            for g, more in zip(grads, result.param_grads or [None] * len(grads), strict=True)
        ]
        output = _output(logprobs, result, {"passes": passes, "tokens": float(tokens)})
        adapter.accumulate(grads)
        return output

    def score(
        self, adapter: Adapter | None, data: Sequence[Datum], places: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Logprobs of every datum's target_tokens, without a graph, on the CPU."""
        with self.bank.active(adapter), torch.no_grad():
            scored = self.room.fitted(data, lambda: self.scorer.score(data), places)
            return [lp.cpu() for lp in scored]

    def gradient(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_of: LossOf,
        form: LossTypeInput,
        places: Sequence[int] | None = None,
    ) -> tuple[Pass, float]:
        """Score `data` in the form that `loss_of` takes, and push its gradient back.

        Returns:
            what `loss_of` gave, d loss / d params through the scores, and the number of passes.
        """
        score = self.scorer.score_batch if form == "logprobs" else self.scorer.hidden_batch
        loss_of = once(loss_of)
        # the attention stays switched until the backward, which may compute layers again
        packed = self.scorer.attention(packed=self.scorer.packs)
        with self.bank.active(adapter) as params, packed:

            def run() -> tuple[Pass, float]:
                kept, again = self.room.split(self.scorer.batches(data))
                done = backward(self.room.recomputing(score), loss_of, params, kept, again)
                return done, 2.0 if again else 1.0

            return self.room.fitted(data, run, places)

    def sample(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        """Completions of all requests, decoded together."""
        tokenizer = None
        if any(r.params.stop is None or _has_text(r.params.stop) for r in requests):
            tokenizer = self.base.tokenizer()
        longest = max(r.params.max_tokens or MERGE_FROM for r in requests)
        merged = self.bank.merged(adapter if longest >= MERGE_FROM else None)
        with self.bank.active(adapter), torch.no_grad(), merged:
            return sample_batch(self.base.model, tokenizer, requests)


def _has_text(stop: Any) -> bool:
    return isinstance(stop, str) or any(isinstance(s, str) for s in stop)


def _output(
    logprobs: Sequence[torch.Tensor], result: LossResult, backend_metrics: dict[str, float]
) -> ForwardBackwardOutput:
    """The answer to the caller; loss_fn_outputs is empty where the loss saw no target logprobs."""

    def pack(lp: torch.Tensor) -> TensorData:
        return TensorData(lp.numpy(), "float64" if lp.dtype == torch.float64 else "float32")

    return ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": pack(lp)} for lp in logprobs],
        metrics=merge_metrics(result, backend_metrics),
    )
