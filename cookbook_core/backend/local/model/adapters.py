"""LoRA through peft: one slot in the model per LoRA configuration, any number of adapters on it.

peft puts the LoRA layers into the model once per configuration (a *slot*). An adapter is nothing
but its tensors, and activating it points the slot's parameters at them: switching costs the size
of a list, clients cannot touch each other, and a snapshot is a copy of an adapter.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cookbook_core.backend.local.model.fused_lora import fuse
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import free_bytes
from cookbook_core.errors import ConfigError, ModelError, RequestError
from cookbook_core.types import AdamParams, LoraConfig

ALPHA = 32
"""LoRA alpha whatever the rank, as the `tinker` service has it: the scale is 32 / rank."""

_NOT_LAYOUT = ("base_model_name_or_path", "inference_mode", "revision", "task_type")


@dataclass
class Slot:
    """The place in the model where adapters of one configuration are put."""

    name: str
    config: Any
    params: dict[str, torch.nn.Parameter]
    """By the key under which peft saves them."""


@dataclass
class Adapter:
    """The tensors of one LoRA adapter, its accumulated gradients and its optimizer."""

    slot: Slot
    params: list[torch.nn.Parameter]
    grads: list[torch.Tensor] | None = None
    step: int = 0
    optimizer: torch.optim.AdamW | None = field(default=None, repr=False)
    number: int = field(default_factory=itertools.count().__next__)
    """Names it among the processes of a run."""

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors by the key under which peft saves them."""
        return {k: p.detach() for k, p in zip(self.slot.params, self.params, strict=True)}

    def copy(self) -> Adapter:
        """The same weights, fresh everything else."""
        return Adapter(self.slot, [_parameter(p.detach().clone()) for p in self.params])

    def accumulate(self, grads: Sequence[torch.Tensor]) -> None:
        """Add a gradient, all of it or (when the sum is not finite) nothing."""
        held = self.grads or [torch.zeros_like(p) for p in self.params]
        totals = [total + g for total, g in zip(held, grads, strict=True)]
        norm = torch.stack([g.norm() for g in totals]).norm()
        if not torch.isfinite(norm):
            raise RequestError(
                "forward_backward",
                "the gradient of the parameters is not finite",
                expected="a finite gradient",
                got=f"norm {float(norm)}",
                fix="Nothing was accumulated. Lower the loss's scale, or use float32.",
            )
        self.grads = totals

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """One AdamW step on the accumulated gradient, which is then gone.

        Returns:
            grad_norm (before clipping), update_norm (of the change made), lr.
        Raises:
            RequestError: nothing accumulated, or a step that leaves the range of the weights'
                dtype; nothing is changed then.
        """
        if self.grads is None:
            raise RequestError(
                "optim_step",
                "no gradient has been accumulated",
                expected="a forward_backward since the last step",
                got="none",
            )
        optimizer = self.ready_optimizer()
        held = {p: {k: x.clone() for k, x in of.items()} for p, of in optimizer.state.items()}
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
            optimizer.state.update(held)
            raise RequestError(
                "optim_step",
                "the step leaves the range of the weights",
                expected="a finite update",
                got=f"one of norm {float(update_norm)} with {adam}",
                fix="Nothing was stepped. Lower learning_rate, raise eps, or clip the gradient.",
            )
        self.grads = None
        self.step += 1
        return {
            "grad_norm": float(grad_norm),
            "update_norm": float(update_norm),
            "lr": adam.learning_rate,
        }

    def ready_optimizer(self) -> torch.optim.AdamW:
        """The optimizer; made on first use, since many adapters are only ever read."""
        if self.optimizer is None:
            fused = self.params[0].device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW(self.params, fused=fused)
        return self.optimizer


class AdapterBank:
    """All slots of one base model, and which adapter is in force."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._peft: Any = None
        self._slots: dict[str, Slot] = {}
        self._active: Slot | None = None

    def create(self, lora: LoraConfig) -> Adapter:
        """A fresh adapter: A uniform, B zero. The same seed gives the same bytes anywhere.

        Raises:
            ConfigError: a rank or seed out of range, or nothing to train.
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
        """An adapter of zeros in the slot for `peft_config`."""
        slot = self._slot(peft_config)
        return Adapter(slot, [_parameter(torch.zeros_like(p)) for p in slot.params.values()])

    @contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[list[torch.nn.Parameter]]:
        """The model computes with `adapter` inside (None: the bare base model).

        Yields:
            The slot's parameters, which are what a graph built inside leads to; they share
            storage with `adapter.params`.
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
        """Inside `active(adapter)`: its layers compute with one product, W + scale * B A.

        The sum is made from the frozen W each time and dropped afterwards; W itself is put aside,
        not changed, so its bytes stay what they were. Layers stay as they are where the sum would
        round the adapter away (a base below float32) or reach another layer (tied embeddings), and
        all of them where memory is short.
        """
        weights: list[tuple[Any, Any, torch.Tensor]] = []
        name = "" if adapter is None else adapter.slot.name
        try:
            for module in self._mergeable(adapter):
                weight = module.get_base_layer().weight
                summed = weight.data + module.get_delta_weight(name).to(weight.dtype)
                weights.append((module, weight, weight.data))
                weight.data = summed
                module.enable_adapters(False)
            yield
        finally:
            for module, weight, original in weights:
                weight.data = original
                module.enable_adapters(True)

    def _mergeable(self, adapter: Adapter | None) -> list[Any]:
        """The LoRA layers of the adapter whose weight can take the sum."""
        if adapter is None:
            return []
        embedding = self.base.model.get_input_embeddings().weight
        layers = [
            module
            for module in self.base.model.modules()
            if adapter.slot.name in getattr(module, "lora_A", ())
            and (weight := module.get_base_layer().weight) is not embedding
            and weight.dtype in (torch.float32, torch.float64)
        ]
        size = sum(m.get_base_layer().weight.nbytes for m in layers)
        return layers if 2 * size < free_bytes(self.base.device) else []

    def peft_config(self, lora: LoraConfig) -> Any:
        """peft's own configuration for `lora` on this model."""
        import peft

        targets = self._target_modules(lora)
        if not targets:
            raise ConfigError(
                "LoraConfig",
                "no layer would be trained",
                expected="at least one of train_attn, train_mlp, train_unembed",
                got="none that this model has",
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
            raise ConfigError("rank", what, expected=rule, got=repr(lora.rank))
        if lora.seed is not None and not _whole(lora.seed, -(2**63), 2**64 - 1):
            rule = "an integer from -2**63 to 2**64 - 1, or None"
            raise ConfigError("seed", "out of range", expected=rule, got=repr(lora.seed))
        for name in ("train_attn", "train_mlp", "train_unembed"):
            if not isinstance(value := getattr(lora, name), (int, np.bool_)):
                raise ConfigError(name, "wrong type", expected="True or False", got=repr(value))

    def _target_modules(self, lora: LoraConfig) -> list[str]:
        """Names, as short as they are unambiguous, of the linear layers `lora` asks for."""
        from transformers.pytorch_utils import Conv1D

        unembed = self.base.model.get_output_embeddings()
        unembed = getattr(unembed, "base_layer", unembed)
        wanted, others = set[str](), set[str]()
        for path, module in self.base.model.named_modules():
            if not isinstance(module, (torch.nn.Linear, Conv1D)) or ".lora_" in path:
                continue
            path = path.removesuffix(".base_layer")
            if module is unembed:
                chosen = lora.train_unembed
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
        name = f"slot{len(self._slots)}"
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
            self._active = Slot("none", None, {})  # whatever peft left active, set it anew
            raise ModelError(
                "LoraConfig", "does not fit this model", expected="a LoRA peft can add", got=error
            ) from error
        params = {
            f"base_model.model.{path.replace(f'.{name}.', '.')}": p
            for path, p in model.named_parameters()
            if f".{name}." in path
        }
        dtype = self.base.adapter_dtype
        for p in params.values():
            p.data = p.data.to(dtype)
        fuse(model, name)
        self._active = self._slots[key] = Slot(name, config, params)
        return self._slots[key]


def plain_config(config: Any) -> dict[str, Any]:
    """A peft configuration as sorted plain JSON values, without what peft adds at run time."""
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
