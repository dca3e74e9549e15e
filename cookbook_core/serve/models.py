"""Base models, and the adapters that clients train on them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.serve.turns import Turns
from cookbook_core.types import ModelData


@dataclass(frozen=True)
class Base:
    """A base model that is served.

    name: what clients call it; a name on the Hub, so that they find the tokenizer.
    path: its folder or name here.
    backend: a LocalBackend.
    data: its sizes.
    """

    name: str
    path: str
    backend: Any
    data: ModelData


@dataclass
class Model:
    """One adapter in training.

    model_id: on the wire, SESSION:train:N.
    rank: of LoRA; None while a checkpoint that states it is being read.
    made: done once there is the adapter.
    training: the backend's adapter, once it is made.
    losses: the last values of the loss, for the page.
    saved_step: steps that are on disk.
    """

    model_id: str
    session: str
    base: Base
    rank: int | None
    turns: Turns
    user_metadata: Mapping[str, str] | None
    made: Future[Any]
    training: Any = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    tokens: int = 0
    passes: float = 0.0
    saved_step: int = 0
    used_at: float = field(default_factory=time.time)

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return 0 if self.training is None else self.training.steps

    def scored(self, future: Future[Any]) -> None:
        """Note the figures of a forward_backward that is done (a callback)."""
        if not future.cancelled() and future.exception() is None:
            metrics = future.result().metrics
            self.losses.append(metrics["loss:sum"])
            self.tokens += int(metrics["tokens"])
            self.passes = metrics["passes"]

    def saved(self, future: Future[Any]) -> None:
        """Note that the present step is on disk (a callback)."""
        if not future.cancelled() and future.exception() is None:
            self.saved_step = self.steps
