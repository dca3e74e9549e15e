"""Sections 0 and 8: the machine and its rates; the tests that need a GPU."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.report import Report

ROOT = Path(__file__).parents[2]


def describe(card: Card) -> dict[str, Any]:
    """Card, driver and versions, for the head of the report."""
    known: dict[str, Any] = {"device": card.name, "python": sys.version.split()[0]}
    for package in ("torch", "triton", "transformers", "peft", "numpy"):
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = "absent"
    if card.cuda:
        free, total = torch.cuda.mem_get_info()
        known["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        known["CUDA of torch"] = torch.version.cuda
        known["driver"] = _driver()
        known["memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return known


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def machine(report: Report, card: Card) -> None:
    """Rates of products, copies, launches and small transfers."""
    size = card.pick(8192, 64)
    for m, k, n in (
        (size, size, size),
        card.pick((16_384, 1024, 3072), (64, 16, 32)),
        card.pick((16_384, 4096, 12_288), (64, 32, 64)),
    ):
        rate = card.rate(torch.bfloat16, (m, k, n))
        report.number(f"bfloat16 product {m} x {k} x {n}", rate / 1e12, "TFLOP/s")
    before = torch.backends.cuda.matmul.allow_tf32
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = card.rate(torch.float32, (size // 2,) * 3)
        report.number(
            f"{'TF32' if tf32 else 'float32'} product {size // 2}^3", rate / 1e12, "TFLOP/s"
        )
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(card.pick(1 << 30, 1 << 12), dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    taken = statistics.median(card.seconds(lambda: target.copy_(source)))
    report.number("copy on the device, read + write", 2 * len(source) / taken / 1e9, "GB/s")
    one, many = torch.zeros(1, device=card.device), card.pick(10_000, 10)

    def launch() -> None:
        for _ in range(many):
            one.add_(1)

    taken = statistics.median(card.seconds(launch))
    report.number("add of one number, launched one by one", taken / many * 1e6, "us")
    there, back = [], []
    for _ in range(card.pick(500, 5)):
        card.sync()
        began = time.perf_counter()
        moved = torch.tensor([1.0]).to(card.device)
        card.sync()
        middle = time.perf_counter()
        moved.item()
        there.append(middle - began)
        back.append(time.perf_counter() - middle)
    report.number("4 bytes to the device", statistics.median(there) * 1e6, "us")
    report.number("4 bytes from the device", statistics.median(back) * 1e6, "us")


def tests(report: Report, card: Card) -> None:
    """Run the tests that use a GPU in a process of their own, for the time left."""
    names = ("cuda", "accelerator", "kernels", "flash", "flex")
    files = [f for n in names if (ROOT / (f := f"tests/test_{n}.py")).is_file()]
    what, seconds = "tests that use a GPU", max(report.left() - 5, 1)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *files[: card.pick(len(files), 1)]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out.decode(errors="replace") if isinstance(out, bytes) else out
        report.skip(what, f"not finished after {seconds:.0f} s: {text[-300:]}")
        return
    if "No module named pytest" in done.stderr:
        report.skip(what, "pytest is not installed")
        return
    lines = done.stdout.strip().splitlines() or [""]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            report.note(line[:300])
    # 5: nothing was collected
    report.check(what, done.returncode in (0, 5), lines[-1][:200], "no failure")
    if done.returncode not in (0, 5):
        report.note("\n".join(lines[-40:])[-3000:])
