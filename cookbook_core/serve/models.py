"""Base models, and the adapters that clients train on them.

Everything here runs in the event loop's thread; work is submitted to the backends, whose futures
come back from their worker threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cookbook_core.errors import ConfigError
from cookbook_core.serve import wire
from cookbook_core.serve.replies import Result
from cookbook_core.serve.turns import Turns
from cookbook_core.types import (
    AdamParams,
    ForwardBackwardOutput,
    ModelData,
    OptimStepResponse,
)

MEANS = ("grad_norm", "update_norm", "lr")
"""Metrics of which clients that join several answers take the mean; of others the sum."""


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
    base: the model it adapts.
    rank: of LoRA; None while a checkpoint that states it is being read.
    turns: the order of its requests.
    user_metadata: of the run.
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


# ---- results -------------------------------------------------------------------------------------


def wire_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the names of the wire: each ends in how clients join several answers."""
    named = {}
    for key, value in metrics.items():
        if key == "passes":
            key = "passes:max"
        elif ":" not in key:
            key = f"{key}:{'mean' if key in MEANS else 'sum'}"
        named[key] = float(value)
    return named


def scored_result(output: ForwardBackwardOutput) -> Result:
    """The result of a forward or forward_backward."""
    logprobs = [out["logprobs"].to_numpy() for out in output.loss_fn_outputs]
    metrics = wire_metrics({k: v for k, v in output.metrics.items() if k != "loss"})

    def as_json() -> dict[str, Any]:
        outputs = [{"logprobs": _json_tensor(array)} for array in logprobs]
        return {
            "type": "forward_backward", "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": outputs, "metrics": metrics,
        }  # fmt: skip

    return Result(as_json, lambda: wire.output_out(logprobs, metrics))


def _json_tensor(array: np.ndarray) -> dict[str, Any]:
    values = np.asarray(array, np.float32).reshape(-1).tolist()
    return {"data": values, "dtype": "float32", "shape": list(array.shape)}


def stepped_result(response: OptimStepResponse) -> Result:
    """The result of an optim_step."""
    metrics = wire_metrics(response.metrics or {})
    return Result(lambda: {"type": "optim_step", "metrics": metrics})


def adam_in(given: Mapping[str, Any]) -> AdamParams:
    """AdamW's parameters from JSON.

    Raises:
        ConfigError: another optimizer, an unknown field, or a value out of range.
    """
    params = {key: value for key, value in given.items() if value is not None}
    kind = params.pop("type", "adamw")
    if kind not in ("adam", "adamw"):
        fix = "Leave optimizer out."
        raise ConfigError("optimizer", "not supported", expected="adamw", got=kind, fix=fix)
    try:
        return AdamParams(**params)
    except TypeError:
        known = sorted(AdamParams.__dataclass_fields__)
        unknown = sorted(set(params) - set(known))
        rule, fix = ", ".join(known), f"Leave {unknown[0]} out: AdamW has no such parameter."
        raise ConfigError(
            "adam_params", "unknown field", expected=rule, got=unknown, fix=fix
        ) from None


def follow(model: Model, what: str) -> Callable[[Future[Any]], None]:
    """A callback that keeps the figures of the page: losses, tokens, saved steps."""

    def note(future: Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        if what == "forward_backward":
            metrics = future.result().metrics
            model.losses.append(metrics["loss:sum"])
            model.tokens += int(metrics["tokens"])
            model.passes = metrics["passes"]
        elif what == "save_weights":
            model.saved_step = model.steps

    return note
