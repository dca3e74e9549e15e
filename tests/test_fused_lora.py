"""LoRA in one product against peft's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from cookbook_core.backend.local.model.fused_lora import fuse


class Net(torch.nn.Module):
    """Two linear layers, of which one has a bias, with a nonlinearity between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 8, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(8, 5, bias=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def with_lora(dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"], **options)
    model = peft.get_peft_model(Net(dtype), config, adapter_name="slot0")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
    return model.eval()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("trained_input", [False, True])
def test_value_and_gradients_are_peft_s(shape: tuple[int, ...], trained_input: bool) -> None:
    model = with_lora(torch.float64)
    fused = copy.deepcopy(model)
    fuse(fused, "slot0")
    assert all(m.lora_variant for m in fused.modules() if hasattr(m, "lora_variant"))
    results = []
    for each in (model, fused):
        torch.manual_seed(1)
        x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=trained_input)
        out = each(x)
        wanted = [p for p in each.parameters() if p.requires_grad] + [x] * trained_input
        grads = torch.autograd.grad(out, wanted, torch.randn_like(out))
        results.append([out, *grads])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert len(results[0]) == 1 + 4 + trained_input


def test_a_bfloat16_base_keeps_its_float32_adapter_in_float32() -> None:
    model = with_lora(torch.bfloat16)
    fused = copy.deepcopy(model)
    fuse(fused, "slot0")
    x = torch.randn(3, 6).bfloat16()
    assert torch.equal(model(x), fused(x))
    assert fused(x).dtype == torch.bfloat16


def test_dropout_and_other_layers_stay_with_peft(model_folder: Callable[..., str]) -> None:
    model = with_lora(torch.float64, lora_dropout=0.5)
    fuse(model, "slot0")
    assert not any(m.lora_variant for m in model.modules() if hasattr(m, "lora_variant"))
    base = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))  # Conv1D layers
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config, adapter_name="slot0")
    fuse(model, "slot0")
    assert not any(m.lora_variant for m in model.modules() if hasattr(m, "lora_variant"))
