"""peft's linear LoRA layers with fewer passes over memory: y += scale * (x A^T) B^T in one product.

peft multiplies and adds in separate steps, each of which reads and writes all of y, forward and
backward; on small models that is a tenth of a training step. Only the arithmetic is replaced,
through peft's own hook for LoRA variants: layers, adapters and files stay peft's. Layers of another
kind, and inputs of another dtype than the adapter's, are computed as peft computes them.
"""

from __future__ import annotations

from typing import Any

import torch


class _AddLowRank(torch.autograd.Function):
    """y + scale * (x A^T) B^T; `(..., in)`, `(..., out)`, `(r, in)`, `(out, r)`.

    Computed in place in y, unless y is a view, as linear layers with a bias return: autograd would
    apply the change to the tensor behind the view.
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
    """Make the linear layers of a slot compute their LoRA part in one product."""
    try:
        from peft.tuners.lora.layer import Linear, LoraVariant
    except ImportError:  # the hook is private in peft; without it the layers compute as before
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
