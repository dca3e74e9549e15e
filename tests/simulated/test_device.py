"""The simulated device by itself: the CPU's values, an accelerator's rules, exact counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.simulated import device
from tests.simulated.device import counting, limited_memory, without_float64

import pytest
import torch
from torch.utils.checkpoint import checkpoint

functional = torch.nn.functional

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda x, i: x + 2 * x,
    "index": lambda x, i: x[i],
    "index by a list": lambda x, i: x[[2, 0]],
    "index by a mask": lambda x, i: x[x > 0],
    "index of the host": lambda x, i: x[i.cpu()],
    "write at an index": lambda x, i: x.clone().index_put_((i,), x[i]),
    "write at a mask": lambda x, i: x.clone().masked_fill_(x > 0, 1.0),
    "sort, two results": lambda x, i: x.sort(dim=1, descending=True),
    "arange, an output of no size": lambda x, i: torch.arange(5, device=x.device) * x,
    "out of no size": lambda x, i: torch.cat([x, x], out=torch.empty(0, device=x.device)),
    "in place through a view": lambda x, i: x.clone().t()[1:].mul_(3),
    "transposed": lambda x, i: x.t().contiguous().view(-1),
    "unfold": lambda x, i: x.unfold(1, 2, 1),
    "foreach": lambda x, i: torch._foreach_mul([x, x.t()], 3.0),
    "foreach in place": lambda x, i: [torch._foreach_add_(y := [x.clone()], y), y][1],
    "einsum": lambda x, i: torch.einsum("ab,cb->ac", x, x),
    "half a product": lambda x, i: x.bfloat16() @ x.bfloat16().t(),
    "layer norm": lambda x, i: functional.layer_norm(x, (5,)),
    "cumulative sum in float64": lambda x, i: x.cumsum(1, dtype=torch.float64),
    "unique": lambda x, i: x.round().unique(return_inverse=True),
    "pad": lambda x, i: functional.pad(x, (1, 2)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    arguments = torch.randn(4, 5), torch.tensor([0, 3, 1])
    want = torch.utils._pytree.tree_leaves(OPERATORS[name](*arguments))
    found = torch.utils._pytree.tree_leaves(OPERATORS[name](*(x.to("sim") for x in arguments)))
    for expected, result in zip(want, found, strict=True):
        assert result.device == torch.device("sim:0")
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_launch_each_way(kv_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, 7, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 8)]
    inputs = [torch.randn(*shape) for shape in shapes]
    mask = torch.rand(2, 1, 7, 7).gt(0.3) | torch.eye(7).bool() if masked else None
    results = []
    for where in ("cpu", "sim"):
        own = [x.to(where).requires_grad_() for x in inputs]
        with counting() as counts:
            out = functional.scaled_dot_product_attention(
                *own,
                attn_mask=None if mask is None else mask.to(where),
                is_causal=not masked,
                enable_gqa=kv_heads != 4,
            )
            grads = torch.autograd.grad(out.square().sum(), own)
        results.append([out.cpu(), *(g.cpu() for g in grads)])
    torch.testing.assert_close(*results)
    assert counts.by_operator["attention"] == counts.by_operator["attention_backward"] == 1


def test_an_rms_norm_is_one_launch_each_way() -> None:
    torch.manual_seed(0)
    results = []
    for where in ("cpu", "sim"):
        torch.manual_seed(0)
        own = [torch.randn(*size).to(where).requires_grad_() for size in ((2, 3, 8), (8,))]
        with counting() as counts:
            y = functional.rms_norm(own[0], (8,), own[1], 1e-6)
            grads = torch.autograd.grad(y, own, torch.ones_like(y))
        results.append([x.cpu() for x in (y, *grads)])
    torch.testing.assert_close(*results)
    assert counts.by_operator == {"rms_norm": 1, "fill": 1, "rms_norm_backward": 1}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_of_sequences_of_unequal_length(kv_heads: int) -> None:
    torch.manual_seed(0)
    starts = [0, 5, 6, 15]
    q, g = torch.randn(15, 4, 8), torch.randn(15, 4, 8)
    k, v = torch.randn(15, kv_heads, 8), torch.randn(15, kv_heads, 8)
    want = [torch.empty(0)] * 4
    for a, b in itertools.pairwise(starts):
        own = [x[a:b].transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(
            *own, is_causal=True, scale=0.3, enable_gqa=True
        )
        grads = torch.autograd.grad(out, own, g[a:b].transpose(0, 1)[None])
        parts = [x[0].detach().transpose(0, 1) for x in (out, *grads)]
        want = [
            torch.cat([x, part]) if len(x) else part for x, part in zip(want, parts, strict=True)
        ]
    at = torch.tensor(starts, dtype=torch.int32, device="sim")
    x = [x.to("sim") for x in (q, k, v)]
    ranges = (at, at, 9, 9)
    with counting() as counts:
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            *x, *ranges, 0.0, True, False, scale=0.3
        )
        grads = torch.ops.aten._flash_attention_backward(
            g.to("sim"), *x, out, lse, *ranges, 0.0, True, *state, scale=0.3
        )
    torch.testing.assert_close([y.cpu() for y in (out, *grads)], want)
    assert counts.by_operator == {"flash_attention": 1, "flash_attention_backward": 1}


def test_operands_have_to_be_on_one_device() -> None:
    x = torch.ones(3, device="sim")
    with pytest.raises(RuntimeError, match=r"same device.*sim:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"same device.*sim:0 and cpu"):
        torch.ones(3, 3) @ x
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        x.numpy()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number, as on CUDA


def test_tied_parameters_stay_tied() -> None:
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    other.weight = one.weight
    both = torch.nn.ModuleList([one, other]).to("sim")
    assert one.weight.device.type == "sim"
    assert one.weight is other.weight
    assert len(list(both.parameters())) == 3


def test_counts() -> None:
    x, host = torch.ones(4, 4, device="sim"), torch.ones(4, 4)
    with counting() as counts:
        y = (x @ x).add_(1)[1:].t().reshape(2, 6)  # a product, a sum, and a copy: views are free
        torch._foreach_add_([x, y], 1.0)
    assert counts.by_operator == {"mm": 1, "add": 1, "copy": 1, "_foreach_add": 1}
    assert (counts.launches, counts.waits, counts.copies) == (4, 0, 0)
    with counting() as counts:
        x.sum().item()
        x.cpu()
        x[0].tolist()
        x[x > 0]
        torch.sim.synchronize()
    assert counts.by_reason == {"item": 1, "copy to the host": 2, "nonzero": 1, "synchronize": 1}
    assert counts.moved == {"d2h": 2, "d2h bytes": 64 + 16}
    with counting() as counts:
        host.to("sim")
        torch.tensor([1.0, 2.0], device="sim")
        x[[0, 1]]
        x[torch.tensor([1, 2])]
        x[torch.tensor([1, 2])] = 0.0
        host.to("sim", non_blocking=True)
    assert counts.moved == {"h2d": 6, "h2d blocking": 5, "h2d bytes": 2 * 64 + 8 + 3 * 16}
    assert counts.waits == 0


def test_the_backward_counts_too() -> None:
    x = torch.ones(3, 4, device="sim", requires_grad=True)
    loss = checkpoint(lambda y: (y @ y.t()).exp().sum(), x, use_reentrant=False)
    with counting() as counts:
        loss.backward()
    assert counts.by_operator["mm"] == 3  # recomputed, and one for each operand
    assert x.grad is not None
    assert x.grad.device.type == "sim"


def test_memory_has_an_end() -> None:
    before = device.used_bytes()
    device.forget_peak()
    x = torch.zeros(100, device="sim")
    del x
    assert (device.used_bytes(), device.peak_bytes()) == (before, before + 400)
    with limited_memory(400):
        held = torch.zeros(50, device="sim")
        assert torch.sim.mem_get_info() == (200, before + 400)
        with pytest.raises(torch.OutOfMemoryError, match="sim out of memory"):
            held.repeat(2)
        torch.zeros(50, device="sim")
    with (
        limited_memory(0, plain_error=True),
        pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED") as caught,
    ):
        torch.zeros(1, device="sim")
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    torch.zeros(1000, device="sim")


def test_float64_can_be_missing() -> None:
    x = torch.ones(3, device="sim")
    with without_float64():
        for make in (x.double, lambda: x.sum(dtype=torch.float64), lambda: 2.0 * x.long().double()):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert (2.0 * x).dtype == torch.float32
    assert x.double().dtype == torch.float64


def test_the_reason_is_given_where_it_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cache", lambda: tmp_path)
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        without.delenv("CXX", raising=False)
        with pytest.raises(device.Unavailable, match=r"C\+\+ compiler: install g\+\+"):
            device.build()
    monkeypatch.setattr(device, "SOURCE", tmp_path / "wrong.cpp")
    device.SOURCE.write_text("#include <torch/nowhere.h>", encoding="utf-8")
    with pytest.raises(device.Unavailable, match=r"does not compile with torch .*nowhere\.h"):
        device.build()
