"""Attention kernels on a GPU against plain torch on the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

from cookbook_core.backend.local.scoring import by_segment, flash, flex, kernels
from cookbook_core.backend.local.scoring.kernels import Kind
from cookbook_core.backend.local.scoring.packing import lay_out

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")

AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_ampere = pytest.mark.skipif(not AMPERE, reason="flash attention needs compute capability 8.0")


def card() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def row(length: int, sharing: bool = True) -> Any:
    """About `length` tokens: a prompt of a third of them and three continuations, or three rows."""
    prompt = [1] * (length // 3)
    tails = [[2 + n] * (length // 6 + n) for n in range(3)]
    return lay_out([*(prompt + tail for tail in tails), [9] * (length // 6 + 1)], share=sharing)


def results(
    attend: Any, layout: Any, device: Any, dtype: Any, heads: Any, width: int, *more: Any
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(heads[0], width), (heads[1], width), (heads[1], width), (heads[0], width)]
    q, k, v, g = (torch.randn(len(layout.tokens), *s).bfloat16().to(device, dtype) for s in shapes)
    inputs = [x.transpose(0, 1).requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, width**-0.5, layout, *more)
    return [x.detach() for x in (out, *torch.autograd.grad(out, inputs, g))]


def check(attend: Any, length: int, dtype: Any, heads: Any, width: int, *more: Any) -> None:
    layout = row(length)
    found = results(attend, layout, card(), dtype, heads, width, *more)
    want = results(
        by_segment.attend, row(length), torch.device("cpu"), torch.float32, heads, width, *more
    )
    for x, y in zip(found, want, strict=True):
        error = (x.float().cpu() - y).square().mean().sqrt() / y.square().mean().sqrt()
        assert float(error) < kernels.BOUND[dtype]


@needs_ampere
@pytest.mark.parametrize("length", [12, 30, 127, 128, 129, 700])
@pytest.mark.parametrize(("heads", "width"), [((16, 8), 128), ((14, 2), 64), ((4, 4), 256)])
def test_flash_attention_in_calls(length: int, heads: tuple[int, int], width: int) -> None:
    check(flash.attend, length, torch.bfloat16, heads, width)


@pytest.mark.parametrize("length", [30, 129, 700])
@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_attention(length: int, window: int | None, softcap: float | None) -> None:
    dtype = torch.bfloat16 if AMPERE else torch.float16
    check(flex.attend, length, dtype, (8, 4), 64, window, softcap)


def test_flex_attention_in_float32() -> None:
    check(flex.attend, 300, torch.float32, (4, 2), 32, 64, 2.0)


@needs_ampere
@pytest.mark.parametrize("kernel", [flash, flex])
def test_the_same_bits_twice_and_with_and_without_a_graph(kernel: Any) -> None:
    """Of the gradient too: by default flash attention adds q's up in the order blocks finish."""
    for sharing in (True, False):
        layout = row(1500, sharing)
        runs = [
            results(kernel.attend, layout, card(), torch.bfloat16, (8, 2), 64) for _ in range(4)
        ]
        for other in runs[1:]:
            for x, y in zip(other, runs[0], strict=True):
                assert torch.equal(x, y)
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(len(layout.tokens), n, 64).bfloat16().to(card()).transpose(0, 1)
            for n in (8, 2, 2)
        )
        with torch.no_grad():
            assert torch.equal(kernel.attend(q, k, v, 64**-0.5, layout), runs[0][0])


@needs_ampere
def test_the_choice_on_this_card(caplog: pytest.LogCaptureFixture) -> None:
    """Every kind of the supported models has a fused kernel here, without a warning."""
    for chosen, width, more in (
        ("flash", 128, {}),
        ("flash", 64, {}),
        ("flex", 64, {"window": True}),
        ("flex", 128, {"window": True, "softcap": True}),
    ):
        kind = Kind(card(), torch.bfloat16, 8, 4, width, width, **more)
        assert kernels.kernel_for(kind) == chosen, caplog.text
    assert caplog.records == []
