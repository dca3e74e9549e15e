"""Which attention kernel computes a packed row: chosen once for each kind of row.

On the CPU "pieces", or "by_segment" where scores are soft-capped. On CUDA the first of "flash",
"flex" and "by_segment" that is made for the kind and proves itself on the device: a row of three
blocks with shared prefixes, forward and backward, against "by_segment" in float32 on the CPU.
Elsewhere "by_segment". Each is a module here, and all are exact, so that packing never depends on
the choice; speed and memory do. A choice follows from kind, card and installed versions alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.scoring import by_segment, flash, flex, pieces
from cookbook_core.backend.local.scoring.packing import Layout, lay_out
from cookbook_core.backend.local.scoring.packing_check import rms_ratio

import torch

KERNELS: dict[str, ModuleType] = {
    "pieces": pieces,
    "flash": flash,
    "flex": flex,
    "by_segment": by_segment,
}
BOUND = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""Largest error of a kernel in its probe, root mean square against that of the result. Rounding
makes a tenth of it and a wrong mask more than 0.3; float32 leaves room for TF32."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """What a kernel has to compute: device, precision, shape, and what becomes of scores.

    heads, kv_heads, head_dim, value_dim: of q, k and v.
    window: whether a sliding window cuts into the row.
    softcap: whether scores are soft-capped.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: bool = False
    softcap: bool = False

    def __str__(self) -> str:
        shape = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        more = [" in a window"] * self.window + [" with soft-capped scores"] * self.softcap
        return f"{str(self.dtype).removeprefix('torch.')}, {shape}{''.join(more)}"


@dataclass(frozen=True)
class Choice:
    """name: of the kernel, a key of KERNELS. refused: why each kernel before it was not taken."""

    name: str
    refused: tuple[str, ...] = ()


_choices: dict[Kind, Choice] = {}


def choices() -> dict[Kind, Choice]:
    """All choices made so far in this process."""
    return dict(_choices)


def kernel_for(kind: Kind) -> str:
    """Name of the kernel for a kind of row; the first call for a kind on CUDA proves it there.

    Raises:
        torch.OutOfMemoryError: the device is full. Nothing is decided by that.
    """
    if kind not in _choices:
        _choose(kind, candidates(kind), ())
    return _choices[kind].name


def refuse(kind: Kind, reason: str) -> str:
    """Record that the chosen kernel failed after all; return the name of the next one."""
    failed = _choices[kind]
    rest = candidates(kind)
    rest = rest[rest.index(failed.name) + 1 :]
    _choose(kind, rest, (*failed.refused, f"{failed.name}: {reason}"), warn=True)
    return _choices[kind].name


def candidates(kind: Kind) -> tuple[str, ...]:
    """Names of the kernels a kind's device may use, the best first; "by_segment" is always last."""
    if kind.device.type == "cpu":
        return ("pieces", "by_segment")
    return ("flash", "flex", "by_segment") if kind.device.type == "cuda" else ("by_segment",)


def _choose(
    kind: Kind, names: tuple[str, ...], refused: tuple[str, ...], *, warn: bool = False
) -> None:
    for name in names:
        obstacle = unmade_for(name, kind)
        if obstacle is None and name in ("flash", "flex"):
            obstacle = probe(name, kind)
            warn |= obstacle is not None
        if obstacle is None:
            _choices[kind] = choice = Choice(name, refused)
            slow = kind.device.type == "cuda" and kind.dtype != torch.float64
            if warn or (slow and name == "by_segment"):
                _report(kind, choice)
            return
        refused = (*refused, f"{name}: {obstacle}")
    raise AssertionError(f"no kernel for {kind}")


def _report(kind: Kind, choice: Choice) -> None:
    how = f'kernel "{choice.name}"'
    if choice.name == "by_segment":
        how = "plain torch, segment by segment, which is slow and takes memory"
    where = _card(kind.device) if kind.device.type == "cuda" else str(kind.device)
    reasons = "; ".join(choice.refused)
    log.warning("Attention of %s on %s is computed by %s (%s).", kind, where, how, reasons)


def unmade_for(name: str, kind: Kind) -> str | None:
    """Why a kernel is not made for a kind or its card; None if it is."""
    if name == "by_segment":
        return None
    if name != "flex" and kind.softcap:
        return "no soft-capped scores"
    if name != "flex" and kind.head_dim != kind.value_dim:
        return f"values of {kind.value_dim} beside keys of {kind.head_dim}"
    if name == "pieces":
        return None
    if kind.dtype == torch.bfloat16 and _capability(kind.device) < (8, 0):
        have = "{}.{}".format(*_capability(kind.device))
        return (
            f"bfloat16 needs compute capability 8.0, this card has {have}; float32 is faster here"
        )
    return _flash_lacks(kind) if name == "flash" else _flex_lacks(kind)


def _flash_lacks(kind: Kind) -> str | None:
    if kind.window:
        return "no sliding window"
    if kind.dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 and float16 only"
    if kind.head_dim > 256 or kind.head_dim % 8:
        return "heads of at most 256, a multiple of 8"
    return None if _capability(kind.device) >= (8, 0) else "compute capability 8.0 or newer only"


def _flex_lacks(kind: Kind) -> str | None:
    if kind.dtype == torch.float64:
        return "no float64"
    if min(kind.head_dim, kind.value_dim) < 16:
        return "heads of at least 16 only"
    return None if _has_triton() else "needs Triton, which is missing or does not support the card"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _card(device: torch.device) -> str:
    major, minor = _capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def probe(name: str, kind: Kind) -> str | None:
    """Run a kernel on a small row, forward and backward; return what is wrong, None if nothing is.

    Raises:
        torch.OutOfMemoryError: the device is full.
    """
    try:
        found = _results(KERNELS[name], kind, kind.device, kind.dtype)
    except Exception as error:  # whatever a compiler or a private operator raises
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    want = _results(by_segment, kind, torch.device("cpu"), torch.float32)
    for what, x, y in zip(("output", "dq", "dk", "dv"), found, want, strict=True):
        error = rms_ratio(x.cpu(), y)
        if not error <= BOUND[kind.dtype]:
            return f"its {what} is wrong by {error:.0%}"
    return None


def _results(
    kernel: Any, kind: Kind, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients of q, k and v for random numbers, rounded to the kind's precision."""
    # nothing of the caller's: neither its grad mode nor what it does with saved tensors
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), same:
        layout, draw = _probe_layout(), torch.Generator().manual_seed(0)
        shapes = [(kind.heads, kind.head_dim), (kind.kv_heads, kind.head_dim)]
        shapes += [(kind.kv_heads, kind.value_dim), (kind.heads, kind.value_dim)]
        q, k, v, g = (
            torch.randn(len(layout.tokens), *s, generator=draw).to(kind.dtype).to(device, dtype)
            for s in shapes
        )
        inputs = [x.transpose(0, 1).requires_grad_() for x in (q, k, v)]
        window, cap = (64 if kind.window else None), (2.0 if kind.softcap else None)
        out = kernel.attend(*inputs, kind.head_dim**-0.5, layout, window, cap)
        return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def _probe_layout() -> Layout:
    """Three blocks of 128 tokens, the last one padded; two levels of shared prefixes."""
    stem, branch = list(range(60)), [7] * 50
    tails = [[n] * length for n, length in ((1, 40), (2, 70), (3, 90))]
    lists = [stem + tails[0], *(stem + branch + tail for tail in tails), [9] * 30]
    return lay_out(lists)
