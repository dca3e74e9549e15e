"""RMS norms with fewer passes over memory: y = w * x / rms(x), backward written out.

transformers computes the norm in six elementwise steps, each of which stores its result for the
backward; on small models the norms were a tenth of a training step. A norm is replaced if it is on
the CPU, in float32, with a frozen weight, and gives the same values on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from cookbook_core.backend.local.model.layer_functions import normalized

import torch


def _rms_norm(x: Any, weight: Any, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize x.

    Args:
        x: `(..., d)`.
        weight: `(d,)`.
        eps: added to the mean square.
    Returns:
        weight * x / rms(x), `(..., d)`; 1 / rms(x), `(..., 1)`.
    """
    y, scale = normalized(x, eps)
    return y.mul_(weight), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> torch.Tensor:
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, scale, weight = ctx.saved_tensors
        g = grads[0] * weight
        # d(x * scale)/dx = scale * (1 - x x^T scale^2 / d)
        along = torch.linalg.vecdot(g, x).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
        return g.mul_(scale).addcmul_(x, along), None, None


def _fused(module: Any, eps: float, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or module.weight.requires_grad:
        return type(module).forward(module, x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RmsNorm.apply(x, module.weight, eps)
    return _rms_norm(x, module.weight, eps)[0]


def _same(module: Any, eps: float) -> bool:
    """Whether the module computes w * x / rms(x); checked on random x, some with squares < eps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, module.weight.shape[0], generator=generator)
    x *= torch.logspace(-6, 3, 8).unsqueeze(1)
    try:
        own = module(x)
    except (RuntimeError, TypeError):
        return False
    return own.shape == x.shape and torch.allclose(own, _rms_norm(x, module.weight, eps)[0])


def rms_norms(model: torch.nn.Module) -> Iterator[tuple[Any, float]]:
    """The modules of a model that are RMS norms by their name, and the eps of each."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        named = type(module).__name__.endswith("RMSNorm")
        if named and isinstance(weight, torch.Tensor) and weight.dim() == 1 and type(eps) is float:
            yield module, eps


@torch.no_grad()
def fuse(model: torch.nn.Module) -> None:
    """Make a model's RMS norms compute in fewer passes, where that gives the same values."""
    for module, eps in rms_norms(model):
        usable = module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
        if usable and _same(module, eps):
            module.forward = partial(_fused, module, eps)  # of this one object, not of its class
