"""The engine: a custom loss in one forward and one backward, and sampling. One thread calls it.

`forward_backward` is the whole idea: score the batch with its graph, run the user's loss on the
detached logprobs, push the loss's gradient back through that graph. Micro-batches whose graphs do
not fit in memory are scored a second time in the backward: the same result to the bit, at the cost
of one more forward for them.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from typing import Any

from cookbook_core.backend.local.model.adapters import Adapter, AdapterBank
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import is_out_of_memory, total_bytes
from cookbook_core.backend.local.model.vision import missing_support
from cookbook_core.backend.local.sampling.cache_budget import CacheBudget
from cookbook_core.backend.local.sampling.sampler import sample_batch
from cookbook_core.backend.local.scoring.backward import BatchScores, ScoredBatch, views_of
from cookbook_core.backend.local.scoring.image_check import (
    check_chunks,
    check_images,
    no_images,
)
from cookbook_core.backend.local.scoring.loss_operands import OperandsFollow
from cookbook_core.backend.local.scoring.memory_limits import MemoryLimits
from cookbook_core.backend.local.scoring.scorer import Scorer
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.custom_loss import (
    LossFn,
    LossResult,
    LossTypeInput,
    differentiate,
    evaluate,
    merge_metrics,
)
from cookbook_core.datums import SCORE_MASK
from cookbook_core.errors import LossError, RequestError
from cookbook_core.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampleResponse,
    TensorData,
)

import torch

MERGE_FROM = 16
"""Completion tokens from which merging the adapter costs less than it saves (a pass or two)."""
MERGE_SHARE = 0.25
"""The part of the machine's memory that the merged copy of an adapter's layers may take."""


class Engine:
    """A base model and its adapters: score, differentiate, sample.

    Args:
        base: the model.
        gradient_checkpointing: see `MemoryLimits`.
        agree: see `Scorer`.
    """

    def __init__(
        self,
        base: BaseModel,
        gradient_checkpointing: str = "auto",
        agree: Callable[[Sequence[int]], Sequence[int]] = list,
    ) -> None:
        self.base = base
        self.scorer = Scorer(base.model, base.device, base.image_reader, agree)
        self.bank = AdapterBank(base)
        self.limits = MemoryLimits(base, self.scorer, gradient_checkpointing)
        self.budget = CacheBudget.of(base)
        self.budget.tokens = -agree([-self.budget.tokens])[0]

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
        kept: BatchScores | None = None,
    ) -> ForwardBackwardOutput:
        """Accumulate the gradient of `loss_fn`; on any error nothing is accumulated.

        Args:
            adapter: the adapter to compute with.
            data: D checked datums.
            loss_fn: see `LossFn`.
            loss_type_input: what the loss takes.
            kept: the scores of the same tokens under unchanged weights, from `forward_with_graph`.
        """
        check_images(self.scorer, data, adapter.slot.params)
        if kept is None:
            scoring = self.score_with_graph(adapter, data, loss_type_input)
        else:
            scoring = self._scored_before(adapter, data, kept)
        with scoring as scored:
            with self._in_loss(data, scored):
                result = differentiate(
                    loss_fn, data, scored.logprobs, views=scored.views, params=scored.loss_params
                )
            grads = _sum(scored.pull_back(result.grads), result.param_grads)
        tokens = sum(datum.model_input.length for datum in data)
        backend_metrics = {"passes": float(scored.passes), "tokens": float(tokens)}
        logprobs = scored.logprobs if loss_type_input == "logprobs" else []
        output = _output(logprobs, result, backend_metrics)  # refuses reserved metric names
        adapter.accumulate(grads)
        return output

    @contextmanager
    def _in_loss(self, data: Sequence[Datum], scored: BatchScores) -> Iterator[None]:
        """Inside, the loss runs.

        Raises:
            RequestError: it ran out of memory. It runs once, so this is not for us to repeat.
        """
        try:
            with self._operands_follow() if scored.views else contextlib.nullcontext():
                yield
        except LossError as error:
            cause = error.__cause__
            if cause is None or not is_out_of_memory(cause):
                raise
            for each in (cause, error):
                traceback.clear_frames(each.__traceback__)  # they reference the loss's tensors
            self.limits.keep_fewer(data, scored.limits)
            raise RequestError(
                error.where,
                "ran out of memory",
                expected=f"a loss whose tensors fit into the memory of {self.base.device} beside "
                "the graph",
                got=str(cause).partition("\n")[0],
                fix="Nothing was accumulated. Call again (fewer graphs will be kept), pass fewer "
                "datums, or index fewer rows of the vocabulary.",
            ) from cause

    def _operands_follow(self) -> AbstractContextManager[object]:
        """Inside, a loss over the vocabulary may mix in tensors of the CPU."""
        device = self.base.device
        return contextlib.nullcontext() if device.type == "cpu" else OperandsFollow(device)

    @contextmanager
    def score_with_graph(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_type_input: LossTypeInput = "logprobs",
        datum_indices: Sequence[int] | None = None,
    ) -> Iterator[BatchScores]:
        """Score a batch and keep its graph until the block ends.

        Args:
            adapter: the adapter to compute with.
            data: D checked datums.
            loss_type_input: what the loss takes.
            datum_indices: each datum's index in the caller's batch, for errors; None: 0 to D-1.
        """
        # the attention stays switched until the backward, which may compute layers again
        packed = self.scorer.attention(packed=self.scorer.packs_all(data))
        with self.bank.active(adapter) as params, packed:
            yield ScoredBatch(
                self.scorer, self.limits, data, params, loss_type_input, datum_indices
            )

    def forward(
        self,
        adapter: Adapter | None,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> ForwardBackwardOutput:
        """Logprobs and the value of `loss_fn`, without a gradient."""
        check_images(self.scorer, data, adapter.slot.params if adapter else {})
        if loss_type_input == "vocab_logprobs":
            return self._forward_vocabulary(adapter, data, loss_fn)
        logprobs = self.score(adapter, data)
        return _output(logprobs, evaluate(loss_fn, data, logprobs), {})

    @contextmanager
    def _scored_before(
        self, adapter: Adapter, data: Sequence[Datum], kept: BatchScores
    ) -> Iterator[BatchScores]:
        """The state in which `kept` was scored: the graph reads the parameters in its backward."""
        packed = self.scorer.attention(packed=self.scorer.packs_all(data))
        with self.bank.active(adapter, unchanged=True), packed:
            yield kept

    def forward_with_graph(
        self, adapter: Adapter, data: Sequence[Datum], loss_fn: LossFn
    ) -> tuple[ForwardBackwardOutput, BatchScores]:
        """`forward`, and the scores with their graph for `forward_backward(kept=...)`."""
        check_images(self.scorer, data, adapter.slot.params)
        with self.score_with_graph(adapter, data) as scored:
            result = evaluate(loss_fn, data, scored.logprobs)
        return _output(scored.logprobs, result, {}), scored

    def _forward_vocabulary(
        self, adapter: Adapter | None, data: Sequence[Datum], loss_fn: LossFn
    ) -> ForwardBackwardOutput:
        """`forward` over the whole vocabulary."""
        hidden = self.hidden(adapter, data)
        with self.bank.active(adapter), torch.no_grad():
            over = Event()
            pairs = zip(views_of(self.scorer, data, over), hidden, strict=True)
            logprobs: list[Any] = [view(each) for view, each in pairs]
            with self._operands_follow():
                output = _output([], evaluate(loss_fn, data, logprobs), {})
            over.set()
            return output

    def score(
        self,
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Compute the logprobs of every datum's target_tokens, without a graph.

        Args:
            adapter: the adapter to compute with; None for the base model.
            data: D checked datums with target_tokens `(N,)` or `(N, K)`.
            datum_indices: as in `score_with_graph`.

        Returns:
            D tensors `(N,)` or `(N, K)`, nats, float32 or better, on the CPU.
        """
        return self._without_graph(self.scorer.score, adapter, data, datum_indices)

    def hidden(
        self,
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Compute what `views_of` makes logprobs of the whole vocabulary of, without a graph.

        Args:
            adapter: the adapter to compute with; None for the base model.
            data: D checked datums.
            datum_indices: as in `score_with_graph`.

        Returns:
            D tensors `(N, H)` on the device.
        """
        return self._without_graph(self.scorer.hidden, adapter, data, datum_indices)

    def _without_graph(
        self,
        compute: Callable[[Sequence[Datum], int], list[torch.Tensor]],
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None,
    ) -> list[torch.Tensor]:
        """What `compute` gives for each datum, in micro-batches that fit into memory."""
        with self.bank.active(adapter), torch.no_grad():
            return self.limits.fit(
                data, lambda limits: compute(data, limits.micro_batch_tokens), datum_indices
            )

    def compute_logprobs(
        self, adapter: Adapter | None, data: Sequence[Datum]
    ) -> list[list[float | None]]:
        """log p of each prompt token, of prompts that are scored together.

        None at position 0, where nothing is scored, and at positions of images, which are not
        predicted.
        """
        check_images(self.scorer, data, adapter.slot.params if adapter else {}, "prompts")
        return [
            [None, *_where_scored(datum, lp)]
            for datum, lp in zip(data, self.score(adapter, data), strict=True)
        ]

    def check_prompt(self, prompt: ModelInput, where: str) -> None:
        """Check a prompt's images, by any thread: it is then computed together with others.

        Raises:
            DatumError: the model reads no images, or as `check_chunks`.
            ModelError: the model's processor cannot be loaded.
        """
        if not prompt.images:
            return
        if problem := missing_support(self.base.model):
            at = prompt.chunks.index(prompt.images[0])
            raise no_images(f"{where}.prompt.chunks[{at}]", problem)
        check_chunks(f"{where}.prompt", prompt, self.base.model, self.base.image_reader())

    def sample(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        """Completions of all requests, decoded together."""
        tower = None
        if prompts := [Datum(r.model_input) for r in requests if r.model_input is not None]:
            params = adapter.slot.params if adapter else {}
            check_images(self.scorer, prompts, params, "prompts")
            tower = self.scorer.tower()
        tokenizer = self.tokenizer_for(requests)
        longest = max(r.params.max_tokens or MERGE_FROM for r in requests)
        merged = self.merged(adapter) if longest >= MERGE_FROM else contextlib.nullcontext()
        with self.bank.active(adapter), torch.no_grad(), merged:
            return sample_batch(
                self.base.model,
                tokenizer,
                requests,
                budget=self.budget,
                head=self.scorer.head,
                tower=tower,
            )

    def tokenizer_for(self, requests: Sequence[SampleRequest]) -> Any:
        """The tokenizer, None where no request needs one to know where to stop."""
        needed = any(r.params.stop is None or _has_text(r.params.stop) for r in requests)
        return self.base.tokenizer() if needed else None

    def merged(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """Within the block, merge the adapter if the copy fits in MERGE_SHARE of memory.

        Total memory, not free memory: results must not depend on the machine's load.
        """
        return self.bank.merged(adapter if self._merges(adapter) else None)

    def _merges(self, adapter: Adapter | None) -> bool:
        room = MERGE_SHARE * total_bytes(self.base.device)
        return adapter is not None and self.bank.merged_bytes(adapter) <= room

    def machine(self, adapter: Adapter) -> dict[str, Any]:
        """What results depend on besides seed and data, down to their last bits."""
        device, dtype = self.base.device, self.base.model.dtype
        return {
            "device": str(device),
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "sharded": self.base.shards > 1,
            "micro_batch_tokens": self.scorer.micro_batch_tokens,
            "packed_rows": self.scorer.packs,
            "fused_layers": self.base.fused,
            "sampling_tokens": self.budget.tokens,
            "merged_for_sampling": self._merges(adapter),
        }


def _sum(grads: Sequence[torch.Tensor], more: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Add the gradient through the logprobs and the loss's direct gradient (param_grads)."""
    extra = more or [None] * len(grads)
    return [g if e is None else g + e for g, e in zip(grads, extra, strict=True)]


def _where_scored(datum: Datum, logprobs: torch.Tensor) -> list[float | None]:
    """The logprobs `(N,)` of a prompt's targets; None where none is wanted, and for images."""
    mask = datum.loss_fn_inputs.get(SCORE_MASK)
    scored = [True] * len(logprobs) if mask is None else mask.tolist()
    if datum.model_input.images:
        text = [key >= 0 for key in datum.model_input.keys()[1:]] + [True]
        scored = [a and b for a, b in zip(scored, text, strict=True)]
    return [lp if on else None for lp, on in zip(logprobs.tolist(), scored, strict=True)]


def _has_text(stop: Any) -> bool:
    return isinstance(stop, str) or any(isinstance(s, str) for s in stop)


def _output(
    logprobs: Sequence[torch.Tensor], result: LossResult, backend_metrics: dict[str, float]
) -> ForwardBackwardOutput:
    """Build the output for the caller; loss_fn_outputs is empty for vocab_logprobs."""

    def pack(lp: torch.Tensor) -> TensorData:
        return TensorData(lp.numpy(), "float64" if lp.dtype == torch.float64 else "float32")

    return ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": pack(lp)} for lp in logprobs],
        metrics=merge_metrics(result, backend_metrics),
    )
