"""What is set for a CUDA device, and which dtype it gets: decided here, with a device that is not.

Nothing is computed on it: the calls are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from cookbook_core.backend.local.model import cuda, loading
from cookbook_core.errors import ModelError

import pytest
import torch
from transformers import AutoModelForCausalLM

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Global settings of torch as they were."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    yield
    matmul.allow_bf16_reduced_precision_reduction = before
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings given to the allocator of a Linux machine with an unused GPU."""
    given: list[str] = []
    for name in cuda._ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append, raising=False)
    return given


def test_products_are_summed_in_float32_and_tf32_is_off(settings: list[str]) -> None:
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    cuda.prepare(torch.device("cpu"))
    assert matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "high"
    assert settings == []
    cuda.prepare(CUDA)
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "highest"
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize("why", ["configured", "in use", "another system"])
def test_an_allocator_that_is_configured_or_in_use_is_left_alone(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "configured":
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    elif why == "in use":
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1 << 20)
    else:
        monkeypatch.setattr(sys, "platform", "win32")
    cuda.prepare(CUDA)
    assert settings == []


def test_a_device_without_expandable_segments_gets_them_back_off(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", refuse)
    cuda.prepare(CUDA)
    assert settings == ["expandable_segments:True", "expandable_segments:False"]


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_without_bfloat16_takes_float32_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setattr(cuda, "has_bfloat16", lambda _: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert loading.choose_dtype("bfloat16", CUDA) == torch.bfloat16
    assert loading.choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert caplog.messages == []
    assert loading.choose_dtype("auto", CUDA) == (torch.bfloat16 if has else torch.float32)
    assert [message[:8] for message in caplog.messages] == ["Tesla T4"] * (not has)


def test_weights_are_read_straight_to_the_device(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., str]
) -> None:
    maps: list[Any] = []

    def from_pretrained(path: str, **options: Any) -> Any:
        maps.append(options.get("device_map"))
        raise OSError("far enough")

    own = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "choose_device", torch.device)
    monkeypatch.setattr(cuda, "prepare", lambda _: None)
    for device in ("cuda", "cpu"):
        with pytest.raises(ModelError, match="far enough"):
            loading.load_base_model(model_folder(), device, "float32")
    assert maps == [{"": CUDA}, None]
    # such a map leaves nothing behind in the model: no hooks, the same weights
    mapped, plain = (own(model_folder(), device_map=m) for m in ({"": "cpu"}, None))
    assert not any(hasattr(m, "_hf_hook") or "forward" in vars(m) for m in mapped.modules())
    for one, other in zip(mapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
