"""Sections 0 and 8: the machine and its rates; the tests that need a GPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.report import Report
from cookbook_core.storage.manifest import versions

import torch

TESTS = ("cuda", "cuda_attention", "cuda_settings", "fused_cuda", "fused_lora", "kernels", "flash",
         "flex", "scoring")  # fmt: skip


def describe(card: Card) -> dict[str, Any]:
    """Card, driver and versions, for the head of the report."""
    known: dict[str, Any] = {"device": f"{card.device} (smoke: no measurement)", **versions()}
    for package in ("triton", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[package] = metadata.version(package)
    if card.cuda:
        known["device"] = torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        known["driver"] = subprocess.getoutput(query)
        known["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        known["CUDA of torch"] = torch.version.cuda
        known["memory"] = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return known


def machine(report: Report, card: Card) -> None:
    """Rates of products, copies, launches and small transfers."""
    size, half = card.pick(8192, 64), card.pick(4096, 32)
    wide = card.pick([(16_384, 1024, 3072), (16_384, 4096, 12_288)], [(64, 16, 32), (64, 32, 64)])
    for m, k, n in ((size, size, size), *wide):
        rate = card.rate(torch.bfloat16, (m, k, n)) / 1e12
        report.number(f"bfloat16 product {m} x {k} x {n}", rate, "TFLOP/s")
    before = torch.backends.cuda.matmul.allow_tf32
    for name, tf32 in (("float32", False), ("TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = card.rate(torch.float32, (half, half, half)) / 1e12
        report.number(f"{name} product {half}^3", rate, "TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(card.pick(1 << 30, 1 << 12), dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    rates = [2 * len(source) / t / 1e9 for t in card.seconds(lambda: target.copy_(source))]
    report.number("copy on the device, read + write", rates, "GB/s")
    one, many = torch.zeros(1, device=card.device), card.pick(10_000, 10)

    def launch() -> None:
        for _ in range(many):
            one.add_(1)

    taken = [t / many * 1e6 for t in card.seconds(launch)]
    report.number("add of one number, launched one by one", taken, "us")
    there, back = [], list[float]()
    for _ in range(card.pick(500, 5)):
        card.sync()
        began = time.perf_counter()
        moved = torch.tensor([1.0]).to(card.device)
        card.sync()
        middle = time.perf_counter()
        moved.item()
        there.append((middle - began) * 1e6)
        back.append((time.perf_counter() - middle) * 1e6)
    report.number("4 bytes to the device", there, "us")
    report.number("4 bytes from the device", back, "us")


def tests(report: Report, card: Card) -> None:
    """Run the tests that use a GPU in a process of their own, for the time left."""
    files = [f"tests/test_{name}.py" for name in TESTS[: card.pick(len(TESTS), 1)]]
    what, seconds = "tests that use a GPU", max(report.left() - 5, 1)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *files], cwd=Path(__file__).parents[2], capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"")[-300:]
        report.note(f"{what}: skipped: not finished after {seconds:.0f} s: {tail!r}")
        return
    if "No module named pytest" in done.stderr:
        report.note(f"{what}: skipped: pytest is not installed")
        return
    lines = done.stdout.strip().splitlines() or [""]
    report.check(what, done.returncode == 0, lines[-1][:200], "no failure")
    if done.returncode:
        for line in [each for each in lines if each.startswith(("FAILED", "ERROR"))]:
            report.note(line[:300])
        report.note("\n".join(lines[-40:])[-3000:])
