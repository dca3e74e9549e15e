"""Measure the CUDA backend: first whether it is right, then how fast, then each choice alone.

    python -m benchmarks.gpu --out DIR --minutes 8 [--only machine,correct] [--smoke]

Writes DIR/gpu.json and DIR/gpu.md after every number. Exit status 1 if a check failed, 0 otherwise:
a missed goal, a skipped section or one that ran out of time is no failed check, and a section that
raised leaves its traceback in the report. 2: no CUDA device and no --smoke. Nothing is downloaded:
weights are random, made on the device from a seed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gpu.baselines import baselines
from benchmarks.gpu.card import Card
from benchmarks.gpu.choices import choices
from benchmarks.gpu.correct import correct
from benchmarks.gpu.decode import decode
from benchmarks.gpu.machine import describe, machine, tests
from benchmarks.gpu.report import Report
from benchmarks.gpu.train import larger, memory, train
from cookbook_core.backend.local.model import cuda

import torch

SECTIONS: tuple[tuple[str, Callable[[Report, Card], None], int, int], ...] = (
    # name, function, seconds it needs to be begun, seconds after which it is stopped
    ("machine", machine, 10, 40),
    ("correct", correct, 30, 150),
    ("memory", memory, 20, 60),
    ("train", train, 30, 100),
    ("decode", decode, 30, 110),
    ("baselines", baselines, 30, 90),
    ("larger", larger, 30, 100),
    ("choices", choices, 30, 120),
    ("tests", tests, 30, 600),
)


class OutOfTime(BaseException):
    """A section has reached its cap; no `except Exception` in between may hold it up."""


def run(section: Callable[[Report, Card], None], report: Report, card: Card) -> None:
    """Run one section; whatever it raises ends up in the report."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(report.left(), 0.1))
    status, error = "done", None
    try:
        section(report, card)
    except OutOfTime:
        status = "stopped at its cap or at the deadline"
    except Exception as raised:
        status, error = f"raised {type(raised).__name__}", raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    report.end(status, error)


def stop_at_sigterm(report: Report) -> None:
    def stop(*_: Any) -> None:
        report.note("stopped by SIGTERM")
        os._exit(128 + signal.SIGTERM)  # at once: a worker thread may be in a long kernel

    signal.signal(signal.SIGTERM, stop)


def listen(report: Report) -> None:
    """Put warnings into the report rather than on the screen."""
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: report.heard.append(record.getMessage()[:300])
    logging.captureWarnings(True)  # into the logger "py.warnings"
    for name in ("cookbook_core", "torch._dynamo", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [listener], False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU: no measurement")
    parser.add_argument("--device", help="cuda (default), cpu (default with --smoke) or sim")
    options = parser.parse_args(arguments)
    known = [name for name, *_ in SECTIONS]
    wanted = options.only.split(",") if options.only else known
    if unknown := set(wanted) - set(known):
        parser.error(f"unknown sections {sorted(unknown)}; known: {known}")
    sections = [each for each in SECTIONS if each[0] in wanted]
    report = Report(options.out, options.minutes, [s[0] for s in sections], options.smoke)
    stop_at_sigterm(report)
    listen(report)
    name = options.device or ("cpu" if options.smoke else "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here. --smoke runs every section at toy size.", file=sys.stderr)
        return 2
    if name == "sim":
        from tests.simulated.device import load

        load()
    device = torch.device(name)
    cuda.prepare(device)  # as before the package loads a model, so that all sections run under it
    with tempfile.TemporaryDirectory(prefix="gpu_battery_", ignore_cleanup_errors=True) as folder:
        card = Card(device, options.smoke, Path(folder))
        report.machine = describe(card)
        report.card = report.machine["device"]
        for name, section, need, cap in sections:
            left = report.left()
            report.begin(name, cap)
            if left < card.pick(need, 1):
                report.end(f"skipped: {max(left, 0):.0f} s left")
                continue
            print(f"{name} ...", flush=True)
            run(section, report, card)
            card.free()
            print(f"{name}: {report.sections[name]['status']}", flush=True)
    failed = report.failed_checks()
    print(f"{len(failed)} failed checks", *failed, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
