"""The device: timing, memory, profiles. On the CPU the same calls run with a stand-in for each."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from benchmarks.gpu.report import NotHere

T = TypeVar("T")

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Card:
    """One device, and the size of the run on it.

    device: torch's.
    smoke: toy sizes, so that every line runs on the CPU in seconds.
    folder: for checkpoints and configurations; removed at the end.
    """

    device: torch.device
    smoke: bool
    folder: Path
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        if not self.cuda:
            return f"{self.device.type} (smoke: no measurement)"
        return torch.cuda.get_device_properties(self.device).name

    @property
    def memory(self) -> int:
        """Total memory in bytes; 0 where it is not CUDA's."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 0

    @property
    def own(self) -> Any:
        """torch.cuda, or torch.sim for the simulated device; None on the CPU."""
        return None if self.device.type == "cpu" else getattr(torch, self.device.type)

    @property
    def simulated(self) -> Any:
        """The module of the simulated device of the tests; None on other devices."""
        if self.device.type != "sim":
            return None
        from tests.simulated import device

        return device

    def pick(self, full: T, toy: T) -> T:
        return toy if self.smoke else full

    # ---- time ------------------------------------------------------------------------------------

    def sync(self) -> None:
        if self.own:
            self.own.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 5, warm: int = 2) -> list[float]:
        """Seconds of each of `repeats` calls after `warm` others, by CUDA events.

        Requests run in the worker's thread, on the default stream as the events do.
        """
        repeats, warm = self.pick(repeats, 1), self.pick(warm, 1)
        for _ in range(warm):
            run()
        taken = []
        for _ in range(repeats):
            self.sync()
            if not self.cuda:
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) / 1e3)
        return taken

    def milliseconds(self, run: Callable[[], Any]) -> list[float]:
        return [t * 1e3 for t in self.seconds(run)]

    def rate(self, dtype: torch.dtype = torch.bfloat16, size: tuple[int, ...] = ()) -> float:
        """Operations per second of a product of random matrices (m, k) and (k, n), median."""
        m, k, n = size or (self.pick(8192, 64),) * 3
        key = f"{dtype} {m} {k} {n} {torch.backends.cuda.matmul.allow_tf32}"
        if key not in self.rates:
            a, b = (torch.randn(s, device=self.device, dtype=dtype) for s in ((m, k), (k, n)))
            taken = self.seconds(lambda: a @ b, repeats=20, warm=5)
            self.rates[key] = 2 * m * k * n / statistics.median(taken)
        return self.rates[key]

    # ---- memory ----------------------------------------------------------------------------------

    def allocated(self) -> int:
        self.sync()
        return self.own.memory_allocated() if self.own else 0

    def peak(self, run: Callable[[], Any]) -> int:
        """Most bytes that torch's allocator had in use during the call."""
        self.free()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.simulated:
            self.simulated.forget_peak()
        run()
        self.sync()
        return self.own.max_memory_allocated() if self.own else 0

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def within(self, limit: int, *, known: bool) -> Iterator[None]:
        """Inside, allocations beyond `limit` bytes in all fail.

        known: torch reports free and total memory as on a smaller card; otherwise the package
            believes in more memory than there is, and has to recover from running out.
        """
        if not self.cuda:
            more = limit - self.allocated()
            sim = self.simulated
            with sim.limited_memory(more) if sim else contextlib.nullcontext():
                yield
            return
        self.free()

        def free_of_total(*_: Any) -> tuple[int, int]:
            return max(limit - torch.cuda.memory_reserved(), 0), limit

        smaller = _Smaller(torch.cuda.get_device_properties(self.device), limit)
        torch.cuda.set_per_process_memory_fraction(min(limit / self.memory, 1.0))
        try:
            with contextlib.ExitStack() as said:
                if known:
                    for name, answer in (
                        ("mem_get_info", free_of_total),
                        ("get_device_properties", lambda *_: smaller),
                    ):
                        said.enter_context(mock.patch.object(torch.cuda, name, answer))
                yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            self.free()

    # ---- what ran --------------------------------------------------------------------------------

    def profile(self, run: Callable[[], Any]) -> Profile:
        """Profile one call; the work is done in other threads than this one."""
        if self.simulated:
            counts = self.simulated.count(run)
            return Profile(0.0, counts.launches, counts.launches, 0, counts.waits)
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

        kind = DeviceType.CUDA if self.cuda else DeviceType.CPU
        which = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.sync()
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=which, experimental_config=everywhere) as taken:
            run()
            self.sync()
        seen = Profile()
        spans = []
        for event in taken.events():
            if event.device_type == kind and not getattr(event, "is_user_annotation", False):
                begin, end = event.time_range.start, event.time_range.end
                spans.append((begin, end))
                seen.kernels += 1
                seen.milliseconds[event.name[:70]] += (end - begin) / 1e3
            elif event.name.startswith("cudaGraphLaunch"):
                seen.graphs += 1
            elif event.name.startswith(LAUNCHES):
                seen.launches += 1
            elif event.name.startswith(WAITS):
                seen.waits += 1
        seen.busy = _covered(spans)
        return seen

    def syncs(self, run: Callable[[], Any]) -> int:
        """Number of operations in a call that wait for the device (torch's sync debug mode)."""
        if not self.cuda:
            if self.simulated:
                return int(self.simulated.count(run).waits)
            run()
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in caught)


class _Smaller:
    """A device's properties, but for its memory."""

    def __init__(self, real: Any, total_memory: int) -> None:
        self.real, self.total_memory = real, total_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@dataclass
class Profile:
    """busy: share of the time from the first kernel to the last in which one ran.

    kernels: on the device, copies included. launches, graphs: calls of the host that start one
    kernel, or one captured graph. waits: calls of the host that wait for the device.
    """

    busy: float = 0.0
    kernels: int = 0
    launches: int = 0
    graphs: int = 0
    waits: int = 0
    milliseconds: Counter[str] = field(default_factory=Counter)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Share of the range of all spans that at least one covers."""
    spans.sort()
    covered, reach = 0.0, spans[0][0] if spans else 0.0
    for begin, end in spans:
        covered += max(end - max(begin, reach), 0.0)
        reach = max(reach, end)
    return covered / (reach - spans[0][0]) if spans and reach > spans[0][0] else 0.0


@contextlib.contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, owner.name is value; NotHere if there is no such attribute."""
    if not hasattr(owner, name):
        raise NotHere(f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}")
    with mock.patch.object(owner, name, value):
        yield
