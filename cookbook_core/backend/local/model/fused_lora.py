"""peft's linear LoRA layers with fewer passes over memory: y += scale * (x A^T) B^T in one product.

peft multiplies and adds in separate steps, each of which reads and writes all of y, forward and
backward; on small models that is a tenth of a training step. Only the arithmetic is replaced,
through peft's own hook for LoRA variants: layers, adapters and files stay peft's. Linear layers in
4 bits are computed so too; layers of another kind, and inputs of another dtype than the base's, are
computed as peft computes them.

On the CPU, where base and adapter have one dtype, the base's product is part of the same function:
the gradient of x is then one tensor, not a sum of two, and a layer is one step of Python.

Over a bfloat16 base peft multiplies in float32, without tensor cores, and keeps a float32 copy of
every x for the backward. Here products take x as it is, and A and B rounded to the base's dtype, as
under autocast: sums are float32, and so are adapters and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cookbook_core.backend.local.model.quantization import is_quantized

import torch
from torch.autograd.function import once_differentiable


class _AddLowRank(torch.autograd.Function):
    """y + scale * (x A^T) B^T; `(..., in)`, `(..., out)`, `(r, in)`, `(out, r)`.

    Computed in place in y, unless y is a view, as linear layers with a bias return: autograd would
    apply the change to the tensor behind the view. `a` and `b` have the dtype of x and y; the
    gradient is that of `a_leaf` and `b_leaf`, the same values before rounding, in their dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, y: Any, a_leaf: Any, b_leaf: Any, a: Any, b: Any, scale: float
    ) -> torch.Tensor:
        low, flat = x.flatten(0, -2) @ a.t(), y.view(-1, y.shape[-1])
        if y._is_view():
            y = torch.addmm(flat, low, b.t(), alpha=scale).view(y.shape)
        else:
            flat.addmm_(low, b.t(), alpha=scale)
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a, b)
        ctx.scale, ctx.dtype = scale, a_leaf.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, low, a, b = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        low_grad = torch.mm(g, b).mul_(ctx.scale)
        x_grad = (low_grad @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        a_grad = _product(low_grad.t(), x.flatten(0, -2), ctx.dtype)
        b_grad = _product(g.t(), low, ctx.dtype).mul_(ctx.scale)
        return x_grad, grads[0], a_grad, b_grad, None, None, None


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T; W `(out, in)` and bias, `(out,)` or None, are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float
    ) -> torch.Tensor:
        y, low = torch.nn.functional.linear(x, weight, bias), x.flatten(0, -2) @ a.t()
        y.view(-1, y.shape[-1]).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, low, weight, a, b = ctx.saved_tensors
        g, x_grad = grads[0].flatten(0, -2), None
        low_grad = torch.mm(g, b).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            x_grad = torch.mm(g, weight).addmm_(low_grad, a).view(x.shape)
        a_grad = low_grad.t() @ x.flatten(0, -2)
        return x_grad, None, None, a_grad, torch.mm(g.t(), low).mul_(ctx.scale), None


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A peft layer on a plain one: a single active adapter in `_LoraLinear`, else as in peft."""
    names, base = module.active_adapters, module.base_layer
    one = len(names) == 1 and not (args or kwargs or module.disable_adapters or module.merged)
    if one and getattr(module.lora_variant.get(names[0]), "factors", ()):
        a, b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
        dtypes = x.dtype == base.weight.dtype == a.dtype
        if dtypes and x.device.type == "cpu" and not base.weight.requires_grad:
            return _LoraLinear.apply(x, base.weight, base.bias, a, b, module.scaling[names[0]])
    return type(module).forward(module, x, *args, **kwargs)


def _product(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return one @ other in `dtype`; where torch can, without rounding it to theirs before."""
    if one.dtype != dtype and one.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(one, other, out_dtype=dtype)
    return torch.mm(one, other).to(dtype)


def fuse(
    model: Any, slot_name: str, rounded: Mapping[torch.Tensor, torch.Tensor] | None = None
) -> None:
    """Make the linear layers of a slot compute their LoRA part in one product.

    Args:
        model: with the slot's layers.
        slot_name: peft's name of them.
        rounded: over a base below float32, by parameter of the slot, the tensor that holds its
            values in the base's dtype whenever the slot is active.
    """
    try:
        from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
    except ImportError:  # the hook is private in peft; without it the layers compute as before
        return

    class Fused(LoraVariant):
        def __init__(self, factors: list[tuple[Any, Any]]) -> None:
            self.factors = factors  # A and B in each dtype in which they can be multiplied

        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, module: Any, active_adapter: str, x: Any, result: Any, **_: Any
        ) -> torch.Tensor:
            lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
            scale = module.scaling[active_adapter]
            for a, b in self.factors:
                if x.dtype == a.dtype == result.dtype:
                    leaves = lora_a.weight, lora_b.weight
                    return _AddLowRank.apply(x, result, *leaves, a, b, scale)
            dropout = module.lora_dropout[active_adapter]
            return result + lora_b(lora_a(dropout(x.to(lora_a.weight.dtype)))) * scale

    for module in model.modules():
        if not isinstance(module, LoraLayer) or slot_name not in module.lora_A:
            continue
        plain = isinstance(module, Linear) and type(module.get_base_layer()) is torch.nn.Linear
        if not (plain or type(module).__name__ == "Linear4bit") or slot_name in module.lora_variant:
            continue
        a: Any = module.lora_A[slot_name].weight
        b: Any = module.lora_B[slot_name].weight
        dropout = isinstance(module.lora_dropout[slot_name], torch.nn.Identity)
        factors = [(a, b)] if dropout and module.lora_B[slot_name].bias is None else []
        if factors and rounded:
            factors.append((rounded[a], rounded[b]))
        if factors or rounded:
            module.lora_variant[slot_name] = Fused(factors)
            # for every slot of the layer: no float32 copy of x before the call above
            module.cast_input_dtype_enabled = not rounded
        layer: Any = module  # torchao's weights are those of a plain layer
        if factors and plain and not is_quantized(layer.get_base_layer().weight):
            layer.forward = partial(_forward, layer)  # of this one object, not of its class
