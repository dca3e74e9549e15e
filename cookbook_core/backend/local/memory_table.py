"""What fits into a device's memory, for any model: computed from its shapes, before it is loaded.

The bytes are those that the limits of a run are computed with: weights, graphs and shares of memory
of `model/memory.py`, keys and values of `sampling/cache_budget.py`, and an adapter that
`AdapterBank` makes on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cookbook_core.backend.local.model.adapters import AdapterBank
from cookbook_core.backend.local.model.loading import BaseModel, resolve_model
from cookbook_core.backend.local.model.memory import (
    SHARE,
    decoder_layers,
    estimate_graph_bytes,
    nf4_weight_bytes,
    sharded_weight_bytes,
    tokens_in,
    total_bytes,
    weight_bytes,
)
from cookbook_core.backend.local.model.quantization import NF4
from cookbook_core.backend.local.sampling import cache_budget
from cookbook_core.errors import ModelError
from cookbook_core.types import LoraConfig

import torch

RESERVED = 1.5e9
"""Bytes for the device's own context, tiles of the unembedding and one dequantized layer."""
STATE = 4
"""Tensors of an adapter in training: values, gradient, and Adam's two moments."""
SHORT = 2048
"""Tokens of the rows for which the error of a model that does not fit names a device."""


@dataclass(frozen=True)
class Fit:
    """What a base model in one dtype, with one adapter in training, leaves room for.

    Attributes:
        whole: tokens whose whole graphs are kept.
        recomputed: tokens of the longest row that can be trained on, with layers recomputed.
        sampling: rows x columns of a KV cache, without an adapter in training.
    """

    whole: int
    recomputed: int
    sampling: int


@dataclass(frozen=True)
class Sizes:
    """What a base model and one adapter in training take, in bytes.

    Attributes:
        weights: of the base model, by dtype: its own, and "nf4"; or "bfloat16 over 4" processes.
        adapter: of the adapter, its gradient and its optimizer.
        whole: of a token's whole graph.
        row: of a token of a row whose layers are recomputed in the backward: its checkpointed
            graph, and the graph of one layer with the backward through it.
        slot: of a token in a KV cache.
        context: tokens that the model was built for; None if its config has none.
    """

    weights: dict[str, int]
    adapter: int
    whole: float
    row: float
    slot: int
    context: int | None

    def fixed(self, dtype: str) -> float:
        """Bytes that are taken whatever is computed."""
        return self.weights[dtype] + self.adapter + RESERVED

    def fit(self, dtype: str, total: float) -> Fit:
        """What fits into a device of `total` bytes."""
        free, beside = max(0.0, total - self.fixed(dtype)), total - self.weights[dtype]
        whole = tokens_in(free, self.whole)
        sampling = cache_budget.tokens_in(beside, self.slot) if beside > 0 else 0
        return Fit(whole, max(whole, int(free / self.row)), sampling)


def skeleton(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A base model without numbers, on torch's meta device.

    Args:
        name: a folder with a config.json, a hub name or "tiny".
        dtype: of its parameters.
    Raises:
        ModelError: no such model, or not a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(path)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        what, rule = "no configuration of a causal language model", "a folder, a hub name or tiny"
        fix = "Check the spelling, and that the Hub is reachable."
        raise ModelError(name, what, expected=rule, got=first, fix=fix) from error


def adapter_bytes(model: Any, rank: int) -> int:
    """Bytes of a LoRA adapter in training on all linear layers of a skeleton.

    Raises:
        ConfigError: the rank is out of range.
    """
    device = torch.device("meta")
    rows = int(model.get_input_embeddings().weight.shape[0])
    base = BaseModel("", "", model, device, vocab_size=rows, max_context_length=None)
    with device:
        slot = AdapterBank(base).create(LoraConfig(rank, seed=0)).slot
        rounded = 0 if slot.rounded is None else slot.rounded.nbytes
        return STATE * slot.new_flat().nbytes + rounded


def measure(name: str, rank: int, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Sizes:
    """Compute what a model takes, in a dtype and with linear layers in NF4, or sharded.

    Args:
        name: see `skeleton`.
        rank: of the LoRA adapter, on all linear layers.
        dtype: of the weights, or of those that NF4 leaves as they are.
        shards: above 1: processes over which the layers are sharded; the sizes are those of rank 0,
            which has the adapter's gradient and optimizer.
    Raises:
        ModelError: no such model. ConfigError: the rank is out of range.
    """
    model = skeleton(name, dtype)
    config = model.config.get_text_config(decoder=True)
    graph = estimate_graph_bytes(model)
    row = graph.checkpointed + graph.whole / config.num_hidden_layers / SHARE
    if not decoder_layers(model):
        row = graph.whole / SHARE
    own = str(dtype).removeprefix("torch.")
    if shards > 1:
        weights = {f"{own} over {shards}": sharded_weight_bytes(model, shards)}
    else:
        weights = {own: weight_bytes(model), NF4: nf4_weight_bytes(model)}
    return Sizes(
        weights,
        adapter_bytes(model, rank),
        graph.whole,
        row,
        cache_budget.slot_bytes(config, dtype),
        getattr(config, "max_position_embeddings", None),
    )


def too_large(name: str, device: torch.device, dtype: torch.dtype, rank: int = 32) -> ModelError:
    """The error to raise where the weights of a base model did not fit; says what would fit."""
    total, sizes = total_bytes(device), measure(name, rank, dtype)
    own = str(dtype).removeprefix("torch.")
    longest = sizes.fit(NF4, total).recomputed
    least = (sizes.fixed(NF4) + SHORT * sizes.row) / 1e9
    fix = f"A device of {least:.0f} GB trains it in {NF4} on rows of {SHORT:,} tokens."
    if longest >= SHORT:
        fix = f'With dtype="{NF4}" rows of up to {longest:,} tokens fit (LoRA rank {rank}).'
    plain, nf4 = (f"{size / 1e9:.1f} GB" for size in sizes.weights.values())
    return ModelError(
        "base_model",
        f"does not fit into the memory of {device}",
        expected=f"at most {total / 1e9:.1f} GB, less what other programs use",
        got=f"{name}: {plain} in {own}, {nf4} in {NF4}",
        fix=fix,
    )
