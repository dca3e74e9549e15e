"""SwiGLU with one tensor less to keep against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

from cookbook_core.backend.local.model import fused_swiglu

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP


class Model(torch.nn.Module):
    def __init__(self, kind: type[Qwen3MLP], dtype: torch.dtype, act: str = "silu") -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3Config(hidden_size=12, intermediate_size=40, hidden_act=act)
        self.mlp = kind(config).to(dtype).requires_grad_(False)
        self.dtype = dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bits_are_the_module_s_and_one_tensor_less_is_kept(dtype: torch.dtype) -> None:
    own = Model(Qwen3MLP, dtype)
    fused = copy.deepcopy(own)
    fused_swiglu.fuse(fused)
    assert "forward" in vars(fused.mlp)
    assert "forward" not in vars(own.mlp)
    results, kept = [], []
    for model in (own, fused):
        saved: dict[int, int] = {}

        def note(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.numel()
            return x

        torch.manual_seed(1)
        x = (3 * torch.randn(2, 5, 12)).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = model.mlp(x)
        results.append([y.detach(), *torch.autograd.grad(y, x, torch.randn(y.shape).to(dtype))])
        kept.append(sum(size == 2 * 5 * 40 for size in saved.values()))
        with torch.no_grad():
            assert torch.equal(model.mlp(x), results[-1][0])
    for want, found in zip(*results, strict=True):
        assert torch.equal(want, found)
    assert kept == [3, 2]  # gate, silu(gate), up; h is kept by trained layers alone


def test_a_layer_that_computes_something_else_is_left_alone() -> None:
    class Shifted(Qwen3MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-6

    class Swapped(Qwen3MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    for model in (Model(Shifted, torch.float32), Model(Swapped, torch.float32)):
        fused_swiglu.fuse(model)
        assert "forward" not in vars(model.mlp)
    other = Model(Qwen3MLP, torch.float32, act="gelu")
    fused_swiglu.fuse(other)
    assert "forward" not in vars(other.mlp)


def test_layers_of_a_loaded_model_are_fused(model_folder: Callable[..., str]) -> None:
    from cookbook_core.backend.local.model.loading import load_base_model

    model = load_base_model(model_folder("llama"), device="cpu").model
    layers = [m for m in model.modules() if fused_swiglu.is_swiglu(m)]
    assert layers
    assert all("forward" in vars(layer) for layer in layers)
