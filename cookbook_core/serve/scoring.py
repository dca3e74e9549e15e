"""A forward or forward_backward: its body decoded, its loss found, its data checked; its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook_core.builtin_losses import builtin_loss, needed_inputs
from cookbook_core.custom_loss import LossFn
from cookbook_core.datum_checks import check_data
from cookbook_core.datums import input_key
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.serve import fields, wire
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.types import Datum, ForwardBackwardOutput, ModelData

import numpy as np

MEANS = ("grad_norm", "update_norm", "lr")
"""Metrics of which clients that join several answers take the mean; of others the sum."""


@dataclass(frozen=True)
class Scoring:
    """Whose request it is; the rest is decoded by `batch`, which may fail.

    parts: decodes the name of the loss, its options, the datums.
    """

    model_id: str
    seq: int | None
    forward_only: bool
    parts: Callable[[], tuple[str, Mapping[str, Any], list[Datum]]]

    def batch(self, graphs: Mapping[str, GraphLoss], base: ModelData) -> tuple[list[Datum], LossFn]:
        """The datums and the loss, checked as the in-process client does.

        Args:
            graphs: uploaded losses of the client's session, by id.
            base: sizes of the model.

        Raises:
            CookbookError: says what is wrong, or would be ignored.
        """
        name, config, data = self.parts()
        if name == "custom":
            loss, needs = _uploaded(config, graphs)
        else:
            loss, needs = _built_in(name, config)
        size, context = base.vocab_size, base.max_context_length
        check_data(data, vocab_size=size, max_context_length=context, needs=needs)
        if name != "custom":  # clients of an uploaded loss send datums whole
            _check_inputs(data, needs)
        return data, loss


def _uploaded(
    config: Mapping[str, Any], graphs: Mapping[str, GraphLoss]
) -> tuple[LossFn, list[str]]:
    loss = graphs.get(str(config.get("loss_id")))
    if loss is None or set(config) != {"loss_id"}:
        what, got = "no such loss in this session", f"{dict(config)!r:.80}"
        fix = "Upload it first: ServiceClient.create_custom_loss()."
        raise ConfigError("loss_fn_config", what, got=got, fix=fix)
    return loss, loss.needs


def _built_in(name: str, config: Mapping[str, Any]) -> tuple[LossFn, Sequence[str]]:
    if name == "stable_reinforce":
        what = "stable_reinforce is not supported: its formula is not public"
        rule, fix = "cross_entropy, importance_sampling, ppo, cispo or dro", 'Pass loss_fn="ppo".'
        raise ConfigError("loss_fn", what, expected=rule, got=name, fix=fix)
    return builtin_loss(name, dict(config)), needed_inputs(name)


def _check_inputs(data: Sequence[Datum], needs: Sequence[str]) -> None:
    """Raise DatumError for an input that the loss does not read."""
    for i, datum in enumerate(data):
        used = {"target_tokens", "weights", *needs, *(input_key(datum, key) for key in needs)}
        for key in datum.loss_fn_inputs:
            if key not in used:
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                rule, fix = ", ".join(sorted(used)), "Leave it out: this loss does not read it."
                raise DatumError(where, "not an input of this loss", expected=rule, fix=fix)


def proto_scoring(raw: bytes, forward_only: bool) -> Scoring:
    """The request of a protobuf body.

    Raises:
        RequestError: not such a message.
    """
    message = wire.parse("Request", raw)

    def parts() -> tuple[str, Mapping[str, Any], list[Datum]]:
        config: dict[str, Any] = dict(message.loss_fn_config)
        for key, option in message.loss_fn_config_v2.items():
            config[key] = option.text if option.HasField("text") else option.number
        return message.loss_fn, config, wire.datums_in(message.data)

    only = forward_only or message.forward_only
    return Scoring(message.model_id, message.seq_id or None, only, parts)


def json_scoring(raw: bytes, forward_only: bool) -> Scoring:
    """The request of a JSON body, whose content is in forward_input or forward_backward_input.

    Raises:
        RequestError: not JSON, or without a model.
    """
    body = Fields(fields.parse_json(raw))

    def parts() -> tuple[str, Mapping[str, Any], list[Datum]]:
        inner = body.inner("forward_input" if forward_only else "forward_backward_input")
        body.end()
        config = fields.loss_config(inner.mapping("loss_fn_config", None))
        name, data = inner.text("loss_fn"), fields.datums_in(inner.items("data"))
        inner.end()
        return name, config, data

    return Scoring(body.text("model_id"), body.integer("seq_id", None), forward_only, parts)


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


def scored(output: ForwardBackwardOutput, proto: bool) -> Any:
    """The reply of a forward or forward_backward."""
    logprobs = [np.asarray(o["logprobs"].to_numpy(), np.float32) for o in output.loss_fn_outputs]
    metrics = wire_metrics({k: v for k, v in output.metrics.items() if k != "loss"})
    if proto:
        return wire.output_out(logprobs, metrics)
    tensors = [
        {"data": array.reshape(-1).tolist(), "dtype": "float32", "shape": list(array.shape)}
        for array in logprobs
    ]
    return {
        "type": "forward_backward", "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [{"logprobs": tensor} for tensor in tensors], "metrics": metrics,
    }  # fmt: skip
