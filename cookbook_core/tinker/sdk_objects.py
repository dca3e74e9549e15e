"""Convert the `tinker` SDK's own objects to this package's, so that code which builds them runs.

They are recognised by their attributes: the SDK is never imported, and need not be installed.
Objects of neither kind are returned unchanged, for the usual validation to refuse. Arrays need no
conversion: anything with `to_numpy` is accepted (`tensors.to_array`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from cookbook_core.custom_loss import LossFn, name_of
from cookbook_core.errors import ConfigError, DatumError, raise_all
from cookbook_core.types import AdamOptimizerConfig, AdamParams, Datum, SamplingParams

P = TypeVar("P", AdamParams, SamplingParams)
_RECOGNISED_BY = {
    AdamParams: ("learning_rate", "beta1", "beta2", "eps"),
    SamplingParams: ("max_tokens", "temperature", "top_k", "top_p", "stop"),
}
"""Attributes of the SDK's parameters in every supported version; later ones have more."""


def own_data(data: Any) -> Any:
    """A batch with the SDK's datums converted; the same list object if it has none.

    Raises:
        DatumError: index, field and value of each datum (first five) that cannot be converted.
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
    """The SDK's AdamParams or SamplingParams, converted.

    Raises:
        ConfigError: a field that is unknown here has another value than its default.
    """
    if isinstance(value, kind) or not all(hasattr(value, name) for name in _RECOGNISED_BY[kind]):
        return value
    ours: dict[str, Any] = {f.name: f.default for f in fields(kind)}
    cls = type(value)
    declared = getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", {})
    for name, given in vars(value).items():
        default = getattr(declared.get(name), "default", None)
        if name not in ours and given != default:
            where = f"{kind.__name__}.{name}"
            fix = f"Leave {name} out."
            raise ConfigError(
                where, "not supported here", expected=repr(default), got=repr(given), fix=fix
            )
    return kind(**{name: getattr(value, name, default) for name, default in ours.items()})


def check_optimizer(value: Any) -> None:
    """Raise ConfigError for any optimizer but AdamW, of this package or the SDK; None is AdamW."""
    if value is not None and getattr(value, "type", None) != AdamOptimizerConfig.type:
        fix = "Pass AdamOptimizerConfig(), or leave it out."
        raise ConfigError("optimizer", "not supported here", got=value, fix=fix)


def loss_on(data: Sequence[Any], loss_fn: LossFn) -> LossFn:
    """`loss_fn` called with `data`, its caller's own objects, in place of converted ones."""
    originals = list(data)

    def loss(_: Any, logprobs: Any) -> Any:
        return loss_fn(list(originals), logprobs)

    loss.__name__ = name_of(loss_fn)
    return loss
