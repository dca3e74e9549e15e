"""How much of a batch is in memory at a time, and what gives when that is too much.

In this order: graphs that do not fit into free memory are not kept (`passes`); where a micro-batch
alone does not fit, its layers are computed again in the backward (gradient checkpointing); where
the accelerator runs out all the same, micro-batches are halved and the work is done again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import one_pass_tokens
from cookbook_core.backend.local.scoring.backward import Score
from cookbook_core.backend.local.scoring.scorer import Batch, Scorer
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


class Room:
    """The room one model has on its device.

    Args:
        base: the model.
        scorer: whose micro-batches are made to fit.
        mode: gradient checkpointing: "on", "off", or "auto", for micro-batches whose graph does
            not fit into free memory.
    """

    def __init__(self, base: BaseModel, scorer: Scorer, mode: str = "auto") -> None:
        self.base, self.scorer, self.mode = base, scorer, mode
        self.one_pass_tokens: int | None = None
        """Tokens whose graph is kept; None asks free memory at each call."""
        self._limit = 0

    def split(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """The first batches, whose graphs fit together, and the others."""
        limit = self.one_pass_tokens
        self._limit = one_pass_tokens(self.base) if limit is None else limit
        total = itertools.accumulate(batch.tokens for batch in batches)
        fitting = sum(1 for tokens in total if tokens <= self._limit)
        return list(batches[:fitting]), list(batches[fitting:])

    def recomputing(self, score: Score) -> Score:
        """`score`, with gradient checkpointing for the batches that need it."""

        def run(batch: Batch) -> list[torch.Tensor]:
            large = self.mode == "auto" and batch.tokens > self._limit
            on = torch.is_grad_enabled() and (large or self.mode == "on")
            with recomputed(self.base.model, on=on):
                return score(batch)

        return run

    def fitted(
        self, data: Sequence[Datum], run: Callable[[], T], places: Sequence[int] | None = None
    ) -> T:
        """`run()`; where the accelerator's memory does not do, again with half as much at a time.

        Args:
            data: what `run` computes.
            run: the work.
            places: what errors call the datums; None: by their index.
        Raises:
            DatumError: the longest datum does not fit by itself.
        """
        lengths = [datum.model_input.length for datum in data]
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                tokens = self.scorer.micro_batch_tokens
            torch.cuda.empty_cache()  # does nothing where there is no CUDA
            fit = one_pass_tokens(self.base)
            if tokens // 2 >= max(lengths):
                self.scorer.micro_batch_tokens = tokens // 2
                if self._limit:
                    self.one_pass_tokens = self._limit // 2
                log.warning(
                    "out of memory: going on with micro-batches of %d tokens instead of %d. "
                    "Gradients are not affected.",
                    tokens // 2,
                    tokens,
                )
            elif self.mode == "auto":
                self.mode = "on"
                log.warning("out of memory: going on with gradient checkpointing.")
            else:
                longest = lengths.index(max(lengths))
                where = f"data[{places[longest] if places else longest}].model_input"
                rule = f"about {fit} tokens or fewer in the memory that is free now"
                mend = "Shorten it, or take a smaller model or lora_rank."
                if self.mode == "off":
                    mend = 'Set gradient_checkpointing="auto", or shorten it.'
                raise DatumError(
                    where, "does not fit into memory", expected=rule, got=max(lengths), fix=mend
                ) from None


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(model: Any, *, on: bool) -> Iterator[None]:
    """Within: layers keep their inputs alone for the backward, which computes the rest again.

    About a third more time for a fraction of the graph. No effect on models whose layers are not
    built for it. Only the layers' own `training` flags are raised; what is in them stays in eval
    mode: no dropout.
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
