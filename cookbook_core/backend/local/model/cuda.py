"""What is set for a CUDA device before a model is loaded, and whether it has bfloat16."""

from __future__ import annotations

import os
import sys

import torch

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def prepare(device: torch.device) -> None:
    """Set up this process for a model on `device`; no effect unless that is a CUDA device.

    Sums inside matrix products are float32: torch by default adds the parts of a long bfloat16
    product in bfloat16. Float32 products stay float32: TF32, which has 10 bits of them, is turned
    off even if it was on.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
    _expand_segments(device)


def _expand_segments(device: torch.device) -> None:
    """Let memory that is free in pieces be used as one, as micro-batches vary in length.

    Not if the user set up the allocator, or if it has memory already; undone if the device refuses.
    """
    configured = any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES)
    if configured or not sys.platform.startswith("linux") or torch.cuda.memory_reserved(device):
        return
    names = "_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"
    configure = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
    if configure is None:  # both are private: the second is that of torch 2.9
        return
    try:
        configure("expandable_segments:True")
        torch.empty(1, device=device)
    except RuntimeError:
        configure("expandable_segments:False")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 itself (Ampere or newer)."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
