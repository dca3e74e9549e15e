"""Flash attention in calls of many pieces: the pieces by a plain kernel, torch's by their shapes.

The CUDA kernels themselves run in test_cuda_attention.py, where there is a card.
"""

from __future__ import annotations

from typing import Any

from cookbook_core.backend.local.scoring import by_segment, flash, packing
from cookbook_core.backend.local.scoring.packing import Layout, lay_out
from tests.oracles.attention import PlainFlash, depth_of, random_tree

import numpy as np
import pytest
import torch


def draw(layout: Layout, heads: int, kv_heads: int, width: int) -> list[torch.Tensor]:
    """q, k, v and a cotangent, laid out by token as a projection makes them."""
    torch.manual_seed(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, width), (heads, width)]
    return [torch.randn(len(layout.tokens), *shape, dtype=torch.float64) for shape in shapes]


def results(attend: Any, layout: Layout, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.transpose(0, 1).detach().requires_grad_() for x in tensors[:3]]
    out = attend(*inputs, 0.3, layout)
    return [out, *torch.autograd.grad(out, inputs, tensors[3])]


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
def test_calls_of_pieces_give_what_the_segments_give(
    depth: int, seed: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, in 1 + depth calls each way."""
    monkeypatch.setattr(packing, "MIN_SHARED", 1)
    layout = lay_out(random_tree(np.random.default_rng((depth, seed)), depth, 9))
    assert depth_of(layout) >= depth
    plain = PlainFlash()
    tensors = draw(layout, *heads, 8)

    def attend(*arguments: Any) -> torch.Tensor:
        return flash.attend(*arguments, kernels=plain.kernels)

    found, want = (results(run, layout, tensors) for run in (attend, by_segment.attend))
    for x, y in zip(found, want, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert plain.calls == {"forward": 1 + depth_of(layout), "backward": 1 + depth_of(layout)}


def test_a_row_without_shared_prefixes_is_one_call() -> None:
    layout = lay_out([[1] * 5, [2] * 1, [3] * 9], share=False)
    own, below = flash.calls(layout, torch.device("cpu"))
    assert below == []
    assert own.ranges[0].tolist() == [0, 1, 6, 15]
    assert own.ranges[2:] == (9, 9)


def test_indices_are_made_once_for_all_layers() -> None:
    """Nothing is copied to the device for a second layer."""
    layout = lay_out([[1] * 20 + [2] * 5, [1] * 20 + [3] * 7])
    plain = PlainFlash()
    q, k, v, _ = draw(layout, 2, 2, 8)
    flash.attend(*(x.transpose(0, 1) for x in (q, k, v)), 0.3, layout, kernels=plain.kernels)
    made = dict(layout.memo)
    flash.attend(*(x.transpose(0, 1) for x in (q, k, v)), 0.3, layout, kernels=plain.kernels)
    assert layout.memo.keys() == made.keys()
    assert all(layout.memo[key] is made[key] for key in made)


def test_settings_of_determinism_are_as_before() -> None:
    torch.set_deterministic_debug_mode("warn")
    try:
        with flash._deterministic():
            assert torch.get_deterministic_debug_mode() == 2
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")
    assert torch.utils.deterministic.fill_uninitialized_memory


# ---- torch's own operators, as far as they can be known without a card --------------------------

RANGES = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        (flash.FLASH.forward, ["query", "key", "value", *RANGES, "return_debug_mask"]),
        (
            flash.FLASH.backward,
            [
                "grad_out",
                "query",
                "key",
                "value",
                "out",
                "logsumexp",
                *RANGES,
                "rng_state",
                "unused",
            ],
        ),
    ],
)
def test_torch_has_the_operators_with_these_arguments(operator: Any, names: list[str]) -> None:
    """In this order, and the rest optional."""
    arguments = operator.default._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    assert [a.name for a in positional] == names
    rest = {a.name: a for a in arguments if a.kwarg_only}
    assert "scale" in rest
    assert all(a.has_default_value() for a in rest.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_operators_take_and_return_these_shapes(dtype: torch.dtype) -> None:
    """On the meta device, which runs everything but the arithmetic; grouped heads, two depths."""
    layout = lay_out([[1] * 20 + [2] * 16 + [n] * 5 for n in (3, 4)] + [[1] * 20 + [5] * 7])
    inputs = [
        torch.empty(len(layout.tokens), n, 64, dtype=dtype, device="meta").transpose(0, 1)
        for n in (4, 2, 2)
    ]
    leaves = [x.requires_grad_() for x in inputs]
    out = flash.attend(*leaves, 0.3, layout)
    assert (out.shape, out.dtype) == ((len(layout.tokens), 4, 64), dtype)
    grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [g.shape for g in grads] == [x.shape for x in inputs]
