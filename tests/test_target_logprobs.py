"""Target logprobs without logits in memory, against log_softmax with all of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cookbook_core.backend.local import scoring
from cookbook_core.backend.local.scoring.target_logprobs import (
    Head,
    Targets,
    find_head,
    target_logprobs,
)

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

N, DIM, VOCAB = 7, 5, 11


def make_head(
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    trained: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Head:
    torch.manual_seed(0)
    linear = torch.nn.Linear(DIM, VOCAB, bias=bias, dtype=dtype).requires_grad_(trained)
    linear.weight.data.mul_(6)  # logits of a few nats, so that capping at 3 bends them
    return Head(SimpleNamespace(get_output_embeddings=lambda: linear), scale, softcap)


def wide_logprobs(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """target_logprobs of the same number of targets for each row, `(N, K)`."""
    n, k = ids.shape
    rows, starts = torch.arange(n).repeat_interleave(k), torch.arange(n) * k
    targets = Targets(ids.flatten(), rows, starts, [*starts.tolist(), n * k])
    return target_logprobs(head, hidden, targets).view(n, k)


def naive(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log_softmax over all logits, one row at a time."""
    linear, rows = head.module, []
    for h, row in zip(hidden, targets, strict=True):
        y = head.scale * (linear.weight @ h + (0 if linear.bias is None else linear.bias))
        if head.softcap is not None:
            y = head.softcap * torch.tanh(y / head.softcap)
        rows.append(torch.log_softmax(y, 0)[row])
    return torch.stack(rows)


def inputs(k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Hidden states, targets with a repeated id in one row, and a cotangent."""
    generator = torch.Generator().manual_seed(k)
    hidden = torch.randn(N, DIM, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (N, k), generator=generator)
    targets[3] = targets[3, 0]
    cotangent = torch.randn(N, k, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(True), targets, cotangent


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 7 * VOCAB, 1 << 24])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1, None), (0.25, None), (1, 3.0), (0.5, 3.0)])
@pytest.mark.parametrize("k", [1, 3])
def test_equal_to_log_softmax_value_and_gradient(
    k: int,
    scale: float,
    softcap: float | None,
    bias: bool,
    trained: bool,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every head, frozen and trained, in chunks of 1, 3 (7 = 3 + 3 + 1), 7 and all rows; tiles of
    all or part of the vocabulary, the last one smaller."""
    monkeypatch.setattr(scoring.target_logprobs, "CHUNK_ELEMENTS", elements)
    tile = {1: (1, 1), 3 * VOCAB: (3, 4), 7 * VOCAB: (100, VOCAB - 1), 1 << 24: (1024, 1024)}
    monkeypatch.setitem(scoring.target_logprobs.TILE, "cpu", tile[elements])
    head = make_head(scale, softcap, bias, trained)
    hidden, targets, cotangent = inputs(k)
    wanted = [hidden, *(head.module.parameters() if trained else ())]

    expected = naive(head, hidden, targets)
    expected_grads = torch.autograd.grad(expected, wanted, cotangent)
    found = wide_logprobs(head, hidden, targets)
    grads = torch.autograd.grad(found, wanted, cotangent)

    assert found.shape == (N, k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("scale", "softcap"), [(1, None), (0.5, 3.0)])
def test_without_gradients_the_values_are_the_same(scale: float, softcap: float | None) -> None:
    """Pitfall 20: scoring with and without a graph agrees to the bit: on-policy ratios are 1."""
    head = make_head(scale, softcap, dtype=torch.float32)
    hidden, targets, _ = inputs(3, torch.float32)
    with_graph = wide_logprobs(head, hidden, targets)
    with torch.no_grad():
        without = wide_logprobs(head, hidden, targets)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph.detach(), without)


def test_rows_with_different_numbers_of_targets() -> None:
    """Chunks of rows and tiles of the vocabulary that cut through them; one target comes twice."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.tensor([2, 1, 5, 1, 1, 3, 2])
    rows = torch.arange(N).repeat_interleave(counts)
    ids = torch.randint(VOCAB, (len(rows),), generator=generator)
    ids[4] = ids[5]
    starts = counts.cumsum(0) - counts
    targets = Targets(ids, rows, starts, [*starts.tolist(), len(ids)])
    cotangent = torch.randn(len(ids), generator=generator, dtype=torch.float64)
    hidden, *_ = inputs(1)
    for trained in (False, True):
        head = make_head(0.5, 3.0, bias=True, trained=trained)
        every = naive(head, hidden, torch.arange(VOCAB).expand(N, VOCAB))
        expected = every[rows, ids]
        for tile, elements in (((3, 4), 3 * VOCAB), ((1024, 1024), 1 << 24)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(scoring.target_logprobs.TILE, "cpu", tile)
                patch.setattr(scoring.target_logprobs, "CHUNK_ELEMENTS", elements)
                found = target_logprobs(head, hidden, targets)
                (grad,) = torch.autograd.grad(found, hidden, cotangent)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            (want,) = torch.autograd.grad(expected, hidden, cotangent, retain_graph=True)
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_hand_written_backward() -> None:
    """Numerical Jacobian, soft-capped, scaled and biased."""
    head = make_head(0.5, 3.0, bias=True)
    hidden, targets, _ = inputs(2)
    assert torch.autograd.gradcheck(lambda h: wide_logprobs(head, h, targets), [hidden])


def test_the_frozen_weight_gets_no_gradient_and_no_logits_are_kept() -> None:
    """What the graph keeps is (N, D) and (N, K): nothing has a vocabulary-sized side but W."""
    head = make_head()
    hidden, targets, _ = inputs(3)
    found = wide_logprobs(head, hidden, targets)
    (node, _), *_ = found.grad_fn.next_functions  # type: ignore[union-attr]
    saved = node.saved_tensors
    assert head.module.weight.data_ptr() in {t.data_ptr() for t in saved}
    others = [t for t in saved if t.data_ptr() != head.module.weight.data_ptr()]
    assert all(VOCAB not in t.shape for t in others)
    found.sum().backward()
    assert head.module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_many_targets_a_row_take_no_memory_of_their_own(dtype: torch.dtype) -> None:
    """No tensor of (N, K, H) is made on the way."""
    n, k, dim, vocab = 24, 64, 48, 100
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(dim, vocab, bias=False).to(dtype).requires_grad_(False)
    head = Head(SimpleNamespace(get_output_embeddings=lambda: linear))
    hidden = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_(True)
    ids = torch.randint(vocab, (n, k), generator=generator)
    cotangent = torch.randn(n, k, generator=generator, dtype=torch.float64)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        found = wide_logprobs(head, hidden, ids)
        (grad,) = torch.autograd.grad(found, hidden, cotangent.to(found.dtype))
    assert max(sizes) <= max(n * vocab, n * k, n * dim, linear.weight.numel())
    linear.double()
    wide = hidden.detach().double().requires_grad_(True)
    expected = naive(head, wide, ids)
    (want,) = torch.autograd.grad(expected, wide, cotangent)
    bound = 1e-12 if dtype == torch.float64 else 0.02
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    assert float((grad - want).norm()) <= bound * float(want.norm())


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_states_give_float32_logprobs(trained: bool) -> None:
    """Pitfall 22: softmax in float32; values between bfloat16 steps; never above 0."""
    head = make_head(trained=trained, dtype=torch.bfloat16)
    hidden, targets, _ = inputs(3, torch.bfloat16)
    found = wide_logprobs(head, hidden, targets)
    wide = Head(SimpleNamespace(get_output_embeddings=lambda: head.module.float()))
    assert found.dtype == torch.float32
    assert float(found.max()) <= 0
    assert not torch.equal(found, found.bfloat16().float()), "rounded to bfloat16 on the way"
    expected = naive(wide, hidden.float(), targets)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_large_logits_neither_overflow_nor_rise_above_zero() -> None:
    """Logits of +-1e4: exp overflows unless the peak is taken off first."""
    head = make_head(dtype=torch.float32)
    head.module.weight.data.mul_(1e4)
    hidden, targets, _ = inputs(3, torch.float32)
    found = wide_logprobs(head, hidden, targets)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    assert torch.isfinite(found).all()
    assert torch.isfinite(grad).all()
    assert float(found.max()) <= 0


def test_products_into_float32_where_the_device_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are not rounded to bfloat16 before the softmax; the gradient is that of the layer.

    The CPU lacks the product, so its exact value stands in for it.
    """
    head = make_head(0.5, 3.0, bias=True, dtype=torch.bfloat16)
    hidden, targets, cotangent = inputs(3, torch.bfloat16)
    wide = make_head(0.5, 3.0, bias=True, dtype=torch.bfloat16)
    wide.module.double()
    expected = naive(wide, hidden.double(), targets)

    def errors() -> list[float]:
        every = torch.log_softmax(head.logits(hidden), -1).gather(1, targets)
        both = [wide_logprobs(head, hidden, targets), every]
        return [float((found - expected).abs().max()) for found in both]

    def gradients() -> list[torch.Tensor]:
        every = torch.log_softmax(head.logits(hidden), -1).gather(1, targets)
        both = [wide_logprobs(head, hidden, targets), every]
        return [torch.autograd.grad(f, hidden, cotangent.float())[0].float() for f in both]

    rounded, rounded_gradients = errors(), gradients()
    assert min(rounded) > 1e-3
    module = scoring.target_logprobs
    monkeypatch.setattr(module, "_multiplies_into_float32", lambda *_: True)
    monkeypatch.setattr(module, "_mm_into_float32", lambda a, b: a.float() @ b.float())
    assert max(errors()) < 1e-5
    for found, near in zip(gradients(), rounded_gradients, strict=True):
        torch.testing.assert_close(found, near, rtol=0.05, atol=0.05)


def test_the_cpu_keeps_its_own_products() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        cpu = torch.device("cpu")
        assert not scoring.target_logprobs._multiplies_into_float32(cpu, dtype)


# ---- find_head ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "scale", "softcap"),
    [
        ("qwen3", 1.0, None),
        ("gpt2", 1.0, None),
        ("gemma2", 1.0, 3.0),
        ("granite", 1 / 3, None),
    ],
)
def test_the_head_is_read_from_the_config(
    arch: str, scale: float, softcap: float | None, model_folder: Callable[..., str]
) -> None:
    head = find_head(AutoModelForCausalLM.from_pretrained(model_folder(arch)))
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap)


def test_a_model_that_does_more_after_the_head_has_none(
    model_folder: Callable[..., str],
) -> None:
    """Caught by comparing with the model's own logits, whatever its config says."""
    assert find_head(AutoModelForCausalLM.from_pretrained(model_folder("bert"))) is None

    class Sharpened(type(AutoModelForCausalLM.from_pretrained(model_folder("llama")))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    assert find_head(Sharpened.from_pretrained(model_folder("llama"))) is None
