"""Kernels for norms and SwiGLU: which are taken and which refused. Liger itself needs a GPU.

A stand-in with Liger's names and arguments computes on the CPU what a test wants it to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cookbook_core.backend.local.model import fused_cuda

import pytest
import torch
from transformers import AutoModelForCausalLM


def liger_norm(x: Any, weight: Any, eps: float, offset: float, mode: str, in_place: bool) -> Any:
    """What its documentation says of casting_mode; in_place would break residual streams."""
    assert not in_place
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if mode == "llama":
        return (weight + offset) * scaled.to(x.dtype)
    return ((weight.float() + offset) * scaled).to(x.dtype)


def liger_swiglu(a: Any, b: Any) -> Any:
    return torch.nn.functional.silu(a.float()).to(a.dtype) * b


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(norm, swiglu)`: the stand-in for Liger; None for both: no Liger."""

    def put(norm: Any = liger_norm, swiglu: Any = liger_swiglu) -> None:
        functions = {"rms_norm": ("RMSNorm", norm), "swiglu": ("SiLUMul", swiglu)}
        for file, (name, function) in functions.items():
            module: Any = ModuleType(file)
            own = type(name, (), {"apply": staticmethod(function)})
            setattr(module, f"Liger{name}Function", own)
            value = module if function is not None else None
            monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{file}", value)
        for package in ("liger_kernel", "liger_kernel.ops"):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))

    return put


def load(folder: str, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def replaced(model: Any) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "forward" in vars(m)}


def outcome(model: Any) -> list[torch.Tensor]:
    """Logits and the gradient of their squares with respect to the embedded tokens."""
    x = model.get_input_embeddings()(torch.arange(20)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits.float()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=x, use_cache=False).logits.float(), logits)
    return [logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0].float()]


TAKEN = {
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP"},
    "llama": {"LlamaRMSNorm", "LlamaMLP"},
    "mistral": {"MistralRMSNorm", "MistralMLP"},
    "gemma2": {"Gemma2RMSNorm"},  # 1 + weight; its MLP has another activation
    "gpt2": set(),
}


@pytest.mark.parametrize("arch", list(TAKEN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_s_own_modules_take_the_kernels(
    model_folder: Callable[..., str],
    install: Install,
    caplog: pytest.LogCaptureFixture,
    arch: str,
    dtype: torch.dtype,
) -> None:
    install()
    fused, other = (load(model_folder(arch), dtype) for _ in "12")
    assert fused_cuda.fuse(fused) == dict.fromkeys(sorted(TAKEN[arch]), "liger")
    assert replaced(fused) == TAKEN[arch]
    assert replaced(other) == set()
    assert caplog.messages == []
    for ours, own in zip(outcome(fused), outcome(other), strict=True):
        assert float((ours - own).norm()) <= (0.1 if dtype.itemsize == 2 else 1e-5) * own.norm()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, y: Any) -> Any:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 1.1 * grads[0], None


def wrong_value(*args: Any) -> Any:
    return 1.1 * liger_norm(*args)


def wrong_gradient(x: Any, *args: Any) -> Any:
    return liger_norm(WrongGradient.apply(x, x.detach()), *args)


def other_bits_without_gradient(*args: Any) -> Any:
    return liger_norm(*args) * (1 if torch.is_grad_enabled() else 1 + 2**-7)


def does_not_compile(*_: Any) -> Any:
    raise AssertionError("from the depths of a compiler")


@pytest.mark.parametrize(
    "norm", [wrong_value, wrong_gradient, other_bits_without_gradient, does_not_compile]
)
def test_kernels_that_compute_something_else_are_refused(
    model_folder: Callable[..., str],
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    norm: Any,
) -> None:
    install(norm)
    monkeypatch.setattr(fused_cuda, "_torch_norm", does_not_compile)
    model, own = (load(model_folder(), torch.bfloat16) for _ in "12")
    fused_cuda.fuse(model)
    assert replaced(model) == {"Qwen3MLP"}
    assert [m.split(":")[0] for m in caplog.messages] == ["Qwen3RMSNorm"]
    install(swiglu=does_not_compile)
    fused_cuda.fuse(own)
    assert replaced(own) == {"Qwen3RMSNorm"}
    assert [m.split(":")[0] for m in caplog.messages[1:]] == ["Qwen3MLP"]


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_full_device_decides_nothing(model_folder: Callable[..., str], install: Install) -> None:
    install(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fused_cuda.fuse(load(model_folder(), torch.bfloat16))


def test_without_liger_the_norms_are_torch_s(
    model_folder: Callable[..., str], install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(None, None)
    for arch in ("qwen3", "gemma2"):
        model = load(model_folder(arch), torch.bfloat16)
        taken = {"Qwen3RMSNorm"} if arch == "qwen3" else set()
        assert fused_cuda.fuse(model) == dict.fromkeys(taken, "torch")
        assert replaced(model) == taken
    assert caplog.messages == []


def test_float64_is_left_exact(model_folder: Callable[..., str], install: Install) -> None:
    install(does_not_compile, does_not_compile)
    model = load(model_folder(), torch.float64)
    fused_cuda.fuse(model)
    assert replaced(model) == set()


def test_lora_added_later_is_part_of_the_kernel_s_input(
    model_folder: Callable[..., str], install: Install
) -> None:
    import peft

    install()
    results = []
    for fuse in (lambda _: None, fused_cuda.fuse):
        model = load(model_folder(), torch.float32)
        fuse(model)
        config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
        peft.get_peft_model(model, config)
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape))
        results.append(outcome(model))
    for ours, own in zip(*results, strict=True):
        assert float((ours - own).norm()) <= 1e-5 * float(own.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_cuda_with_liger_where_it_is_installed(model_folder: Callable[..., str]) -> None:
    """The kernels themselves: taken without a warning, near the module's own values."""
    fused, own = (load(model_folder(), torch.float32) for _ in "12")
    want = outcome(own)
    fused_cuda.fuse(fused.cuda())
    taken = {"Qwen3RMSNorm"} | ({"Qwen3MLP"} if fused_cuda._liger()[1] else set())
    assert replaced(fused) == taken
    x = fused.get_input_embeddings()(torch.arange(20, device="cuda")[None]).detach()
    logits = fused(inputs_embeds=x, use_cache=False).logits
    assert float((logits.cpu() - want[0]).norm()) <= 1e-4 * float(want[0].norm())
