"""Objects of the `tinker` SDK itself as ours, so that code which builds them runs here as it is.

They are known by their attributes: the SDK is never imported, and need not be installed. What is
neither ours nor shaped like the SDK's comes back as it was, for the usual checks to refuse. Arrays
need nothing here: whatever has `to_numpy` is one (`tensors.to_array`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from cookbook_core.custom_loss import LossFn, name_of
from cookbook_core.errors import ConfigError, DatumError, raise_all
from cookbook_core.types import AdamOptimizerConfig, AdamParams, Datum, SamplingParams

P = TypeVar("P", AdamParams, SamplingParams)
_TELLING = {
    AdamParams: ("learning_rate", "beta1", "beta2", "eps"),
    SamplingParams: ("max_tokens", "temperature", "top_k", "top_p", "stop"),
}
"""Attributes by which the SDK's parameters are known; the others may have come in a later one."""


def own_data(data: Any) -> Any:
    """A batch with the SDK's datums as ours; the very same list where there are none.

    Raises:
        DatumError: for every datum (first five) that cannot be one of ours: index, field, value.
    """
    if not isinstance(data, Sequence) or all(isinstance(datum, Datum) for datum in data):
        return data
    own, problems = [], []
    for i, datum in enumerate(data):
        if not isinstance(datum, Datum) and hasattr(datum, "loss_fn_inputs"):
            model_input: Any = getattr(datum, "model_input", None)
            try:
                datum = Datum(model_input, datum.loss_fn_inputs)
            except DatumError as error:
                problems.append(error.replace(where=f"data[{i}]: {error.where}"))
        own.append(datum)
    raise_all(problems)
    return own


def own_params(kind: type[P], value: Any) -> P | Any:
    """The SDK's AdamParams or SamplingParams as ours.

    Raises:
        ConfigError: an option that ours does not have, with another value than its default.
    """
    if isinstance(value, kind) or not all(hasattr(value, name) for name in _TELLING[kind]):
        return value
    ours: dict[str, Any] = {f.name: f.default for f in fields(kind)}
    cls = type(value)
    declared = getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", {})
    for name, given in vars(value).items():
        default = getattr(declared.get(name), "default", None)
        if name not in ours and given != default:
            where = f"{kind.__name__}.{name}"
            raise ConfigError(where, "not offered here", expected=repr(default), got=repr(given))
    return kind(**{name: getattr(value, name, default) for name, default in ours.items()})


def check_optimizer(value: Any) -> None:
    """Raise ConfigError for any optimizer but AdamW, ours or the SDK's; None is AdamW too."""
    if value is not None and getattr(value, "type", None) != AdamOptimizerConfig.type:
        raise ConfigError(
            "optimizer", "not offered here", expected="AdamOptimizerConfig or None", got=value
        )


def loss_on(data: Sequence[Any], loss_fn: LossFn) -> LossFn:
    """`loss_fn` as it is to be called with `data`, its caller's own objects, in place of ours."""
    kept = list(data)

    def loss(_: Any, logprobs: Any) -> Any:
        return loss_fn(list(kept), logprobs)

    loss.__name__ = name_of(loss_fn)
    return loss
