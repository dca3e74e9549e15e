"""The device: timing, memory, profiles. On the CPU the same calls run with a stand-in for each."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

GIB = 2**30
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Profile:
    """What one call did.

    busy: share of the time from the first kernel to the last in which one ran.
    kernels: on the device, copies included; milliseconds: of each, by name.
    launches, graphs: calls of the host that start one kernel, or one captured graph.
    waits: calls of the host that wait for the device.
    """

    busy: float = 0.0
    kernels: float = 0
    launches: float = 0
    graphs: int = 0
    waits: float = 0
    milliseconds: Counter[str] = field(default_factory=Counter)


@dataclass
class Card:
    """One device, and the size of the run on it.

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

    @property
    def name(self) -> str:
        if not self.cuda:
            return f"{self.device.type} (smoke: no measurement)"
        return torch.cuda.get_device_name(self.device)

    @property
    def memory(self) -> float:
        """Total memory in bytes; of other devices than CUDA's as much as one likes."""
        if not self.cuda:
            return float("inf")
        return torch.cuda.get_device_properties(self.device).total_memory

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
        taken = []
        for i in range(self.pick(warm + repeats, 2)):
            self.sync()
            began = time.perf_counter()
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                last.synchronize()
                spent = first.elapsed_time(last) / 1e3
            else:
                run()
                spent = time.perf_counter() - began
            if i >= self.pick(warm, 1):
                taken.append(spent)
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
        if self.own:
            self.own.reset_peak_memory_stats()
        run()
        self.sync()
        return self.own.max_memory_allocated() if self.own else 0

    def free(self) -> None:
        gc.collect()
        if self.own:
            self.own.empty_cache()

    @contextlib.contextmanager
    def within(self, limit: int) -> Iterator[None]:
        """Inside, allocations beyond `limit` bytes in all fail. No limit on the CPU."""
        self.free()
        if self.simulated:
            with self.simulated.limited_memory(limit - self.allocated()):
                yield
        elif self.cuda:
            torch.cuda.set_per_process_memory_fraction(min(limit / self.memory, 1.0))
            try:
                yield
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        else:
            yield
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
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        self.sync()
        with profile(activities=which, experimental_config=everywhere) as taken:
            run()
            self.sync()
        seen, spans = Profile(), []
        for event in taken.events():
            if event.device_type == kind and not getattr(event, "is_user_annotation", False):
                begin, end = event.time_range.start, event.time_range.end
                spans.append((begin, end))
                seen.milliseconds[event.name[:70]] += (end - begin) / 1e3
            seen.graphs += event.name.startswith("cudaGraphLaunch")
            seen.launches += event.name.startswith(LAUNCHES)
            seen.waits += event.name.startswith(WAITS)
        seen.kernels, seen.busy = len(spans), _covered(spans)
        return seen


def _covered(spans: list[tuple[float, float]]) -> float:
    """Share of the range of all spans that at least one covers."""
    spans.sort()
    covered, reach = 0.0, spans[0][0] if spans else 0.0
    for begin, end in spans:
        covered += max(end - max(begin, reach), 0.0)
        reach = max(reach, end)
    return covered / (reach - spans[0][0]) if spans and reach > spans[0][0] else 0.0
