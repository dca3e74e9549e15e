"""LoRA through peft: one slot in the model per LoRA configuration, any number of adapters on it.

peft adds its LoRA layers to the model once per configuration (a *slot*). An adapter is only its
tensors; activating it points the slot's parameters at them. So switching copies nothing (over a
base below float32: rounds them once), clients cannot change each other's adapters, and a snapshot
is a copy of an adapter.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from cookbook_core.backend.local.model import fused_layer
from cookbook_core.backend.local.model.flat_adapter import Adapter, Slot
from cookbook_core.backend.local.model.fused_lora import fuse
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.quantization import is_quantized, shape_of
from cookbook_core.backend.local.model.vision import language_model
from cookbook_core.errors import ConfigError, ModelError
from cookbook_core.types import LoraConfig

import numpy as np
import torch

ALPHA = 32
"""LoRA alpha at every rank, as on the `tinker` service: the scale is 32 / rank."""

_NOT_LAYOUT = ("base_model_name_or_path", "inference_mode", "revision", "task_type")


class AdapterBank:
    """All slots of one base model, and which adapter is active."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._peft: Any = None
        self._slots: dict[str, Slot] = {}
        self._numbers = itertools.count()
        self._active: Slot | None = None

    def create(self, lora: LoraConfig) -> Adapter:
        """Make a new adapter: A uniform (Kaiming), B zero. Equal seeds give equal bytes everywhere.

        Raises:
            ConfigError: a rank or seed out of range, or no layer to train.
        """
        self._check(lora)
        adapter = self.empty(self.peft_config(lora))
        seed = torch.seed() if lora.seed is None else int(lora.seed)
        generator = torch.Generator().manual_seed(seed)
        for key, p in zip(adapter.slot.params, adapter.params, strict=True):
            if ".lora_A." in key:
                start = torch.empty(p.shape, dtype=torch.float32)
                torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                p.data.copy_(start)
        return adapter

    def empty(self, peft_config: Any) -> Adapter:
        """Make an adapter of zeros in the slot for `peft_config`.

        Raises:
            ModelError: peft cannot add such LoRA layers to this model.
        """
        slot = self._slot(peft_config)
        return Adapter(slot, slot.new_flat())

    @contextmanager
    def active(
        self, adapter: Adapter | None, *, unchanged: bool = False
    ) -> Iterator[list[torch.nn.Parameter]]:
        """Within the block, compute with `adapter` (None: with the bare base model).

        Do not change its values, nor use another adapter, in the block.

        Args:
            adapter: what to compute with.
            unchanged: its values are those of the last block. Where no other adapter was active
                since then, graphs made in that block can still be used.

        Yields:
            The slot's parameters: the leaves of a graph built in the block. They share storage
            with `adapter.params`.
        """
        slot = None if adapter is None else adapter.slot
        if slot is not self._active:
            if slot is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(slot.name)
            self._active = slot
        if adapter is None or slot is None:
            yield []
            return
        params = list(slot.params.values())
        for p, tensor in zip(params, adapter.params, strict=True):
            p.data = tensor.data
        if slot.rounded is not None and not (unchanged and slot.holder == adapter.number):
            slot.rounded.copy_(adapter.flat.data)
        slot.holder = adapter.number
        yield params

    @contextmanager
    def merged(self, adapter: Adapter | None) -> Iterator[None]:
        """Within the block, compute the layers of `adapter` with one product, W + scale * B A.

        Use it inside `active(adapter)`. Each sum is made from the frozen W, which is put aside
        unchanged and put back afterwards. Which layers are merged depends on the model alone: not
        those where the sum would round the adapter away (a base below float32, or quantized) or
        change another layer (tied embeddings), and none of a sharded model.

        Args:
            adapter: None merges nothing.
        """
        frozen: list[tuple[Any, Any, torch.Tensor]] = []
        name = "" if adapter is None else adapter.slot.name
        try:
            for module in self._mergeable(adapter):
                weight = module.get_base_layer().weight
                summed = weight.data + module.get_delta_weight(name).to(weight.dtype)
                frozen.append((module, weight, weight.data))
                weight.data = summed
                module.enable_adapters(False)
            yield
        finally:
            for module, weight, original in frozen:
                weight.data = original
                module.enable_adapters(True)

    def merged_bytes(self, adapter: Adapter | None) -> int:
        """Device memory, in bytes, that the weights made by `merged(adapter)` take."""
        return sum(m.get_base_layer().weight.nbytes for m in self._mergeable(adapter))

    def _mergeable(self, adapter: Adapter | None) -> list[Any]:
        """The LoRA layers of the adapter that `merged` merges."""
        if adapter is None or self.base.shards > 1:
            return []
        embedding = self.base.model.get_input_embeddings().weight
        return [
            module
            for module in self.base.model.modules()
            if adapter.slot.name in getattr(module, "lora_A", ())
            and (weight := module.get_base_layer().weight) is not embedding
            and weight.dtype in (torch.float32, torch.float64)
            and not is_quantized(weight)
        ]

    def free_slots(self, used: Collection[str]) -> None:
        """Remove the layers of configurations that no adapter has; each takes memory and time.

        Args:
            used: names of the slots of all adapters that may still be active.
        """
        for key, slot in list(self._slots.items()):
            if slot.name not in used and slot is not self._active:
                self._peft.delete_adapter(slot.name)
                del self._slots[key]

    def peft_config(self, lora: LoraConfig) -> Any:
        """The peft configuration for `lora` on this model.

        Raises:
            ConfigError: no layer to train.
        """
        import peft

        targets = self._target_modules(lora)
        if not targets:
            raise ConfigError(
                "LoraConfig",
                "no layer would be trained",
                expected="a layer of the model selected by train_attn, train_mlp or train_unembed",
                fix="Set train_attn or train_mlp to True.",
            )
        return peft.LoraConfig(
            r=lora.rank,
            lora_alpha=ALPHA,
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base.path,
        )

    def _check(self, lora: LoraConfig) -> None:
        widest = max(max(shape_of(p)) for p in self.base.model.parameters())
        if not _whole(lora.rank, 1, widest):
            what = "too small" if _whole(lora.rank, -math.inf, 0) else "out of range"
            rule = f"an integer from 1 to {widest}, the width of the widest layer"
            raise ConfigError("rank", what, expected=rule, got=repr(lora.rank), fix="Change rank=.")
        if lora.seed is not None and not _whole(lora.seed, -(2**63), 2**64 - 1):
            rule = "an integer from -2**63 to 2**64 - 1, or None"
            raise ConfigError(
                "seed", "out of range", expected=rule, got=repr(lora.seed), fix="Change seed=."
            )
        for name in ("train_attn", "train_mlp", "train_unembed"):
            if not isinstance(value := getattr(lora, name), (int, np.bool_)):
                raise ConfigError(name, "wrong type", expected="True or False", got=repr(value))

    def _target_modules(self, lora: LoraConfig) -> list[str]:
        """The names, as short as they are unambiguous, of the linear layers that `lora` selects.

        Of a model with image or audio encoders only the language model is taken: training is on
        text, so no gradient would reach LoRA elsewhere.
        """
        from transformers.pytorch_utils import Conv1D

        model = self.base.model
        unembed = model.get_output_embeddings()
        unembed = getattr(unembed, "base_layer", unembed)
        language = set(language_model(model).modules())
        wanted, others = set[str](), set[str]()
        for path, module in model.named_modules():
            if not isinstance(module, (torch.nn.Linear, Conv1D)) or ".lora_" in path:
                continue
            path = path.removesuffix(".base_layer")
            if module is unembed:
                chosen = lora.train_unembed
            elif module not in language:
                chosen = False
            elif "attn" in path or "attention" in path:
                chosen = lora.train_attn
            else:
                chosen = lora.train_mlp
            (wanted if chosen else others).add(path)

        def tail(path: str, parts: int) -> str:
            return ".".join(path.split(".")[-parts:])

        for parts in (1, 2):  # GPT-2 calls a layer of each kind c_proj
            names = {tail(path, parts) for path in wanted}
            if not names & {tail(path, parts) for path in others}:
                return sorted(names)
        return sorted(wanted)

    def _slot(self, config: Any) -> Slot:
        import peft

        layout = {k: v for k, v in plain_config(config).items() if k not in _NOT_LAYOUT}
        key = json.dumps(layout, sort_keys=True)
        if key in self._slots:
            return self._slots[key]
        name = f"slot{next(self._numbers)}"
        model = self.base.model
        try:
            with warnings.catch_warnings():
                # peft warns that LoRA on a tied unembedding cannot be merged in place: exporting
                # has to untie it, training and saving are exact.
                warnings.simplefilter("ignore")
                if self._peft is None:
                    self._peft = peft.get_peft_model(model, config, adapter_name=name)
                else:
                    self._peft.base_model.enable_adapter_layers()
                    self._peft.add_adapter(name, config)
                    self._peft.set_adapter(name)
        except (ValueError, TypeError) as error:
            self._active = Slot("none", None, {})  # peft may have changed it: set it again
            raise ModelError(
                "LoraConfig",
                "peft cannot add it to this model",
                expected="target_modules among the model's layers",
                got=error,
                fix="Check that the adapter was made for this base model.",
            ) from error
        params = {
            f"base_model.model.{path.replace(f'.{name}', '')}": p
            for path, p in model.named_parameters()
            if name in path.split(".")  # the last part of it for LoRA on an embedding
        }
        dtype = self.base.adapter_dtype
        for p in params.values():
            p.data = p.data.to(dtype)
        slot = Slot(name, config, params)
        rounded = {}
        if model.dtype.itemsize < dtype.itemsize:
            slot.rounded = slot.new_flat(model.dtype)
            rounded = dict(zip(params.values(), slot.views(slot.rounded), strict=True))
        fuse(model, name, rounded)
        fused_layer.check_slot(model, params.values())
        self._active = self._slots[key] = slot
        return slot


def plain_config(config: Any) -> dict[str, Any]:
    """Convert a peft configuration to sorted plain JSON values, without what peft adds at run
    time."""
    plain = {}
    for key, value in sorted(config.to_dict().items()):
        if key in ("runtime_config", "auto_mapping", "peft_version"):
            continue
        plain[key] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return json.loads(json.dumps(plain, default=str))


def _whole(value: Any, low: float, high: float) -> bool:
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return bool(number and low <= value <= high)
