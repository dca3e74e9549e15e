"""Memory limits: which graphs are kept, which layers recomputed, what changes after running out.

Of each micro-batch the whole graph is kept, or a checkpointed one (the inputs of the layers, which
are computed again in the backward), or none, and then the micro-batch is scored again in the
backward. Results are the same to the bit, so this follows free memory. The size of a micro-batch
moves last bits, since matrix products of another shape round differently: it is a function of the
model, the device and its total memory, and halved, with a warning, only where nothing else helps.

After running out of memory fewer graphs are kept; after some batches that succeed, more again. A
halved micro-batch stays halved as long as the engine lives: to double it again would move last bits
a second time, at a moment that depends on the memory's state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import (
    GraphBytes,
    count_graph_bytes,
    decoder_layers,
    estimate_graph_bytes,
    is_out_of_memory,
    release_cached,
    tokens_that_fit,
)
from cookbook_core.backend.local.scoring.micro_batches import MicroBatch
from cookbook_core.backend.local.scoring.scorer import Scorer
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.types import Datum

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

MODES = ("auto", "on", "off")
GROW_AFTER = 32
"""Batches that succeed before more graphs are kept again; twice as many before the next time."""
GROWTH = 4
"""A graph is counted again for a micro-batch this many times larger than the one counted last."""

Graph: TypeAlias = Literal["whole", "checkpointed"]
"""What is kept of a micro-batch's graph."""

log = logging.getLogger(__name__)


def check_mode(mode: str) -> None:
    """Raise ConfigError unless `mode` is one of MODES."""
    if mode not in MODES:
        expected = " or ".join(f'"{m}"' for m in MODES)
        raise ConfigError("gradient_checkpointing", "unknown", expected=expected, got=repr(mode))


@dataclass(frozen=True)
class Limits:
    """How much of a batch is in memory at a time, in tokens.

    graph_tokens: most tokens whose whole graphs are kept between forward and backward, over all
        micro-batches.
    micro_batch_tokens: most tokens per forward.
    checkpointed: memory of a token's checkpointed graph, as a share of its whole graph.
    """

    graph_tokens: int
    micro_batch_tokens: int
    checkpointed: float = 1.0


@dataclass
class _Lowered:
    """Limits after running out of memory.

    graph_tokens: one limit lower than the other; the last applies.
    micro_batch_tokens: None: as the scorer's.
    successes: batches since the last change.
    grow_after: successes after which the last of `graph_tokens` is taken off.
    """

    graph_tokens: list[int] = field(default_factory=list)
    micro_batch_tokens: int | None = None
    successes: int = 0
    grow_after: int = field(default_factory=lambda: GROW_AFTER)


class MemoryLimits:
    """The limits of one model on its device.

    Args:
        base: the model.
        scorer: makes the micro-batches.
        mode: gradient checkpointing: "on", "off", or "auto", for micro-batches whose whole graph
            does not fit into free memory.
    """

    def __init__(self, base: BaseModel, scorer: Scorer, mode: str = "auto") -> None:
        self.base, self.scorer, self.mode = base, scorer, mode
        self.graph_tokens: int | None = None
        """See `Limits`; None takes what fits into free memory at each call."""
        self._lowered: dict[int, _Lowered] = {}
        """After running out of memory, by the length of the longest datum then."""
        self._counted: dict[tuple[tuple[int, ...], Graph], tuple[int, float]] = {}
        """By parameters and graph: tokens of the micro-batch counted, and bytes per token."""
        self._recomputes = bool(decoder_layers(base.model))

    # ---- limits ----------------------------------------------------------------------------------

    def limits(self, longest: int, params: Sequence[torch.Tensor] = ()) -> Limits:
        """Return the limits for a batch whose longest datum has `longest` tokens.

        Limits that were lowered for data of this length or shorter apply; those lowered for longer
        data do not.

        Args:
            longest: tokens.
            params: the parameters whose gradients the batch's graphs are for.
        """
        size = self.graph_bytes(params)
        tokens = self.graph_tokens
        if tokens is None:
            features = self.scorer.bytes_to_come()
            tokens = tokens_that_fit(self.base.device, size.whole, features)
        lowered = [entry for length, entry in self._lowered.items() if length <= longest]
        micro = self.scorer.micro_batch_tokens
        return Limits(
            min([tokens, *(entry.graph_tokens[-1] for entry in lowered if entry.graph_tokens)]),
            min([micro, *(entry.micro_batch_tokens or micro for entry in lowered)]),
            size.checkpointed / size.whole,
        )

    def graph_bytes(self, params: Sequence[torch.Tensor]) -> GraphBytes:
        """Bytes that graphs keep per token: counted, or estimated where none was kept so far."""
        key = tuple(map(id, params))
        estimate = estimate_graph_bytes(self.base.model)
        whole = self._counted.get((key, "whole"), (0, estimate.whole))[1]
        less = self._counted.get((key, "checkpointed"), (0, estimate.checkpointed))[1]
        return GraphBytes(whole, min(less, whole))

    def plan(self, batches: Sequence[MicroBatch], limits: Limits) -> list[Graph | None]:
        """Decide what to keep of each micro-batch's graph; None: nothing.

        First come checkpointed graphs of micro-batches whose whole graph does not fit by itself:
        not kept, they would be computed three times. The rest is for the first micro-batches, whole
        graphs before checkpointed ones.

        Over a sharded model the other processes decide at the same time, and a micro-batch is
        scored again in all of them or in none.
        """
        large = [self.graph_alone(batch, limits) == "checkpointed" for batch in batches]
        cost = {"whole": 1.0, "checkpointed": limits.checkpointed}
        free = float(limits.graph_tokens)
        plan: list[Graph | None] = [None] * len(batches)
        for wanted in (True, False):
            for number, batch in enumerate(batches):
                if large[number] != wanted:
                    continue
                for graph in self._graphs(large[number]):
                    if plan[number] is None and batch.tokens * cost[graph] <= free:
                        free -= batch.tokens * cost[graph]
                        plan[number] = graph
        again = self.scorer.agree([graph is None for graph in plan])
        return [None if dropped else graph for graph, dropped in zip(plan, again, strict=True)]

    def _graphs(self, large: bool) -> Sequence[Graph]:
        """The graphs that may be kept of a micro-batch, the best first."""
        if self.mode == "off" or not self._recomputes:
            return ("whole",)
        return ("checkpointed",) if large else ("whole", "checkpointed")

    def graph_alone(self, batch: MicroBatch, limits: Limits) -> Graph:
        """The graph to make of a micro-batch while no other graph is kept."""
        large = self.mode == "on" or (self.mode == "auto" and batch.tokens > limits.graph_tokens)
        return "checkpointed" if large and self._recomputes else "whole"

    # ---- running out of memory -------------------------------------------------------------------

    def fit(
        self,
        data: Sequence[Datum],
        run: Callable[[Limits], T],
        datum_indices: Sequence[int] | None = None,
        params: Sequence[torch.Tensor] | None = None,
        limits: Limits | None = None,
    ) -> T:
        """`run(limits)`; where the device runs out of memory, again with lower limits.

        Args:
            data: what `run` computes.
            run: the work.
            datum_indices: each datum's index in the caller's batch, for errors; None: 0 to D-1.
            params: those whose gradients are computed with the graphs that `run` keeps; None: it
                keeps none, so that keeping fewer cannot help.
            limits: to start with; None: `self.limits`.
        Raises:
            DatumError: the longest datum does not fit by itself.
        """
        lengths = [datum.model_input.length for datum in data]
        longest = max(lengths, default=0)
        limits = limits or self.limits(longest, params or ())
        before = limits
        while True:
            try:
                result = run(limits)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.base.shards > 1:
                    raise  # sharded: the other processes are inside this forward
            # the traceback, which references the graphs, ended with that block
            release_cached(self.base.device)
            lowered = self._lower(limits, lengths, params is not None)
            if lowered is None:
                at = lengths.index(longest)
                raise self._too_long(datum_indices[at] if datum_indices else at, longest)
            limits = lowered
        if limits != before:
            self._keep_lowered(longest, before, limits)
        elif params is not None:
            self._grow(longest)
        return result

    def _lower(self, limits: Limits, lengths: list[int], keeps_graphs: bool) -> Limits | None:
        """The next lower limits, after a warning; None where there are none."""
        longest = max(lengths)
        if keeps_graphs and limits.graph_tokens > 0:
            fewer = self._fewer_graphs(limits, lengths)
            log.warning(
                "out of memory: keeping the graphs of at most %d tokens instead of %d; the rest "
                "is computed twice. Results are the same to the bit.",
                fewer,
                min(limits.graph_tokens, sum(lengths)),
            )
            return replace(limits, graph_tokens=fewer)
        smaller = limits.micro_batch_tokens // 2
        if smaller < longest:
            return None
        log.warning(
            "out of memory: continuing with micro-batches of %d tokens instead of %d. Logprobs "
            "and gradients may change in their last bits.",
            smaller,
            limits.micro_batch_tokens,
        )
        return replace(limits, micro_batch_tokens=smaller)

    def _fewer_graphs(self, limits: Limits, lengths: list[int]) -> int:
        """The next lower limit of graph_tokens: half; all graphs checkpointed; none."""
        longest, total = max(lengths), sum(lengths)
        least = math.ceil(total * limits.checkpointed) if self._graphs(True) != ("whole",) else 0
        tokens = min(limits.graph_tokens, least if self.mode == "on" else total)
        if tokens // 2 >= longest:
            return tokens // 2
        return least if least < tokens else 0

    def keep_fewer(self, data: Sequence[Datum], limits: Limits) -> None:
        """Keep fewer graphs of later batches like this one: its loss ran out of memory."""
        lengths = [datum.model_input.length for datum in data]
        fewer = replace(limits, graph_tokens=self._fewer_graphs(limits, lengths))
        self._keep_lowered(max(lengths), limits, fewer)

    def _keep_lowered(self, longest: int, before: Limits, after: Limits) -> None:
        """Apply lowered limits to later batches whose longest datum is of this length or longer."""
        entry = self._lowered.setdefault(longest, _Lowered())
        if after.micro_batch_tokens < before.micro_batch_tokens:
            entry.micro_batch_tokens = after.micro_batch_tokens
        if after.graph_tokens < before.graph_tokens:
            entry.graph_tokens.append(after.graph_tokens)
        entry.successes = 0

    def _grow(self, longest: int) -> None:
        """Count a batch that succeeded; after enough of them, keep more graphs again."""
        for length, entry in self._lowered.items():
            if length > longest or not entry.graph_tokens:
                continue
            entry.successes += 1
            if entry.successes >= entry.grow_after:
                entry.graph_tokens.pop()
                entry.successes, entry.grow_after = 0, 2 * entry.grow_after

    def _too_long(self, index: int, length: int) -> DatumError:
        fix = "Shorten it, or use a smaller model or lora_rank."
        if self.mode == "off":
            fix = 'Set gradient_checkpointing="auto", or shorten it.'
        fits = tokens_that_fit(self.base.device, self.graph_bytes(()).whole)
        return DatumError(
            f"data[{index}].model_input",
            "does not fit into memory",
            expected=f"about {fits} tokens or fewer in the memory now free",
            got=length,
            fix=fix,
        )

    # ---- making graphs ---------------------------------------------------------------------------

    @contextmanager
    def making(
        self, graph: Graph | None, batch: MicroBatch, params: Sequence[torch.Tensor]
    ) -> Iterator[None]:
        """Inside, scoring a micro-batch makes this graph; its first ones are counted."""
        model = self.base.model
        with torch.set_grad_enabled(graph is not None), ExitStack() as stack:
            stack.enter_context(recomputed(model, on=graph == "checkpointed"))
            if graph is None:
                yield
                return
            key = (tuple(map(id, params)), graph)
            if batch.tokens < GROWTH * self._counted.get(key, (0, 0.0))[0]:
                yield
                return
            count = stack.enter_context(count_graph_bytes(model))
            yield
            self._counted[key] = batch.tokens, max(1, count()) / batch.tokens


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(model: Any, *, on: bool) -> Iterator[None]:
    """Inside, layers keep only their inputs for the backward, which recomputes the rest.

    About a third more time for a fraction of the graph. No effect on models whose layers are not
    built for it. Only the layers' own `training` flags are raised; the modules in them stay in
    eval mode: no dropout.
    """
    layers = decoder_layers(model) if on else []
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _checkpoint
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
