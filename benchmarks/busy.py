"""A training step on a busy machine against the same step alone (Linux, CPU).

    python -m benchmarks.busy

Steps of `versus_trl`'s SFT on the random `small` model, a thread for each core, without and with
one busy process for each core beside them. With a fair share of the cores a step takes twice its
time. Each program starts as its users do:

    unwatched   as a recipe, with libgomp's own spin count chosen by the user: as without
                `cookbook_core/backend/threads.py`
    recipe      as `python -m recipes.sft`
    copy        a file made by `cookbook new sft`
    notebook    the imports of the first tutorial

All programs take the same step by turns, so that other work on the machine slows all alike. Prints
the median over the rounds, with the smallest and largest, of each program's time beside busy
processes over its time alone, and of its time alone over that of "unwatched".
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 2
UNWATCHED = "unwatched"
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
LIBGOMP = {"GOMP_SPINCOUNT": "300000"}  # its own


def openings(folder: str) -> dict[str, str]:
    """The first lines of each program: what is imported before its steps."""
    from cookbook_core.commands.cli import main

    copy = Path(folder) / "my_sft.py"
    if main(["new", "sft", str(copy)]):
        raise SystemExit("cookbook new sft failed")
    notebook = json.loads(
        (ROOT / "tutorials/01_your_first_custom_loss.ipynb").read_text(encoding="utf-8")
    )
    cell = next(c["source"] for c in notebook["cells"] if c["cell_type"] == "code")
    imports = [line for line in "".join(cell).splitlines() if line.startswith(("import", "from"))]
    return {
        UNWATCHED: "import recipes.sft",
        "recipe": "import recipes.sft",
        "copy": f"import runpy; runpy.run_path({str(copy)!r})",
        "notebook": "\n".join(imports),
    }


def serve(steps: int, threads: int) -> None:
    """Take the step whose number is on each line of standard input; print its seconds."""
    from benchmarks.our_side import Side

    side = Side("sft", "small", steps, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        side.step(int(line))
        print(time.perf_counter() - began, flush=True)


class Program:
    """One process that takes steps when told to."""

    def __init__(self, opening: str, steps: int, threads: int, chosen: dict[str, str]) -> None:
        code = f"{opening}\nfrom benchmarks.busy import serve\nserve({steps}, {threads})"
        environment = {k: v for k, v in os.environ.items() if k not in CHOICES}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, **chosen, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.pipe, self.lines = self.process.stdin, self.process.stdout
        if self.lines.readline() != "ready\n":
            raise SystemExit(f"a program failed to start:\n{code}")

    def step(self, number: int) -> float:
        """Seconds of one step."""
        self.pipe.write(f"{number}\n")
        self.pipe.flush()
        return float(self.lines.readline())

    def end(self) -> None:
        self.pipe.close()
        self.process.wait()


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep this many processes busy meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=spin, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of each program in half a round")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    from benchmarks import workloads as W

    W.build_model("small")
    total = WARMUP + 2 * options.rounds * options.steps
    with tempfile.TemporaryDirectory() as folder:
        texts = openings(folder)
        programs = {
            name: Program(text, total, cores, LIBGOMP if name == UNWATCHED else {})
            for name, text in texts.items()
        }
        try:
            for program in programs.values():
                for number in range(WARMUP):
                    program.step(number)
            measure(programs, cores, options.rounds, options.steps)
        finally:
            for program in programs.values():
                program.end()


def measure(programs: dict[str, Program], cores: int, rounds: int, steps: int) -> None:
    """Print each program's ratios."""
    alone: dict[str, list[float]] = {name: [] for name in programs}
    beside: dict[str, list[float]] = {name: [] for name in programs}
    number = WARMUP

    def take(into: dict[str, list[float]]) -> None:
        nonlocal number
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(steps):
            for name, program in programs.items():
                seconds[name].append(program.step(number))
            number += 1
        for name in programs:
            into[name].append(statistics.median(seconds[name]))

    for _ in range(rounds):
        take(alone)
        with busy(cores):
            take(beside)
    print(f"{cores} threads, {cores} busy processes, {rounds} rounds")
    for name in programs:
        ratios = [b / a for b, a in zip(beside[name], alone[name], strict=True)]
        share = [a / t for a, t in zip(alone[name], alone[UNWATCHED], strict=True)]
        print(
            f"  {name:12s} busy / alone {spread(ratios)}, alone {spread(share)} of {UNWATCHED}, "
            f"{statistics.median(alone[name]):.3f} s alone"
        )


if __name__ == "__main__":
    main()
