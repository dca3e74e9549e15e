"""peft's linear LoRA layers with fewer passes over memory: y += scale * (x A^T) B^T in one product.

peft multiplies and adds in separate steps, each reading and writing all of y again, and so does
the backward; on small models that is a tenth of a training step. The layers stay peft's, and so do
adapters and files: the layer's own hook for LoRA variants is where this comes in. Layers it does
not fit (another base layer, another dtype than the adapter's) compute as peft does.
"""

from __future__ import annotations

from typing import Any

import torch


class _AddLowRank(torch.autograd.Function):
    """y + scale * (x A^T) B^T; `(..., in)`, `(..., out)`, `(r, in)`, `(out, r)`.

    Written into y, unless that is a view, as linear layers with a bias return: autograd would
    trace the change back to what it is a view of.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        low, flat = x.flatten(0, -2) @ a.t(), y.view(-1, y.shape[-1])
        if y._is_view():
            y = torch.addmm(flat, low, b.t(), alpha=scale).view(y.shape)
        else:
            flat.addmm_(low, b.t(), alpha=scale)
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, low, a, b = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        low_grad = torch.mm(g, b).mul_(ctx.scale)
        x_grad = (low_grad @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        b_grad = torch.mm(g.t(), low).mul_(ctx.scale)
        return x_grad, grads[0], low_grad.t() @ x.flatten(0, -2), b_grad, None


def fuse(model: Any, slot_name: str) -> None:
    """Let the linear layers of a slot compute their LoRA part in one product."""
    try:
        from peft.tuners.lora.layer import Linear, LoraVariant
    except ImportError:  # peft calls the hook private; without it everything works, slower
        return

    class Fused(LoraVariant):
        @staticmethod
        def forward(
            module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
        ) -> torch.Tensor:
            a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
            scale = module.scaling[active_adapter]
            if not x.dtype == a.dtype == result.dtype:
                return result + (x.to(a.dtype) @ a.t()) @ b.t() * scale
            return _AddLowRank.apply(x, result, a, b, scale)

    for module in model.modules():
        if not isinstance(module, Linear) or slot_name not in module.lora_A:
            continue
        plain = type(module.get_base_layer()) is torch.nn.Linear
        dropout = isinstance(module.lora_dropout[slot_name], torch.nn.Identity)
        bias = module.lora_B[slot_name].bias is not None
        if plain and dropout and not bias and slot_name not in module.lora_variant:
            module.lora_variant[slot_name] = Fused()
