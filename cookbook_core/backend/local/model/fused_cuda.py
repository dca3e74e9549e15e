"""RMS norms and SwiGLU on CUDA in one kernel each, forward and backward.

transformers computes them in up to eight elementwise kernels, each of which reads and writes all
hidden states and keeps some in float32. Taken instead, for one model's own modules: the kernels of
Liger (Hsu et al. 2024, arXiv 2410.10989; the extra `gpu`), or torch's norm where it is not
installed. A kernel is tried on random numbers before it is used: value and gradient must be the
module's own up to rounding, and the value the same bits with and without gradients, so that policy
and reference stay equal. Rotary embeddings are left alone: transformers calls a function of the
module's file there, which all models share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from cookbook_core.backend.local.model.fused_norm import rms_norms
from cookbook_core.backend.local.model.fused_swiglu import is_swiglu
from cookbook_core.backend.local.model.memory import is_out_of_memory

import torch

Forward: TypeAlias = Callable[[Any, torch.Tensor], torch.Tensor]
"""What a module computes: (module, x) -> y."""

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest relative L2 error of a row; a wrong formula gives 0.3 and more."""

log = logging.getLogger(__name__)


def fuse(model: Any) -> dict[str, str]:
    """Make a model's RMS norms and SwiGLU layers use one kernel where that gives their values.

    Returns:
        By class of module, whose kernel its modules use: "liger" or "torch".
    """
    if model.dtype not in BOUNDS:
        return {}
    norm, swiglu = _liger()
    wanted: list[tuple[Any, tuple[Any, ...], int, list[Forward]]] = []
    for module, eps in rms_norms(model):
        size = module.weight.shape[0]
        choices: list[Forward] = [
            partial(norm, eps=eps, mode=m) for m in ("llama", "gemma") if norm
        ]
        wanted.append((module, (size, eps), size, [*choices, partial(_torch_norm, eps=eps)]))
    for module in model.modules():
        if swiglu and is_swiglu(module):
            layer = module.gate_proj
            wanted.append((module, tuple(layer.weight.shape), layer.in_features, [swiglu]))
    chosen: dict[Any, Forward | None] = {}
    for module, shape, size, choices in wanted:
        kind = type(module), *shape
        if kind not in chosen:
            chosen[kind] = next((f for f in choices if _same(module, f, size, model)), None)
        if (forward := chosen[kind]) is not None:
            module.forward = partial(forward, module)  # of this one object, not of its class
    refused = sorted({kind[0].__name__ for kind, forward in chosen.items() if forward is None})
    if refused and norm:
        log.warning(
            "%s: Liger's kernels do not give this module's own values; it computes as before.",
            ", ".join(refused),
        )
    used = {kind[0].__name__: forward for kind, forward in chosen.items() if forward}
    return {
        name: "torch" if getattr(forward, "func", None) is _torch_norm else "liger"
        for name, forward in sorted(used.items())
    }


def _liger() -> tuple[Any, Any]:
    """Liger's norm and SwiGLU as `Forward`s (the norm with eps and mode); None without Liger."""
    try:
        from liger_kernel.ops.rms_norm import (  # pyright: ignore[reportMissingImports]
            LigerRMSNormFunction,
        )
        from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
            LigerSiLUMulFunction,
        )
    except ImportError:
        return None, None

    def norm(module: Any, x: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
        offset, in_place = float(mode == "gemma"), False
        return LigerRMSNormFunction.apply(x, module.weight, eps, offset, mode, in_place)

    def swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
        # its backward overwrites both factors: such a graph can be used once, as the scorer does
        return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))

    return norm, swiglu


def _torch_norm(module: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, eps)


def _same(module: Any, forward: Forward, size: int, model: Any) -> bool:
    """Whether `forward` gives the module's value and gradient, and the same bits without one."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 32, size, generator=generator).to(model.device, model.dtype)
    x = x * torch.logspace(-3, 3, len(x)).unsqueeze(1).to(x)
    bound, results = BOUNDS[model.dtype], []
    try:
        for function in (module.forward, partial(forward, module)):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                y = function(leaf)
            results.append([y.detach(), torch.autograd.grad(y, leaf, g)[0]])
        with torch.no_grad():
            repeated = forward(module, x)
    except Exception as error:  # a kernel that does not compile raises what its compiler likes
        if is_out_of_memory(error):  # the choice must not depend on free memory
            raise
        return False
    close = all(
        ours.shape == own.shape
        and bool(((ours - own).norm(dim=-1) <= bound * own.norm(dim=-1)).all())
        for own, ours in zip(*results, strict=True)
    )
    return close and torch.equal(repeated, results[1][0])
