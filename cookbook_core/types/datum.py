"""Datum: one sequence of tokens, and the arrays that its loss needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cookbook_core.types.model_input import ModelInput, own_input, require_type
from cookbook_core.types.tensors import TensorData, to_array

import numpy as np

_INTEGER_KEYS = frozenset({"target_tokens"})
_FLOAT_KEYS = frozenset({"weights", "advantages", "logprobs", "sampling_logprobs"})

LossFnInputs: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class Datum:
    """One sequence and the arrays that its loss needs.

    Args:
        model_input: the N tokens that the model reads.
        loss_fn_inputs: arrays by name, given as TensorData, torch, numpy or nested lists, stored
            as TensorData. "target_tokens" `(N,)` or `(N, K)`, int64: the token or tokens to predict
            at each position. "weights" `(N,)` or like target_tokens. Any other key is passed to
            the loss and never to the model.

    Raises:
        DatumError: an array that is not rectangular and numeric, or a name that is not a str.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_input", own_input(self.model_input))
        known = isinstance(self.model_input, ModelInput)
        require_type(known, "Datum.model_input", "ModelInput", self.model_input)
        named = isinstance(self.loss_fn_inputs, Mapping)
        require_type(named, "Datum.loss_fn_inputs", "arrays by name", self.loss_fn_inputs)
        for key in self.loss_fn_inputs:
            require_type(isinstance(key, str), "Datum.loss_fn_inputs", "names that are str", key)
        inputs = {k: _to_tensor_data(k, v) for k, v in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _to_tensor_data(key: str, value: Any) -> TensorData:
    """A loss input as TensorData, in the dtype that its name requires."""
    if isinstance(value, TensorData) and (key not in _INTEGER_KEYS or value.dtype == "int64"):
        return value
    if isinstance(value, ModelInput):  # the SDK's own examples pass targets this way
        value = value.to_ints()
    dtype = "int64" if key in _INTEGER_KEYS else "float32" if key in _FLOAT_KEYS else None
    where = f'Datum.loss_fn_inputs["{key}"]'
    array = to_array(where, value, np.dtype(dtype) if dtype else None)
    return TensorData(array, dtype="float32" if array.dtype.kind == "f" else "int64")
