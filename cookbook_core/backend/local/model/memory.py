"""Memory of the device: free, total, and how many tokens of graph fit."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.errors import CookbookError

SHARE = 0.5
"""The share of free memory for kept graphs; the rest is for the backward and other processes."""


_OUT_OF_MEMORY = ("out of memory", "_status_alloc_failed", "can't allocate memory")
"""What the messages of failed allocations say, in lower case: CUDA, Triton and MPS; cuBLAS and
cuDNN; torch's CPU allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, failed to allocate memory.

    torch raises OutOfMemoryError from its own allocators alone: libraries that allocate by
    themselves (cuBLAS, cuDNN, Triton, MPS, an asynchronous CUDA error) report a RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, CookbookError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def one_pass_tokens(base: BaseModel) -> int:
    """Number of tokens whose graphs fit into free memory."""
    return int(SHARE * free_bytes(base.device) / graph_bytes_per_token(base))


def graph_bytes_per_token(base: BaseModel) -> int:
    """A generous estimate of the bytes that autograd keeps per token: inputs of linear layers and
    LoRA branches, norms, rotary and attention inputs, and the activations of the MLP."""
    config = base.model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    width = max(base.model.dtype.itemsize, 4)  # LoRA branches run in float32 over a bf16 base
    return config.num_hidden_layers * (14 * hidden + 5 * inner) * width


def free_bytes(device: torch.device) -> int:
    """Free memory of the device at this moment; the CPU's is divided among the run's processes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _meminfo("MemAvailable")


def total_bytes(device: torch.device) -> int:
    """Total memory of the device; the CPU's is divided among the run's processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int:
    """A value of /proc/meminfo in bytes per process of the run; 8 GiB without the file."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        line = next(row for row in text.splitlines() if row.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (OSError, StopIteration):
        return 8 << 30  # macOS and Windows need another package to tell


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step rather than return it to the system.

    A step allocates and frees hundreds of megabytes, and the kernel zeroes every returned page:
    5 to 8% of a small model's step on the CPU, a quarter of one of 64k tokens. The process keeps
    its peak. One arena, so that all threads share it. Linux with glibc only; elsewhere no effect.
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
