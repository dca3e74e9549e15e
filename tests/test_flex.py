"""Flex attention of packed rows: block masks made on the host, few graphs, never unfused."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

from cookbook_core.backend.local.scoring import by_segment, flex, packing
from cookbook_core.backend.local.scoring.packing import Layout, lay_out
from tests.oracles.attention import dense, random_tree, seen

import numpy as np
import pytest
import setuptools  # noqa: F401  before anything imports the standard library's distutils
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def backward_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's eager flex attention differentiates on the CPU, but refuses to."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that torch.compile makes, and runs them as they are."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def rows(lengths: tuple[int, ...], shared: int) -> Layout:
    return lay_out([[1] * shared + [2 + n] * length for n, length in enumerate(lengths)])


# ---- block masks --------------------------------------------------------------------------------


def check_blocks(layout: Layout, window: int | None) -> tuple[int, int]:
    """Visible pairs are in blocks, full blocks are full. Returns how many are partial, full."""
    partial, full = flex.blocks(layout, window)
    n, size = len(partial), flex.BLOCK
    pairs = np.zeros((n * size, n * size), dtype=bool)
    length = len(layout.tokens)
    pairs[:length, :length] = seen(layout, window).numpy()
    tiles = pairs.reshape(n, size, n, size).swapaxes(1, 2)
    assert not (partial & full).any()
    assert ((partial | full) >= tiles.any((2, 3))).all(), "a visible pair is in no block"
    assert (full <= tiles.all((2, 3))).all(), "a full block hides a pair, or is padded"
    return int(partial.sum()), int(full.sum())


@pytest.mark.parametrize("window", [None, 5, 17])
@pytest.mark.parametrize("seed", range(25))
def test_blocks_of_random_trees(
    seed: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MIN_SHARED", 1)
    monkeypatch.setattr(flex, "BLOCK", 4)
    rng = np.random.default_rng(seed)
    check_blocks(lay_out(random_tree(rng, int(rng.integers(0, 5)), 12)), window)


@pytest.mark.parametrize("window", [None, 64, 200])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_full_size(seed: int, window: int | None) -> None:
    """Blocks of 128, and not many more of them partial than torch's dense mask finds."""
    layout = lay_out(random_tree(np.random.default_rng(seed), 2, 300))
    partial, _ = check_blocks(layout, window)
    dense_mask = seen(layout, window)
    n = len(layout.tokens)
    want = torch_flex.create_block_mask(
        lambda b, h, q, k: dense_mask[q, k], None, None, n, n, device="cpu"
    )
    assert partial <= 1.5 * int(want.kv_num_blocks.sum()) + 8


def test_the_mask_is_made_once_and_only_copied_to_the_device() -> None:
    """No mask of `(T, T)` bytes on the device, which runs no operation of its own."""

    class OnDevice(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes, self.operations = 0, set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(made):
                if isinstance(x, torch.Tensor) and x.device.type == "meta":
                    self.bytes += x.untyped_storage().nbytes()
                    self.operations.add(str(func))
            return made

    layout = rows((900, 1500, 2000), 300)
    length, device = len(layout.tokens), torch.device("meta")
    for window in (None, 64):
        with OnDevice() as counted:
            mask = flex.block_mask(layout, window, device)
        n = -(-length // flex.BLOCK)
        # indices of partial and full blocks by row and by column, their counts, ends, positions
        assert counted.bytes <= 4 * (4 * n * n + 4 * n + 3 * length)
        assert counted.bytes < length * length / 50
        assert counted.operations == {"aten._to_copy.default"}
        with OnDevice() as counted:
            assert flex.block_mask(layout, window, device) is mask
        assert counted.bytes == 0


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backward_on_the_cpu")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 24, 64])
@pytest.mark.parametrize("heads", [(8, 2, 16), (4, 4, 32), (7, 1, 16)])
def test_values_and_gradients_in_float64(
    heads: tuple[int, int, int], window: int | None, softcap: float | None
) -> None:
    """Flex attention in plain torch, the segments, and one dense softmax."""
    layout = rows((30, 31, 32, 33, 100), 40)
    torch.manual_seed(0)
    shapes = [(n, len(layout.tokens), heads[2]) for n in (heads[0], heads[1], heads[1])]
    base = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn(len(layout.tokens), heads[0], heads[2], dtype=torch.float64)

    def eager(*arguments: Any) -> torch.Tensor:
        return flex.attend(*arguments, run=flex.eager)

    want, *others = (
        take(attend, base, cotangent, layout, window, softcap)
        for attend in (dense, eager, by_segment.attend)
    )
    for found in others:
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def take(attend: Any, base: Any, cotangent: Any, *more: Any) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in base]
    out = attend(*inputs, 0.3, *more)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_window_and_a_soft_cap_compile_for_all_lengths() -> None:
    """By inductor, for the CPU: no scalar is captured, on which it would fail (forward only)."""
    run = flex.compile_fused()
    with torch.no_grad():
        for lengths in ((73, 86, 99), (75, 88, 101, 114, 127)):
            layout = rows(lengths, 60)
            torch.manual_seed(0)
            q, k, v = (torch.randn(n, len(layout.tokens), 32) for n in (4, 2, 2))
            found = flex.attend(q, k, v, 0.3, layout, 64, 2.0, run=run)
            want = by_segment.attend(q, k, v, 0.3, layout, 64, 2.0)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


# ---- never unfused ------------------------------------------------------------------------------

KINDS = {
    "qwen3": (4, 2, 16, None, None),
    "mistral": (4, 2, 32, 64, None),
    "gemma2, every other layer": (4, 2, 64, 64, 2.0),
    "gemma2, the others": (4, 2, 64, None, 2.0),
    "gpt2": (4, 4, 24, None, None),
}


@pytest.mark.usefixtures("backward_on_the_cpu")
def test_kinds_of_models_share_the_graphs(counter: CompileCounterWithBackend) -> None:
    """Four graphs a kind: rows of one block or more, with and without gradient; none for a length,
    a window's or a cap's size. So five kinds in two precisions stay below the limit."""
    run = flex.compile_fused(backend=counter)
    layouts = [rows((70, 83), 60), rows((75, 88, 101), 60), rows((70,), 60), rows((7, 9), 20)]

    def attend(kind: str, dtype: torch.dtype, layout: Layout, grad: bool, more: float = 0) -> None:
        heads, kv_heads, width, window, softcap = KINDS[kind]
        q, k, v = (
            torch.zeros(n, len(layout.tokens), width, dtype=dtype, requires_grad=grad)
            for n in (heads, kv_heads, kv_heads)
        )
        window, softcap = (x if x is None else x + more for x in (window, softcap))
        flex.attend(q, k, v, 0.3 + more, layout, window, softcap, run=run)

    for grad in (True, False):
        for layout in layouts:
            attend("gemma2, every other layer", torch.float32, layout, grad)
    of_one_kind = counter.frame_count
    assert of_one_kind <= 5
    attend("gemma2, every other layer", torch.float32, rows((71, 80), 61), True, 1)
    assert counter.frame_count == of_one_kind
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        attend(kind, dtype, layouts[0], True)
    assert counter.frame_count <= of_one_kind + 2 * len(KINDS) - 1
    assert 2 * len(KINDS) * of_one_kind < flex.RECOMPILE_LIMIT


def test_one_graph_too_many_is_an_error(counter: CompileCounterWithBackend) -> None:
    run = flex.compile_fused(limit=1, backend=counter)
    layout = rows((70, 83), 60)
    q, k, v = (torch.zeros(n, len(layout.tokens), 16) for n in (4, 2, 2))
    flex.attend(q, k, v, 0.3, layout, run=run)
    with pytest.raises(flex.UnfusedError, match="too many kinds"):
        flex.attend(*(x.double() for x in (q, k, v)), 0.3, layout, run=run)
    assert counter.frame_count == 1


def test_running_without_compilation_is_an_error() -> None:
    """Torch's own answer is a warning and all T x T scores in memory."""
    layout = rows((70, 83), 60)
    q, k, v = (torch.zeros(n, len(layout.tokens), 16) for n in (4, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.compiler.set_stance("force_eager"), pytest.raises(flex.UnfusedError):
            flex.attend(q, k, v, 0.3, layout, run=flex.compile_fused())
