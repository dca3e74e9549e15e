"""SwiGLU with one tensor less to keep: h = silu(gate) * up.

torch keeps silu(gate) for the backward, beside gate, up and h: a seventh of a small model's graph.
Here the backward computes it again. All values and gradients are the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _SwiGlu(torch.autograd.Function):
    """gate and up `(..., inner)` -> silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        up_grad = torch.nn.functional.silu(gate).mul_(grads[0])
        gate_grad = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
        return gate_grad, up_grad


def _fused(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_SwiGlu.apply(module.gate_proj(x), module.up_proj(x)))


def is_swiglu(module: Any) -> bool:
    """Whether a module is a SwiGLU layer by the names and classes of its parts."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = type(getattr(module, "act_fn", None)).__name__
    linear = all(isinstance(layer, torch.nn.Linear) for layer in layers)
    return linear and activation in ("SiLU", "SiLUActivation")


def _same(module: Any, dtype: torch.dtype) -> bool:
    """Whether a module gives the bits of `_fused`, value and gradient, on random numbers."""
    generator, size = torch.Generator().manual_seed(0), module.gate_proj.in_features
    x, results = torch.randn(4, size, generator=generator).to(dtype), []
    try:
        for function in (module.forward, partial(_fused, module)):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                y = function(leaf)
                results.append([y, *torch.autograd.grad(y, leaf, x)])
    except (RuntimeError, TypeError):
        return False
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def fuse(model: Any) -> None:
    """Make a model's SwiGLU layers keep one tensor less, where that gives the same bits."""
    same: dict[type, bool] = {}
    for module in model.modules():
        if not is_swiglu(module):
            continue
        kind = type(module)
        if kind not in same:
            same[kind] = _same(module, model.dtype)
        if same[kind]:
            module.forward = partial(_fused, module)  # of this one object, not of its class
