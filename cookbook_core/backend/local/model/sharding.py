"""A base model whose layers are sharded over the processes of a run, by torch's FSDP2.

transformers reads each process's part of the weights and wraps the layers (`DistributedConfig`):
a layer's weights are gathered from all processes before it computes, and freed after it. Adapters
are added later, and are whole and plain in every process. Embedding, last norm and unembedding are
gathered by the first forward and stay whole: the unembedding's product and its backward are
computed past FSDP's hooks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cookbook_core.backend.local import SUPPORTED, check_versions
from cookbook_core.backend.local.model.memory import decoder_layers, sharded_weight_bytes
from cookbook_core.errors import ConfigError, ModelError

import torch

_END = 1 << 20
"""Bytes of a file that are compared at each of its ends."""
NEEDS = {"torch": "2.13", "transformers": "5.23", "peft": "0.21.2"}
"""The oldest versions with which this was run; older ones split models otherwise, or not at all."""


def loading_options(config: Any, dtype: str, device: torch.device, shards: int) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model in `shards` parts; all processes pass the same.

    Args:
        config: of the model.
        dtype: as the user gave it.
        device: to load it onto.
        shards: processes of the run, 2 or more.
    Raises:
        VersionError: a package is too old. ConfigError: a dtype, device or model that is not
            sharded.
    """
    check_versions({name: (low, SUPPORTED[name][1]) for name, low in NEEDS.items()}, "for --shard")
    if dtype == "nf4" or getattr(config, "quantization_config", None) is not None:
        fix = "Leave --shard out: each process then holds the whole quantized model."
        what = "not supported for quantized models: transformers' loader cannot split them"
        got = f"dtype={dtype!r}" if dtype == "nf4" else "a quantized folder"
        raise ConfigError("shard", what, expected="plain weights", got=got, fix=fix)
    if getattr(config, "vision_config", None) is not None:
        fix = "Leave --shard out: each process then holds the whole model."
        what, got = "not supported for models with a vision tower", config.model_type
        raise ConfigError("shard", what, expected="a model that reads text alone", got=got, fix=fix)
    found = torch.accelerator.current_accelerator()
    if device.type != (found.type if found else "cpu") or device.type == "mps":
        what, rule = "not supported on this device", "cuda, or cpu where there is no GPU"
        raise ConfigError("shard", what, expected=rule, got=device, fix="Leave --device out.")
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=shards)}


def prepare(model: Any, shards: int, name: str) -> None:
    """Set up a model that was just loaded in `shards` parts, before its first forward.

    Raises:
        ModelError: transformers does not shard the layers of this architecture.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    layers = decoder_layers(model)
    if not layers or not all(isinstance(layer, FSDPModule) for layer in layers):
        raise ModelError(
            "shard",
            "transformers does not shard the layers of this architecture",
            expected="decoder layers that its plan names (model.layers.*), as Llama or Qwen have",
            got=f"{name}, {architecture(model)}",
            fix="Leave --shard out: each process then holds the whole model.",
        )
    for p in model.parameters():  # on the CPU each part is a view of the weight that was read
        if (local := p.to_local()).untyped_storage().nbytes() > local.nbytes:
            p._local_tensor = local.clone()
    for part in (model, model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
    inner = getattr(model, model.base_model_prefix)
    # a forward of the whole model to FSDP: the ends are gathered, and layers ahead of their turn
    model.sharded_backbone = lambda **inputs: inner(**inputs)
    register_fsdp_forward_method(model, "sharded_backbone")
    model.sharded_bytes = sharded_weight_bytes(model, shards)


def folder_digest(path: str) -> str:
    """Of the ends of a model folder's weight files, "" for a name on the Hub.

    The fingerprint of a sharded model is that of what all processes have put together, so it cannot
    tell that their folders differ.
    """
    total = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as weights:
            size = weights.seek(0, os.SEEK_END)
            for start in (0, max(0, size - _END)):
                weights.seek(start)
                total.update(weights.read(_END))
        total.update(f"{file.name} {size}".encode())
    return total.hexdigest() if Path(path).is_dir() else ""


def backbone(model: Any) -> Callable[..., Any]:
    """What computes a causal LM's hidden states: the model without its unembedding."""
    inner = getattr(model, model.base_model_prefix, model)
    return getattr(model, "sharded_backbone", inner)


def is_sharded(model: Any) -> bool:
    """Whether `prepare` has set up this model."""
    return hasattr(model, "sharded_backbone")


def architecture(model: Any) -> str:
    """The name of a model's class in transformers; FSDP derives classes of its own."""
    return type(model).__name__.removeprefix("FSDP")
