"""A loss over the vocabulary, whose logprobs are on the device, may mix in tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.scoring.vocab_logprobs import VocabLogprobs

import torch
from torch.overrides import TorchFunctionMode

_TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)


class OperandsFollow(TorchFunctionMode):
    """Inside, an operation that torch refuses for operands on two devices is computed on one.

    Targets, advantages and probabilities of a datum are on the CPU, logprobs on `device`: a row of
    the vocabulary is long, so the other operands are copied to it. An operation in place happens
    where its tensor is. `numpy()` copies to the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            device = self._common(func, args, kwargs)
            if device is None or is_out_of_memory(error):
                raise
        move = _mover(device)
        return func(*_each(args, move), **_each(kwargs, move))

    def _common(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device to compute on; None where devices are not what is wrong."""
        if func in _TO_NUMPY:
            return torch.device("cpu")
        devices: set[torch.device] = set()
        _each((args, kwargs), lambda x: devices.add(x.device))
        if len(devices) < 2:
            return None
        name = getattr(func, "__name__", "")
        if isinstance(kwargs.get("out"), torch.Tensor):
            return kwargs["out"].device
        in_place = name.startswith("__i") or name == "__setitem__"
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
        return args[0].device if in_place and args else self.device


def _mover(device: torch.device) -> Callable[[Any], Any]:
    def move(x: Any) -> Any:
        if x.device == device:
            return x
        return (x.dense() if isinstance(x, VocabLogprobs) else x).to(device)

    return move


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with the function applied to the tensors in it, within lists, tuples and dicts."""
    if isinstance(value, (torch.Tensor, VocabLogprobs)):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(v, function) for v in value])
    if isinstance(value, dict):
        return {key: _each(v, function) for key, v in value.items()}
    return value
