"""How many tokens' worth of graph fit into free memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from cookbook_core.backend.local.model.loading import BaseModel

SHARE = 0.5
"""The part of free memory a kept graph may take; the rest is for the backward and for others."""


def one_pass_tokens(base: BaseModel) -> int:
    """Tokens whose graph may be kept at once; batches above it take two passes."""
    return int(SHARE * free_bytes(base.device) / graph_bytes_per_token(base))


def graph_bytes_per_token(base: BaseModel) -> int:
    """A generous estimate of what autograd keeps per token: inputs of the linear layers and their
    LoRA branches, norms, rotary and attention inputs, and the activations of the MLP."""
    config = base.model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    width = max(base.model.dtype.itemsize, 4)  # LoRA branches run in float32 over a bf16 base
    return config.num_hidden_layers * (14 * hidden + 5 * inner) * width


def free_bytes(device: torch.device) -> int:
    """Memory free on the device (seconds-fresh, other processes included); the CPU's is split
    among the processes of a run."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _meminfo("MemAvailable")


def total_bytes(device: torch.device) -> int:
    """Memory of the device in all, whatever is free of it; the CPU's is split among the processes
    of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int:
    """A value of /proc/meminfo in bytes, this process's part of it; 8 GiB where there is none."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        line = next(row for row in text.splitlines() if row.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (OSError, StopIteration):
        return 8 << 30  # macOS and Windows do not say without another package


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step rather than hand it back and fault it in again.

    A step frees and takes hundreds of megabytes, and the kernel zeroes every page of them anew:
    some 5 to 8% of a small model's step on the CPU, a quarter of one of 64k tokens. The process
    keeps the most it ever took. One arena, so that all threads share what is kept. Linux with
    glibc only; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return
    arenas, trim, top, mmap = -8, -1, -2, -3  # names in malloc.h: M_ARENA_MAX, M_TRIM_THRESHOLD...
    for option, value in ((arenas, 1), (trim, -1), (top, 2**26), (mmap, 2**25)):
        mallopt(option, value)
