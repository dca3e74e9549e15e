"""LoRA through peft: one slot in the model per LoRA configuration, any number of adapters on it.

peft adds its LoRA layers to the model once per configuration (a *slot*). An adapter is only its
tensors; activating it points the slot's parameters at them. So switching copies nothing, clients
cannot change each other's adapters, and a snapshot is a copy of an adapter.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cookbook_core.backend.local.model.fused_lora import fuse
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.errors import ConfigError, ModelError, RequestError
from cookbook_core.types import AdamParams, LoraConfig

ALPHA = 32
"""LoRA alpha at every rank, as on the `tinker` service: the scale is 32 / rank."""

_NOT_LAYOUT = ("base_model_name_or_path", "inference_mode", "revision", "task_type")


@dataclass
class Slot:
    """The LoRA layers of one configuration, into which one adapter at a time is put.

    Attributes:
        name: peft's name of it in the model.
        config: a peft.LoraConfig.
        params: the layers' parameters by the key under which peft saves them.
    """

    name: str
    config: Any
    params: dict[str, torch.nn.Parameter]


@dataclass
class Adapter:
    """The tensors of one LoRA adapter, its accumulated gradients and its optimizer."""

    slot: Slot
    params: list[torch.nn.Parameter]
    grads: list[torch.Tensor] | None = None
    step: int = 0
    optimizer: torch.optim.AdamW | None = field(default=None, repr=False)
    number: int = field(default_factory=itertools.count().__next__)
    """Identifies the adapter among the processes of a run."""

    def named(self) -> dict[str, torch.Tensor]:
        """Return the detached parameters by peft's key: A `(r, in)`, B `(out, r)`."""
        return {k: p.detach() for k, p in zip(self.slot.params, self.params, strict=True)}

    def copy(self) -> Adapter:
        """A new adapter with the same weights, no gradient, no optimizer and step 0."""
        return Adapter(self.slot, [_parameter(p.detach().clone()) for p in self.params])

    def accumulate(self, grads: Sequence[torch.Tensor]) -> None:
        """Add a gradient to the accumulated one.

        Args:
            grads: one tensor per parameter, A `(r, in)`, B `(out, r)`.

        Raises:
            RequestError: the sum is not finite; the accumulated gradient is unchanged.
        """
        before = self.grads or [torch.zeros_like(p) for p in self.params]
        totals = [total + g for total, g in zip(before, grads, strict=True)]
        norm = torch.stack([g.norm() for g in totals]).norm()
        if not torch.isfinite(norm):
            raise RequestError(
                "forward_backward",
                "the gradient of the parameters is not finite",
                expected="a finite gradient",
                got=f"norm {float(norm)}",
                fix="Nothing was accumulated. Scale the loss down, or load the model in float32.",
            )
        self.grads = totals

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """Take one AdamW step on the accumulated gradient, then clear the gradient.

        Returns:
            grad_norm: L2, before clipping. update_norm: L2 of the change of the weights. lr.
        Raises:
            RequestError: no gradient was accumulated, or the step is not finite in their dtype;
                weights, moments and gradient are unchanged.
        """
        if self.grads is None:
            raise RequestError(
                "optim_step",
                "no gradient has been accumulated since the last step",
                fix="Call forward_backward() or forward_backward_custom() first.",
            )
        optimizer = self.ready_optimizer()
        moments = {p: {k: x.clone() for k, x in s.items()} for p, s in optimizer.state.items()}
        for group in optimizer.param_groups:
            group.update(
                lr=adam.learning_rate,
                betas=(adam.beta1, adam.beta2),
                eps=adam.eps,
                weight_decay=adam.weight_decay,
            )
        before = [p.detach().clone() for p in self.params]
        grad_norm = torch.stack([g.norm() for g in self.grads]).norm()
        shrink = torch.clamp((adam.grad_clip_norm or math.inf) / (grad_norm + 1e-6), max=1.0)
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g * shrink
        optimizer.step()
        for p in self.params:
            p.grad = None
        moved = [p.detach() - b for p, b in zip(self.params, before, strict=True)]
        update_norm = torch.stack([change.norm() for change in moved]).norm()
        if not torch.isfinite(update_norm):
            for p, b in zip(self.params, before, strict=True):
                p.data.copy_(b)
            optimizer.state.clear()
            optimizer.state.update(moments)
            raise RequestError(
                "optim_step",
                "the step leaves the range of the weights",
                expected="a finite update",
                got=f"norm {float(update_norm)} with {adam}",
                fix="Nothing was changed. Lower learning_rate, raise eps, or clip the gradient.",
            )
        self.grads = None
        self.step += 1
        return {
            "grad_norm": float(grad_norm),
            "update_norm": float(update_norm),
            "lr": adam.learning_rate,
        }

    def ready_optimizer(self) -> torch.optim.AdamW:
        """The optimizer, made on first use: snapshots and references never need one."""
        if self.optimizer is None:
            fused = self.params[0].device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW(self.params, fused=fused)
        return self.optimizer


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
        return Adapter(slot, [_parameter(torch.zeros_like(p)) for p in slot.params.values()])

    @contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[list[torch.nn.Parameter]]:
        """Within the block, compute with `adapter` (None: with the bare base model).

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
        yield params

    @contextmanager
    def merged(self, adapter: Adapter | None) -> Iterator[None]:
        """Within the block, compute the layers of `adapter` with one product, W + scale * B A.

        Use it inside `active(adapter)`. Each sum is made from the frozen W, which is put aside
        unchanged and put back afterwards. Which layers are merged depends on the model alone: not
        those where the sum would round the adapter away (a base below float32) or change another
        layer (tied embeddings).

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
        if adapter is None:
            return []
        embedding = self.base.model.get_input_embeddings().weight
        return [
            module
            for module in self.base.model.modules()
            if adapter.slot.name in getattr(module, "lora_A", ())
            and (weight := module.get_base_layer().weight) is not embedding
            and weight.dtype in (torch.float32, torch.float64)
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
        widest = max(max(p.shape) for p in self.base.model.parameters())
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
        composite = model.config.get_text_config() is not model.config
        language = set((model.get_decoder() if composite else model).modules())
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
        fuse(model, name)
        self._active = self._slots[key] = Slot(name, config, params)
        return self._slots[key]


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


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=True)
