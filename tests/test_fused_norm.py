"""RMS norms in fewer passes against transformers' own."""

from __future__ import annotations

from collections.abc import Callable

from cookbook_core.backend.local.model import fused_norm

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def norm_of(size: int, *, spread: float = 1.0) -> Qwen3RMSNorm:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(size)
    norm.weight.data = 1 + spread * torch.randn(size)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("shape", [(700, 128), (1, 300, 4, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_gradient_are_the_norm_s(shape: tuple[int, ...], scale: float) -> None:
    """Against float64, neither further from it than twice transformers' own float32."""
    own = norm_of(shape[-1])
    fused = norm_of(shape[-1])
    fused_norm.fuse(fused)
    assert "forward" in vars(fused)
    x = scale * torch.randn(shape)
    grad = torch.randn(shape)

    def both(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list:
        x = x.requires_grad_()
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y, x, grad.to(y))]

    def exact(x: torch.Tensor) -> torch.Tensor:
        rms = (x.square().mean(-1, keepdim=True) + own.variance_epsilon).sqrt()
        return x / rms * own.weight.double()

    want, found = both(exact, x.double()), both(fused, x)
    for true, theirs, ours in zip(want, both(own, x), found, strict=True):
        assert not torch.equal(theirs, ours)  # another order of the sums: it is the fused path
        assert (ours - true).norm() <= 2 * (theirs - true).norm()
    with torch.no_grad():
        assert torch.equal(fused(x), found[0])


def test_other_dtypes_and_trained_weights_compute_as_before() -> None:
    own, fused = norm_of(128), norm_of(128)
    fused_norm.fuse(fused)
    x = torch.randn(700, 128)
    for other in (x.bfloat16(), x.double()):
        assert torch.equal(own(other), fused(other))
    fused.weight.requires_grad_()
    fused(x).sum().backward()
    assert fused.weight.grad is not None


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class ShiftedRMSNorm(Qwen3RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    model = torch.nn.Sequential(ShiftedRMSNorm(8), Gemma2RMSNorm(8), torch.nn.LayerNorm(8))
    with torch.no_grad():
        for module in model:
            module.weight.normal_()
    fused_norm.fuse(model)
    assert not any("forward" in vars(module) for module in model)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "mistral"])
def test_every_norm_of_these_models_is_fused(model_folder: Callable[..., str], arch: str) -> None:
    from cookbook_core.backend.local.model.loading import load_base_model

    loaded = load_base_model(model_folder(arch), device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(model_folder(arch))
    norms = [m for m in loaded.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) > 2
    assert all("forward" in vars(norm) for norm in norms)
    assert not any("forward" in vars(m) for m in plain.modules())
