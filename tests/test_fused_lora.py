"""LoRA in one product against peft's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from cookbook_core.backend.local.model.fused_lora import _product, fuse
from tests.oracles.counts import Count

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM


class Net(torch.nn.Module):
    """Two linear layers, of which one has a bias, with a nonlinearity between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 8, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(8, 5, bias=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def with_lora(dtype: torch.dtype, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
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


def test_the_gradient_of_x_is_one_tensor_and_no_adapter_is_the_bare_base() -> None:
    model = with_lora(torch.float64)
    fused = copy.deepcopy(model)
    fuse(fused, "slot0")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = fused.base_model.model.up(x)
    with Count() as count:
        torch.autograd.grad(out, x, torch.randn_like(out))
    assert not {"aten::add", "aten::add_"} & set(count.seen)
    fused.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    assert torch.equal(fused(x), model(x))


def test_a_bfloat16_base_keeps_its_float32_adapter_in_float32() -> None:
    model = with_lora(torch.bfloat16)
    fused = copy.deepcopy(model)
    fuse(fused, "slot0")
    x = torch.randn(3, 6).bfloat16()
    assert torch.equal(model(x), fused(x))
    assert fused(x).dtype == torch.bfloat16


def fused_in_bfloat16(model: Any) -> Any:
    """A copy of the model, fused, with its adapter rounded to bfloat16."""
    fused = copy.deepcopy(model)
    leaves = [p for p in fused.parameters() if p.requires_grad]
    fuse(fused, "slot0", {p: p.detach().bfloat16() for p in leaves})
    return fused


def test_a_bfloat16_base_keeps_x_as_it_is_and_no_copy() -> None:
    """Saved for the backward: nothing in float32, and x in the memory that its maker saves."""
    fused = fused_in_bfloat16(with_lora(torch.bfloat16))
    layer, saved = fused.base_model.model.up, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    inner = torch.randn(64, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = inner.exp()  # which saves its result
        layer(x)
    large = [t for t in saved if t.numel() >= 64 * 3]
    assert [t.dtype for t in saved] == [torch.bfloat16] * len(saved)
    assert {t.data_ptr() for t in large if t.shape == x.shape} == {x.data_ptr()}
    with Count() as count, torch.no_grad():
        layer(x)
    assert sum(count.seen.values()) == 3  # the layer's product, x A^T, and y += (...) B^T


def test_gradients_over_a_bfloat16_base_are_float32_and_as_near_as_peft_s() -> None:
    """Against float64 of the same rounded weights, over ten draws.

    Without the norms and attention of a model, whose rounding hides the difference.
    """
    errors: list[list[float]] = []
    for seed in range(10):
        models = [with_lora(dtype, seed) for dtype in (torch.bfloat16, torch.float64)]
        rounded = {n: p.bfloat16() for n, p in models[0].named_parameters()}
        for name, p in models[1].named_parameters():
            p.data.copy_(rounded[name])
        for name, p in models[0].named_parameters():
            p.data.copy_(rounded[name])
        x = torch.randn(200, 6).bfloat16()
        weights, grads = torch.randn(200, 5), []
        for model in (models[1], models[0], fused_in_bfloat16(models[0])):
            out = model(x.to(next(model.parameters()).dtype))
            leaves = [p for p in model.parameters() if p.requires_grad]
            own = torch.autograd.grad((out.double() * weights).sum(), leaves)
            assert {g.dtype for g in own} == {leaves[0].dtype}
            grads.append(torch.cat([g.flatten().double() for g in own]))
        errors.append([float((g - grads[0]).norm() / grads[0].norm()) for g in grads[1:]])
    theirs, ours = torch.tensor(errors).mean(0).tolist()
    assert 0 < ours < 2 * theirs
    assert ours < 0.02


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_slot_that_is_not_fused_computes_as_before_beside_one_that_is(fused_first: bool) -> None:
    """peft's casting of x is switched per layer, not per slot."""
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]}
    model = peft.get_peft_model(Net(torch.bfloat16), peft.LoraConfig(**options), "plain")
    model.add_adapter("biased", peft.LoraConfig(**options, lora_bias=True))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape)
    model.eval()
    fused = copy.deepcopy(model)
    rounded = {p: p.detach().bfloat16() for n, p in fused.named_parameters() if "lora_" in n}
    for name in ("plain", "biased") if fused_first else ("biased", "plain"):
        fuse(fused, name, rounded)
    x = torch.randn(5, 6).bfloat16()
    for name in ("plain", "biased"):
        model.set_adapter(name)
        fused.set_adapter(name)
        assert torch.equal(model(x), fused(x)) == (name == "biased")
        torch.testing.assert_close(model(x), fused(x), rtol=0.1, atol=0.1)


def test_dropout_and_other_layers_stay_with_peft(model_folder: Callable[..., str]) -> None:
    model = with_lora(torch.float64, lora_dropout=0.5)
    fuse(model, "slot0")
    assert not any(m.lora_variant for m in model.modules() if hasattr(m, "lora_variant"))
    base = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))  # Conv1D layers
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config, adapter_name="slot0")
    fuse(model, "slot0")
    assert not any(m.lora_variant for m in model.modules() if hasattr(m, "lora_variant"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_cuda_weight_gradients_are_not_rounded_to_the_base_s_dtype() -> None:
    torch.manual_seed(0)
    g, low = (torch.randn(4000, n, device="cuda").bfloat16() for n in (96, 8))
    for one, other in ((g.t(), low), (low.t(), g)):
        product = _product(one, other, torch.float32)
        exact = one.double() @ other.double()
        assert product.dtype == torch.float32
        assert float((product - exact).norm()) < 1e-5 * float(exact.norm())
