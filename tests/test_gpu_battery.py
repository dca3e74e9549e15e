"""The GPU battery at toy size on the CPU: all of it runs, and no fault in it loses a number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import __main__ as battery
from benchmarks.gpu.card import Card
from benchmarks.gpu.report import Report

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "tyro", "trl", "matplotlib"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
"""


def start(folder: Path, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    """The battery in a process of its own, after `before`."""
    call = "from benchmarks.gpu.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", f"{BLOCKED}{before}\n{call}", "--out", str(folder)]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(folder: Path) -> tuple[dict[str, Any], str]:
    whole = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    return whole, (folder / "gpu.md").read_text(encoding="utf-8")


def test_every_section_runs_without_optional_packages(tmp_path: Path) -> None:
    """As on a machine with torch, transformers, peft, numpy and safetensors alone."""
    process = start(tmp_path, "--smoke")
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed[-3000:]
    whole, text = read(tmp_path)
    names = [name for name, *_ in battery.SECTIONS]
    assert list(whole["sections"]) == names
    assert {s["status"] for s in whole["sections"].values()} == {"done"}, printed
    for name in names:
        section = whole["sections"][name]
        assert section["numbers"] or section["checks"]
        assert f"## {name}: done" in text
        assert all(row["card"] for row in section["numbers"])
    rows = [row for s in whole["sections"].values() for row in s["numbers"]]
    goals = [row["name"] for row in rows if "goal" in row]
    for goal in (
        "0.6B 16 x 16: share of the bfloat16 rate",
        "1.7B 2 x 16: share of the bfloat16 rate",
        "8B 2 x 16: share of the bfloat16 rate",
        "ours / the faster plain peft loop",
        "custom loss / built-in loss, a step",
        "2 rows: ours (unmerged) / generate, merged",
        "4 rows: ours (unmerged) / generate, merged",
        "bfloat16: sampled and scored, mean gap",
        "8B within 23 GiB, 2,048 tokens: trains",
        "kernels a layer, forward and backward, head included",
        "launches a step and layer",
    ):
        assert goal in goals
        assert f"| {goal} |" in text
    assert not any("met" in row and row["met"] is not None for row in rows)
    kernels = next(row for row in rows if row["name"].startswith("kernels a layer"))
    assert kernels["value"] > 0
    assert whole["sections"]["correct"]["checks"]


def test_the_simulated_device_counts(tmp_path: Path) -> None:
    """What the CPU cannot show: bytes, launches and waits, and memory that ends."""
    device = pytest.importorskip("tests.simulated.device")
    try:
        device.build()
    except device.Unavailable as problem:
        pytest.skip(f"no simulated device: {problem}")
    process = start(tmp_path, "--smoke", "--device", "sim", "--only", "memory,train,decode")
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed[-3000:]
    whole, _ = read(tmp_path)
    assert {s["status"] for s in whole["sections"].values()} == {"done"}, printed
    rows = {r["name"]: r["value"] for s in whole["sections"].values() for r in s["numbers"]}
    for name in (
        "0.6B: graph, measured",
        "0.6B 16 x 16: peak",
        "kernels a layer, forward and backward, head included",
        "launches a step and layer",
        "waits for the device a step",
    ):
        assert rows[name] > 0
    checks = [check["name"] for check in whole["sections"]["memory"]["checks"]]
    assert "a third of it: gradient, relative error" in checks
    assert "a third of it: every row has its tokens" in checks
    notes = whole["sections"]["memory"]["notes"]
    assert any("micro-batches of" in note or "graphs of" in note for note in notes)


# ---- the frame, with sections of the tests' own --------------------------------------------------


def good(report: Report, card: Card) -> None:
    report.number("a number", 1.5, "s", goal=("<=", 1.0))
    report.number("no number", float("nan"), "s")
    report.check("a check", True)


def broken(report: Report, card: Card) -> None:
    report.number("before", 1.0, "s")
    raise ValueError("of the section")


def failing(report: Report, card: Card) -> None:
    report.at_most("too large", 2.0, 1.0)
    report.check("not a number", float("nan") <= 1.0, float("nan"), 1.0)


def slow(report: Report, card: Card) -> None:
    report.number("before", 1.0, "s")
    while True:
        time.sleep(0.01)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the battery in this process with other sections: (exit status, JSON, markdown)."""
    for name in ("stop_at_sigterm", "listen"):  # they change this process
        monkeypatch.setattr(battery, name, lambda report: None)

    def run(
        sections: list[tuple[Any, float, float]], *arguments: str
    ) -> tuple[int, dict[str, Any], str]:
        named = [(f.__name__, f, need, cap) for f, need, cap in sections]
        monkeypatch.setattr(battery, "SECTIONS", named)
        status = battery.main(["--out", str(tmp_path), "--device", "cpu", *arguments])
        return status, *read(tmp_path)

    return run


def test_a_section_that_raises_is_isolated(run: Any) -> None:
    status, whole, text = run([(broken, 0, 60), (good, 0, 60)])
    assert status == 0
    assert whole["sections"]["broken"]["status"] == "raised ValueError"
    assert whole["sections"]["broken"]["numbers"][0]["name"] == "before"
    assert "ValueError: of the section" in whole["sections"]["broken"]["error"]
    assert "ValueError: of the section" in text
    assert whole["sections"]["good"]["status"] == "done"


def test_a_failed_check_is_exit_status_1_and_a_missed_goal_is_not(run: Any) -> None:
    status, whole, text = run([(good, 0, 60)])
    assert status == 0
    number, other = whole["sections"]["good"]["numbers"]
    assert (number["goal"], number["met"], other["value"]) == ("<= 1", False, None)
    assert "| a number | 1.5 | s | <= 1 | missed | cpu" in text
    status, whole, text = run([(failing, 0, 60), (good, 0, 60)])
    assert status == 1
    assert len(whole["failed_checks"]) == 2
    assert "**failed** | 2 | <= 1" in text


def test_the_deadline_skips_and_the_cap_stops(run: Any) -> None:
    status, whole, _ = run([(slow, 0, 0.5), (good, 10_000, 60)], "--minutes", "1")
    assert status == 0
    assert whole["sections"]["slow"]["status"].startswith("stopped")
    assert whole["sections"]["slow"]["numbers"]
    assert whole["sections"]["good"]["status"].startswith("skipped")
    assert not whole["sections"]["good"]["numbers"]


def test_only_named_sections_run(run: Any) -> None:
    _, whole, _ = run([(good, 0, 60), (slow, 0, 60)], "--only", "good")
    assert list(whole["sections"]) == ["good"]
    with pytest.raises(SystemExit):
        run([(good, 0, 60)], "--only", "godo")


def test_sigterm_leaves_whole_files(tmp_path: Path) -> None:
    before = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("sections", {__file__!r})
sections = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sections)
import benchmarks.gpu.__main__ as battery
battery.SECTIONS = [("good", sections.good, 0, 60), ("slow", sections.slow, 0, 400)]
"""
    process = start(tmp_path, "--smoke", before=before)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "gpu.json").exists() and read(tmp_path)[0]["sections"]["slow"]["numbers"]:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    whole, text = read(tmp_path)
    assert whole["sections"]["good"]["status"] == "done"
    assert whole["sections"]["slow"]["notes"] == ["stopped by SIGTERM"]
    assert "stopped by SIGTERM" in text


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("stop_at_sigterm", "listen"):  # they change this process
        monkeypatch.setattr(battery, name, lambda report: None)
    assert battery.main(["--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
