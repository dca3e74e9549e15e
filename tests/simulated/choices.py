"""What the package chooses by the name of the device: on the simulated one as on CUDA."""

from __future__ import annotations

import functools
from typing import Any

from cookbook_core.backend.local.model import fused_cuda, fused_norm
from cookbook_core.backend.local.scoring import kernels
from tests.simulated import device


@functools.cache
def choose_as_on_cuda() -> None:
    """For the rest of this process: flash attention of bfloat16 rows, norms in one kernel.

    Captured graphs and Triton's kernels are left out: there is nothing here that could run them.
    """
    device.load()
    candidates, fuse = kernels.candidates, fused_norm.fuse

    def candidates_here(kind: kernels.Kind) -> tuple[str, ...]:
        if kind.device.type == device.NAME:
            return ("flash", "by_segment")
        return candidates(kind)

    def fuse_here(model: Any) -> None:
        fuse(model)
        if model.device.type == device.NAME:
            fused_cuda.fuse(model)

    kernels.candidates = candidates_here
    kernels._capability = lambda _: (9, 0)
    fused_norm.fuse = fuse_here
