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

    def pick(self, full: T, toy: T) -> T:
        return toy if self.smoke else full

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
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(
                min(limit / torch.cuda.mem_get_info()[1], 1.0)
            )
            try:
                yield
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        elif self.own:
            from tests.simulated.device import limited_memory

            with limited_memory(limit - self.allocated()):
                yield
        else:
            yield
        self.free()

    def within_a_third(self, peak: int) -> Any:
        """Inside, only a third is left of what work of that peak takes beyond what is held now."""
        held = self.allocated()
        return self.within(held + int(0.33 * (peak - held)))

    def profile(self, run: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
        """Profile one call, whose work is done in other threads than this one.

        Returns:
            kernels on the device, copies included; launches and graphs, calls of the host that
                start one kernel or one captured graph; waits, calls of the host that wait for the
                device; busy, the share of time from the first kernel to the last in which one ran.
            Milliseconds of each kernel.
        """
        if self.device.type == "sim":
            from tests.simulated.device import count

            seen = count(run)
            each: Any = {"kernels": seen.launches, "launches": seen.launches, "waits": seen.waits}
            return Counter(each), Counter()
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

        kind = DeviceType.CUDA if self.cuda else DeviceType.CPU
        which = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        self.sync()
        with profile(activities=which, experimental_config=everywhere) as taken:
            run()
            self.sync()
        counts, spent, spans = Counter[str](), Counter[str](), []
        for event in taken.events():
            if event.device_type == kind and not getattr(event, "is_user_annotation", False):
                begin, end = event.time_range.start, event.time_range.end
                spans.append((begin, end))
                spent[event.name[:70]] += (end - begin) / 1e3
            counts["graphs"] += event.name.startswith("cudaGraphLaunch")
            counts["launches"] += event.name.startswith(LAUNCHES)
            counts["waits"] += event.name.startswith(WAITS)
        covered, first, reach = 0.0, *[min(spans, default=(0.0, 0.0))[0]] * 2
        for begin, end in sorted(spans):
            covered += max(end - max(begin, reach), 0.0)
            reach = max(reach, end)
        busy: Any = covered / (reach - first) if reach > first else 0.0
        return counts | Counter(kernels=len(spans), busy=busy), spent
