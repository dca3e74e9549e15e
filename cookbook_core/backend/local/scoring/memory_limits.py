"""Memory limits: which graphs are kept, which layers recomputed, what changes after running out.

Two measures leave every result as it is, to the bit: a micro-batch whose graph is not kept is
scored a second time in the backward (`backward.ScoredBatch`), and one whose graph does not fit by
itself has its layers recomputed there (gradient checkpointing). They follow free memory. The size
of a micro-batch moves last bits, since matrix products of another shape round differently: it is a
constant of the device, and halved, with a warning, only where nothing else helps.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import is_out_of_memory, one_pass_tokens
from cookbook_core.backend.local.scoring.scorer import MicroBatch, Scorer
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.types import Datum

T = TypeVar("T")

MODES = ("auto", "on", "off")

log = logging.getLogger(__name__)


def check_mode(mode: str) -> None:
    """Raise ConfigError unless `mode` is one of MODES."""
    if mode not in MODES:
        expected = " or ".join(f'"{m}"' for m in MODES)
        raise ConfigError("gradient_checkpointing", "unknown", expected=expected, got=repr(mode))


@dataclass(frozen=True)
class Limits:
    """How much of a batch is in memory at a time, in tokens.

    graph_tokens: most tokens whose graphs are kept between forward and backward, over all
        micro-batches.
    micro_batch_tokens: most tokens per forward.
    """

    graph_tokens: int
    micro_batch_tokens: int

    def count_kept(self, batches: Sequence[MicroBatch]) -> int:
        """How many of the micro-batches, from the first on, have graphs that fit together."""
        total = itertools.accumulate(batch.tokens for batch in batches)
        return sum(1 for tokens in total if tokens <= self.graph_tokens)


class MemoryLimits:
    """The limits of one model on its device.

    Args:
        base: the model.
        scorer: makes the micro-batches.
        mode: gradient checkpointing: "on", "off", or "auto", for micro-batches whose graph does
            not fit into free memory.
    """

    def __init__(self, base: BaseModel, scorer: Scorer, mode: str = "auto") -> None:
        self.base, self.scorer, self.mode = base, scorer, mode
        self.graph_tokens: int | None = None
        """See `Limits`; None takes what fits into free memory at each call."""
        self._lowered: dict[int, Limits] = {}
        """After running out of memory: limits by the length of the longest datum then."""

    def limits(self, longest: int) -> Limits:
        """Return the limits for a batch whose longest datum has `longest` tokens.

        Limits that were lowered for data of this length or shorter apply; those lowered for longer
        data do not.
        """
        tokens = one_pass_tokens(self.base) if self.graph_tokens is None else self.graph_tokens
        lowered = [limits for length, limits in self._lowered.items() if length <= longest]
        return Limits(
            min([tokens, *(limits.graph_tokens for limits in lowered)]),
            min([self.scorer.micro_batch_tokens, *(x.micro_batch_tokens for x in lowered)]),
        )

    def fit(
        self,
        data: Sequence[Datum],
        run: Callable[[Limits], T],
        datum_indices: Sequence[int] | None = None,
        *,
        keeps_graphs: bool = False,
    ) -> T:
        """`run(limits)`; where the device runs out of memory, again with lower limits.

        Args:
            data: what `run` computes.
            run: the work.
            datum_indices: each datum's index in the caller's batch, for errors; None: 0 to D-1.
            keeps_graphs: whether `run` keeps graphs, so that keeping fewer may help.
        Raises:
            DatumError: the longest datum does not fit by itself.
        """
        lengths = [datum.model_input.length for datum in data]
        longest = max(lengths)
        limits = self.limits(longest)
        before = limits
        while True:
            try:
                result = run(limits)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # the traceback, which references the graphs, ended with that block
            torch.cuda.empty_cache()  # does nothing where there is no CUDA
            lowered = self._lower(limits, lengths, keeps_graphs)
            if lowered is None:
                at = lengths.index(longest)
                raise self._too_long(datum_indices[at] if datum_indices else at, longest)
            limits = lowered
        if limits != before:
            self._lowered[longest] = limits
        return result

    def _lower(self, limits: Limits, lengths: list[int], keeps_graphs: bool) -> Limits | None:
        """The next lower limits, after a warning; None where there are none."""
        longest, tokens = max(lengths), min(limits.graph_tokens, sum(lengths))
        if keeps_graphs and tokens > 0:
            fewer = tokens // 2 if tokens // 2 >= longest else 0
            log.warning(
                "out of memory: keeping the graphs of at most %d tokens instead of %d; the rest "
                "is scored twice. Results are the same to the bit.",
                fewer,
                tokens,
            )
            return Limits(fewer, limits.micro_batch_tokens)
        smaller = limits.micro_batch_tokens // 2
        if smaller < longest:
            return None
        log.warning(
            "out of memory: continuing with micro-batches of %d tokens instead of %d. Logprobs "
            "and gradients may change in their last bits.",
            smaller,
            limits.micro_batch_tokens,
        )
        return Limits(limits.graph_tokens, smaller)

    def _too_long(self, index: int, length: int) -> DatumError:
        fix = "Shorten it, or use a smaller model or lora_rank."
        if self.mode == "off":
            fix = 'Set gradient_checkpointing="auto", or shorten it.'
        return DatumError(
            f"data[{index}].model_input",
            "does not fit into memory",
            expected=f"about {one_pass_tokens(self.base)} tokens or fewer in the memory now free",
            got=length,
            fix=fix,
        )

    @contextmanager
    def recomputing(self, batch: MicroBatch, limits: Limits) -> Iterator[None]:
        """Inside, the layers of a micro-batch whose graph does not fit are checkpointed."""
        large = self.mode == "auto" and batch.tokens > limits.graph_tokens
        on = torch.is_grad_enabled() and (large or self.mode == "on")
        with recomputed(self.base.model, on=on):
            yield


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(model: Any, *, on: bool) -> Iterator[None]:
    """Inside, layers keep only their inputs for the backward, which recomputes the rest.

    About a third more time for a fraction of the graph. No effect on models whose layers are not
    built for it. Only the layers' own `training` flags are raised; the modules in them stay in
    eval mode: no dropout.
    """
    layers: list[Any] = []
    if on:
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _checkpoint
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
