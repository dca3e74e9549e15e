"""How a value leaves the graph: stopped on purpose (.detach()) or by accident (.item())."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any


@functools.cache
def watch_class() -> Any:
    """Make the class Watch, on demand because its base class needs torch.

    `Watch()` around a loss records the results of `.detach()`, `.data` and no_grad blocks (tape),
    and where else values leave the graph (escapes: ".item() at my.py:12"). `Watch(tape)` returns
    the recorded tensors in place of new ones, so that finite differences see them as constants.
    That distinguishes a gradient stopped on purpose from one lost by accident.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    tensor: Any = torch.Tensor
    stops = (tensor.detach, tensor.detach_, tensor.data.__get__)
    leaks = {
        tensor.item: ".item()",
        tensor.__float__: "float()",
        tensor.__int__: "int()",
        tensor.tolist: ".tolist()",
        tensor.numpy: ".numpy()",
        tensor.__array__: "numpy",
        torch.tensor: "torch.tensor()",
        torch.as_tensor: "torch.as_tensor()",
    }

    class Watch(TorchFunctionMode):
        def __init__(self, tape: list[Any] | None = None) -> None:
            super().__init__()
            self.replays, self.tape = tape is not None, [] if tape is None else list(tape)
            self.escapes: list[str] = []
            self.no_grad, self.at = False, 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            if func is torch._C._set_grad_enabled:
                self.no_grad = not args[0]
            elif func in leaks and getattr(args[0], "requires_grad", False):
                frame = sys._getframe(1)
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.escapes.append(f"{leaks[func]} at {place}")
            result = func(*args, **(kwargs or {}))
            if not (func in stops or self.no_grad) or not isinstance(result, torch.Tensor):
                return result
            if not self.replays:
                self.tape.append(result.clone())
            elif self.at < len(self.tape) and self.tape[self.at].shape == result.shape:
                result = self.tape[self.at].clone()
            self.at += 1
            return result

    return Watch
