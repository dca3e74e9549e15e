"""Memory of the device: free, total, and how many tokens of graph fit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cookbook_core.errors import CookbookError

import torch

SHARE = 0.5
"""The share of free memory for kept graphs; the rest is for the backward and other processes."""
MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens per forward, padding included: enough to use the device fully."""
MICRO_BATCH_SHARE = 0.4
"""The share of total memory, less the weights, for the whole graph of one micro-batch. Less than
SHARE, so that the graph fits on a device that nobody else uses."""
FEATURE_BYTES, FEATURE_SHARE = 1 << 30, 0.05
"""Most bytes of image features that are kept, and the most of total memory."""
LEAST_MICRO_BATCH = 2048
"""Where the graph of so many tokens does not fit, layers are recomputed instead."""
NF4_BLOCK, NF4_BLOCKS = 64, 256
"""Weights in NF4 that share a scale, and scales that share a scale of theirs."""


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


class GraphBytes(NamedTuple):
    """Bytes that autograd keeps per token: of a whole graph, and with layers checkpointed."""

    whole: float
    checkpointed: float


@contextmanager
def count_graph_bytes(model: Any) -> Iterator[Callable[[], int]]:
    """Inside, count what autograd keeps: every storage once, those of parameters left out.

    Yields:
        A function that returns the bytes so far.
    """
    weights = {x.untyped_storage()._cdata for p in model.parameters() for x in _parts(p)}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        for storage in (part.untyped_storage() for part in _parts(x)):
            kept[storage._cdata] = storage
        return x.detach()  # x itself would keep a graph that never sees a backward alive for good

    def count() -> int:
        # a sharded layer's weights are freed by now: storages of 0 bytes
        return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield count


def estimate_graph_bytes(model: Any) -> GraphBytes:
    """Estimate the bytes that autograd keeps per token, before a graph was counted.

    A layer keeps the inputs of its linear layers, of norms and of attention; checkpointed, its own
    input. Against counts of seven architectures with LoRA on all linear layers: 0.8 to 1.15 of the
    whole graph, 0.95 to 1.3 of the checkpointed one.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads, keys, width = attention_shape(config)
    numbers = 5 * hidden + 4 * inner + 3 * width * (heads + keys)
    if any(getattr(layer, "few_operations", False) for layer in decoder_layers(model)):
        numbers = 2 * hidden + 2 * inner + 3 * width * (heads + keys)
    size = model.dtype.itemsize
    norms = 1.15 if size < 4 else 1.0  # computed in float32
    return GraphBytes(layers * numbers * size * norms, (layers + 3) * hidden * size)


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Number of heads, of key heads, and head_dim; a model without attention counts as one head."""
    heads = getattr(config, "num_attention_heads", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def feature_bytes(model: Any, device: torch.device) -> int:
    """Most bytes of image features that are kept; 0 for a model without a vision tower.

    A function of total memory, as `micro_batch_tokens`.
    """
    if getattr(model.config, "vision_config", None) is None:
        return 0
    return min(FEATURE_BYTES, int(FEATURE_SHARE * total_bytes(device)))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters; of a sharded one see `sharded_weight_bytes`."""
    return getattr(model, "sharded_bytes", 0) or sum(stored_bytes(p) for p in model.parameters())


def sharded_weight_bytes(model: Any, shards: int) -> int:
    """Bytes that a model's weights take in each of `shards` processes, while it computes.

    Layers are held in parts, each weight cut along its rows, and two of the layers whole: the one
    that computes and the next. All else is whole for good, beside the part that FSDP keeps of it;
    an embedding that is the unembedding too is whole twice, as FSDP gathers it for two groups.

    Args:
        model: a sharded model before its first forward, or any model that is not sharded.
        shards: processes.
    """
    layers = [list(layer.parameters()) for layer in decoder_layers(model)]
    in_layers, held = {id(p) for own in layers for p in own}, 0
    for p in model.parameters():
        rows = p.shape[0] if p.dim() else 1
        held += _whole_bytes(p) // rows * -(-rows // shards)
        held += 0 if id(p) in in_layers else _whole_bytes(p)
    embedding = model.get_input_embeddings().weight
    if getattr(model.get_output_embeddings(), "weight", None) is embedding:
        held += _whole_bytes(embedding)
    return held + sum(sorted(sum(map(_whole_bytes, own)) for own in layers)[-2:])


def decoder_layers(model: Any) -> list[Any]:
    """A model's layers, if they are built to be recomputed in the backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _whole_bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.dtype.itemsize


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes that a parameter takes, those of its scales included."""
    size, state = sum(x.nbytes for x in _parts(weight)), getattr(weight, "quant_state", None)
    while state is not None:  # bitsandbytes: scales, and scales of the scales
        tensors = (state.absmax, state.code, state.offset)
        size += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        state = state.state2
    return size


def _parts(x: Any) -> Iterator[torch.Tensor]:
    """The tensors that a tensor consists of: itself, or those inside a quantized one of torchao or
    a sharded one."""
    if not hasattr(x, "__tensor_flatten__"):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:
        if isinstance(part := getattr(x, name), torch.Tensor):
            yield from _parts(part)


def nf4_weight_bytes(model: Any) -> int:
    """What `weight_bytes` of an unquantized model is once it is loaded in NF4.

    Linear layers other than the unembedding take 4 bits a weight, scales in two levels, and tables.
    """
    from transformers.pytorch_utils import Conv1D

    head, size = model.get_output_embeddings(), weight_bytes(model)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            size += nf4_bytes(module.weight) - module.weight.nbytes
    return size


def nf4_bytes(weight: torch.Tensor) -> int:
    """`stored_bytes` of an unquantized weight once it is in NF4."""
    blocks = -(-weight.numel() // NF4_BLOCK)
    tables = 4 * (16 + 256) + 4
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // NF4_BLOCKS) + tables


def tokens_that_fit(device: torch.device, bytes_per_token: float, reserved: int = 0) -> int:
    """Number of tokens whose graphs fit into the share of free memory that they may take.

    `reserved`: bytes of the free memory that are for something else.
    """
    return tokens_in(free_bytes(device) - reserved, bytes_per_token)


def tokens_in(free: float, bytes_per_token: float) -> int:
    """Number of tokens whose graphs fit into the share of `free` bytes that they may take."""
    return int(SHARE * max(0, free) / bytes_per_token)


def micro_batch_tokens(model: Any, device: torch.device) -> int:
    """Tokens per forward: the device's, or fewer where their graph would not fit.

    A function of the model, the device and its total memory, never of free memory: results depend
    on it in their last bits. In steps of 1,024, so that cards of one kind agree.
    """
    most = MICRO_BATCH_TOKENS.get(device.type, MICRO_BATCH_TOKENS["mps"])
    taken = weight_bytes(model) + feature_bytes(model, device)
    room = MICRO_BATCH_SHARE * (total_bytes(device) - taken)
    fits = int(room / estimate_graph_bytes(model).whole) // 1024 * 1024
    return min(most, max(LEAST_MICRO_BATCH, fits))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device at this moment; the CPU's is divided among the run's processes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return _meminfo("MemAvailable")


def release_cached(device: torch.device) -> None:
    """Return memory that torch holds but does not use to the device."""
    if device.type == "mps":
        torch.mps.empty_cache()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA


def total_bytes(device: torch.device) -> int:
    """Total memory of the device; the CPU's is divided among the run's processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory()
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
