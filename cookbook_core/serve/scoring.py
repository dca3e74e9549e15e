"""A forward or forward_backward as a client sent it: decoded, its loss found, its data checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cookbook_core.builtin_losses import builtin_loss, needed_inputs
from cookbook_core.custom_loss import LossFn
from cookbook_core.datums import check_data, input_key
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.serve import fields, wire
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from cookbook_core.types import Datum, ForwardBackwardOutput, ModelData

Parts = tuple[str, Mapping[str, Any], list[Datum]]
"""The name of the loss, its options, the datums."""


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

    def start(self, training: Any) -> Future[ForwardBackwardOutput]:
        """Submit it to a backend's adapter.

        Raises:
            CookbookError: its error.
        """
        if self.error is not None:
            raise self.error
        assert self.loss is not None
        if self.forward_only:
            return training.forward(self.data, self.loss, keep_graph=True)
        return training.forward_backward(self.data, self.loss)


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


# ---- decoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Whose request it is, and what is left to decode, which may fail."""

    model_id: str
    seq: int | None
    forward_only: bool
    parts: Callable[[], Parts]


def proto_head(raw: bytes, forward_only: bool) -> Head:
    """The head of a protobuf body.

    Raises:
        RequestError: not such a message.
    """
    message = wire.parse("Request", raw)

    def parts() -> Parts:
        config: dict[str, Any] = dict(message.loss_fn_config)
        for key, option in message.loss_fn_config_v2.items():
            config[key] = option.text if option.HasField("text") else option.number
        return message.loss_fn, config, wire.datums_in(message.data)

    only = forward_only or message.forward_only
    return Head(message.model_id, message.seq_id or None, only, parts)


def json_head(raw: bytes, forward_only: bool) -> Head:
    """The head of a JSON body, whose content is in forward_input or forward_backward_input.

    Raises:
        RequestError: not JSON, or without a model.
    """
    body = Fields(fields.parse_json(raw))

    def parts() -> Parts:
        inner = body.inner("forward_input" if forward_only else "forward_backward_input")
        body.end()
        config = fields.loss_config(inner.mapping("loss_fn_config", None))
        name, data = inner.text("loss_fn"), fields.datums_in(inner.items("data"))
        inner.end()
        return name, config, data

    return Head(body.text("model_id"), body.integer("seq_id", None), forward_only, parts)


def decode(head: Head, graphs: Mapping[str, GraphLoss], base: ModelData) -> Scoring:
    """The request, checked.

    Args:
        head: of the request.
        graphs: uploaded losses of the client's session, by id.
        base: sizes of the model.
    """
    found = head.model_id, head.seq, head.forward_only
    try:
        name, config, data = head.parts()
        loss, needs = chosen_loss(name, config, graphs)
        check_scoring(data, loss, needs, base)
    except Exception as error:  # fails in its turn
        return Scoring(*found, error=error)
    return Scoring(*found, data, loss)
