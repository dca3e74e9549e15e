"""The device "sim": an accelerator simulated on the CPU, to check what only an accelerator shows.

Values are real. Operands have to be on one device, memory can be limited, float64 can be missing,
and operators, copies and waits are counted exactly; `device.cpp` defines what counts as what.

    device.load()                                 # once per process, before the first use
    with device.counting() as counts:
        client.forward_backward(...)
    print(counts.launches, counts.waits, counts.copies)

`load` compiles `device.cpp` for the torch that is installed, in about ten seconds, and keeps the
result in the virtual environment. Registering a device cannot be undone, so tests that use it have
a process of their own: see the Makefile. To build it and nothing else:

    python -m tests.simulated.device
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock

NAME = "sim"
SOURCE = Path(__file__).with_name("device.cpp")
TORCH = Path(torch.__file__).parent


class Unavailable(Exception):
    """The device cannot be built here; the message says why."""


# ---- building ------------------------------------------------------------------------------------


def build() -> Path:
    """Compile device.cpp unless this version was compiled before; return the library.

    Raises:
        Unavailable: there is no compiler, or it does not compile with this torch.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = _cache() / key
    library = folder / "device.so"
    with FileLock(f"{folder}.lock"):
        if not library.is_file():
            folder.mkdir(exist_ok=True)
            _compile(folder / "unfinished.so")
            (folder / "unfinished.so").replace(library)
    return library


def _cache() -> Path:
    """A folder in the virtual environment, or in the user's temporary one."""
    for parent in (Path(sys.prefix), Path(tempfile.gettempdir()) / f"cookbook-{os.getuid()}"):
        folder = parent / "simulated"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise Unavailable(f"no folder to build in: neither {sys.prefix} nor the temporary one")


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not sys.platform.startswith("linux") or compiler is None:
        raise Unavailable("needs Linux and a C++ compiler: install g++, or set CXX")
    include, lib = TORCH / "include", TORCH / "lib"
    command = [
        *(compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-w"),
        *(f"-I{path}" for path in (include, include / "torch/csrc/api/include")),
        *(str(SOURCE), "-o", str(library)),
        *(f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise Unavailable(f"does not compile with torch {torch.__version__}: {errors[0]}")


# ---- registering ---------------------------------------------------------------------------------


@functools.cache
def load() -> None:
    """Make "sim" a device of torch in this process; a second call does nothing.

    Raises:
        Unavailable: it cannot be built here.
    """
    torch.ops.load_library(str(build()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.ops.sim.start()
    # as on CUDA, module.to("sim") keeps a parameter's identity: tied embeddings stay tied
    torch.__future__.set_swap_module_params_on_conversion(True)


def _module() -> SimpleNamespace:
    """What torch looks for at `torch.sim`, and what callers know from `torch.cuda`."""
    ops = torch.ops.sim

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Free and total bytes; without a limit, those of a device of 1 TB."""
        total = ops.limit() if ops.limit() >= 0 else 10**12
        return total - ops.used(), total

    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda device=None: ops.count_wait("synchronize"),
        empty_cache=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        # random numbers come from the CPU's generator
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.empty(0, dtype=torch.uint8),
        set_rng_state=lambda state, device=None: None,
        _is_in_bad_fork=lambda: False,
        mem_get_info=mem_get_info,
        memory_allocated=lambda device=None: ops.used(),
        memory_reserved=lambda device=None: ops.used(),
        max_memory_allocated=lambda device=None: ops.peak(),
        reset_peak_memory_stats=lambda device=None: ops.forget_peak(),
    )


# ---- counting ------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the device did in a block; a difference or a share of it has fractions.

    Attributes:
        by_operator: launches by operator's name.
        by_reason: waits of the host for the device by what caused them: "item", "copy to the
            host", or the operator that has to know a value.
        moved: "h2d" and "d2h", copies from the host to the device and back; "h2d bytes" and "d2h
            bytes", their size; "h2d blocking", how many of the former were not non_blocking: CUDA
            finishes the work before them first, but they read nothing and are no `waits`.
    """

    by_operator: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    @classmethod
    def now(cls) -> Counts:
        """Everything since the device was loaded."""
        ops = torch.ops.sim
        return cls(Counter(ops.launches()), Counter(ops.waits()), Counter(ops.copies()))

    @property
    def launches(self) -> float:
        """Operators launched on the device."""
        return sum(self.by_operator.values())

    @property
    def waits(self) -> float:
        """How often the host waited for the device."""
        return sum(self.by_reason.values())

    @property
    def copies(self) -> float:
        """Copies between host and device, both ways."""
        return self.moved["h2d"] + self.moved["d2h"]

    def __sub__(self, other: Counts) -> Counts:
        return self._each(other, lambda mine, others: mine - others)

    def __truediv__(self, n: int) -> Counts:
        return self._each(self, lambda mine, _: mine / n)

    def _each(self, other: Counts, combine: Callable[[Any, Any], Any]) -> Counts:
        def combined(mine: Counter[str], others: Counter[str]) -> Counter[str]:
            values = {key: combine(mine[key], others[key]) for key in {*mine, *others}}
            return Counter({key: value for key, value in values.items() if value})

        return Counts(
            combined(self.by_operator, other.by_operator),
            combined(self.by_reason, other.by_reason),
            combined(self.moved, other.moved),
        )


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the device does in the block; the counts are filled in when it ends."""
    before, counts = Counts.now(), Counts()
    yield counts
    vars(counts).update(vars(Counts.now() - before))


def count(run: Callable[[], Any]) -> Counts:
    """Count what the device does in a call."""
    with counting() as counts:
        run()
    return counts


# ---- memory and dtypes ---------------------------------------------------------------------------


def used_bytes() -> int:
    """Bytes that tensors on the device take now."""
    return torch.ops.sim.used()


def peak_bytes() -> int:
    """The most bytes taken at once since `forget_peak`."""
    return torch.ops.sim.peak()


def forget_peak() -> None:
    """Let `peak_bytes` begin with what is taken now."""
    torch.ops.sim.forget_peak()


@contextmanager
def limited_memory(more: int, *, plain_error: bool = False) -> Iterator[None]:
    """Inside, the device has room for `more` bytes than it holds now.

    Args:
        more: bytes.
        plain_error: raise a RuntimeError that names CUBLAS_STATUS_ALLOC_FAILED, as cuBLAS does,
            instead of torch.OutOfMemoryError.
    """
    torch.ops.sim.set_limit(used_bytes() + more, plain_error)
    try:
        yield
    finally:
        torch.ops.sim.set_limit(-1, False)


@contextmanager
def without_float64() -> Iterator[None]:
    """Inside, making a float64 tensor on the device is a TypeError, as on Apple's GPUs."""
    torch.ops.sim.set_float64(False)
    try:
        yield
    finally:
        torch.ops.sim.set_float64(True)


if __name__ == "__main__":
    try:
        print(build())
    except Unavailable as problem:
        sys.exit(f"the simulated device: {problem}")
