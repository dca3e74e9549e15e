"""Base models, and the adapters that clients train on them.

Everything here runs in the event loop's thread; work is submitted to the backends, whose futures
come back from their worker threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cookbook_core.builtin_losses import builtin_loss, needed_inputs
from cookbook_core.custom_loss import LossFn
from cookbook_core.datums import check_data, input_key
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.serve import wire
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.serve.replies import Result
from cookbook_core.serve.turns import Turns
from cookbook_core.types import (
    AdamParams,
    Datum,
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


@dataclass(frozen=True)
class Scoring:
    """A forward or forward_backward as a client sent it, decoded and checked.

    error: why it cannot be computed; the request then fails in its turn, so that the numbers of
        the client's requests have no gap.
    """

    model_id: str
    seq: int | None
    forward_only: bool
    data: list[Datum] = field(default_factory=list)
    loss: LossFn | None = None
    error: Exception | None = None

    def start(self, model: Model) -> Future[ForwardBackwardOutput]:
        """Submit it.

        Raises:
            CookbookError: its error.
        """
        if self.error is not None:
            raise self.error
        assert self.loss is not None
        if self.forward_only:
            return model.training.forward(self.data, self.loss, keep_graph=True)
        return model.training.forward_backward(self.data, self.loss)


def chosen_loss(
    name: str, config: Mapping[str, Any], graphs: Mapping[str, GraphLoss]
) -> tuple[LossFn, list[str]]:
    """The loss that a request names, and the loss_fn_inputs that each datum needs.

    Args:
        name: a built-in loss, or "custom".
        config: its options; for "custom" {"loss_id": ...}.
        graphs: uploaded losses of the client's session, by id.

    Raises:
        ConfigError: unknown or not supported, with the nearest that is.
    """
    if name == "custom":
        loss = graphs.get(str(config.get("loss_id")))
        if loss is None or set(config) != {"loss_id"}:
            fix = "Upload it first: ServiceClient.create_custom_loss()."
            what = "no such loss in this session"
            raise ConfigError("loss_fn_config", what, got=f"{dict(config)!r:.80}", fix=fix)
        return loss, loss.needs
    if name == "stable_reinforce":
        raise ConfigError(
            "loss_fn",
            "stable_reinforce is not supported: its formula is not public",
            expected="cross_entropy, importance_sampling, ppo, cispo or dro",
            got=name,
            fix='Pass loss_fn=importance_sampling, or "ppo".',
        )
    loss = builtin_loss(name, dict(config))
    return loss, list(needed_inputs(name))


def check_scoring(
    data: Sequence[Datum], loss: LossFn, needs: Sequence[str], base: ModelData
) -> None:
    """Validate a batch as the in-process client does, and that no input would be ignored.

    Raises:
        DatumError: names datum and field.
    """
    size, context = base.vocab_size, base.max_context_length
    check_data(data, vocab_size=size, max_context_length=context, needs=needs)
    if isinstance(loss, GraphLoss):
        return  # its client sends datums whole
    for i, datum in enumerate(data):
        used = {"target_tokens", "weights", *needs, *(input_key(datum, key) for key in needs)}
        for key in datum.loss_fn_inputs:
            if key not in used:
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                rule, fix = ", ".join(sorted(used)), "Leave it out: this loss does not read it."
                raise DatumError(where, "not an input of this loss", expected=rule, fix=fix)


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
        rule = ", ".join(known)
        raise ConfigError("adam_params", "unknown field", expected=rule, got=unknown) from None


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
