"""Speedup from a second process: time of a step with two processes against one.

    python -m benchmarks.scaling

Three programs run interleaved, one step each, over the same batches of the random `small` model on
the CPU: two processes of one thread; one process of one thread; one process of two threads. Prints
the median over the rounds of the ratios within a round, with the smallest and largest. A fourth
program, 2 x 1 sharded, is the first over a base model in parts (--programs). seconds:
wall-clock. cpu_s: processor seconds of rank 0, all threads; for 1 x 1 / 2 x 1 this is the scaling
that two idle cores would allow, also when measured on a busy machine. generate_s: GRPO's sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORKLOADS = ("sft", "dpo", "grpo")
PROGRAMS = {"1 x 1": (1, 1), "1 x 2": (1, 2), "2 x 1": (2, 1)}  # processes x threads
SHARDED = "2 x 1 sharded"


def serve(workloads: list[str], threads: int, steps: int, shard: bool) -> None:
    """Run one program: read "workload step" lines, print each step's seconds and loss."""
    from cookbook_core.runs import join_processes

    join_processes()
    from benchmarks.our_side import Side

    sides = {
        workload: Side(workload, "small", steps, threads, shard=shard) for workload in workloads
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        workload, step = line.split()
        began, cpu = time.perf_counter(), time.process_time()
        metrics = sides[workload].step(int(step))
        metrics |= {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
        print(json.dumps(metrics), flush=True)


class Program:
    """The processes of one program; rank 0 reads and prints the lines."""

    def __init__(self, name: str, workloads: list[str], steps: int) -> None:
        size, threads = PROGRAMS[name.removesuffix(" sharded")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "benchmarks.scaling", "--serve", str(threads)]
        command += ["--steps", str(steps), "--workloads", *workloads]
        command += ["--shard"] if name == SHARDED else []
        ranks = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": port}
        shared = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1"}
        shared["OMP_NUM_THREADS"] = str(threads)
        self.processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=None if rank else subprocess.PIPE,
                stdout=None if rank else subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def read_line(self) -> dict[str, float]:
        assert self.processes[0].stdout is not None
        return json.loads(self.processes[0].stdout.readline())

    def step(self, workload: str, step: int) -> dict[str, float]:
        pipe = self.processes[0].stdin
        assert pipe is not None
        pipe.write(f"{workload} {step}\n")
        pipe.flush()
        return self.read_line()

    def end(self) -> None:
        assert self.processes[0].stdin is not None
        self.processes[0].stdin.close()
        for process in self.processes:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=[*PROGRAMS, SHARDED],
        default=list(PROGRAMS),
        help="processes x threads; must include 2 x 1",
    )
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.workloads, options.serve, options.steps, options.shard)
        return
    from benchmarks import workloads as W

    W.build_model("small")
    warmup, rounds = 2, options.rounds
    programs = {
        name: Program(name, options.workloads, warmup + rounds) for name in options.programs
    }
    for program in programs.values():
        program.read_line()
    print("ready", flush=True)
    try:
        for workload in options.workloads:
            measure(programs, workload, warmup, rounds)
    finally:
        for program in programs.values():
            program.end()


def measure(programs: dict[str, Program], workload: str, warmup: int, rounds: int) -> None:
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for step in range(warmup + rounds):
        for name, program in programs.items():
            steps[name].append(program.step(workload, step))
    losses = [[metrics["loss"] for metrics in each] for each in steps.values()]
    worst = max(max(each) - min(each) for each in zip(*losses, strict=True))
    print(f"{workload}: losses differ by {worst:.1e} at most")
    for key in ("seconds", "cpu_s", "generate_s"):
        if key not in steps["2 x 1"][0]:
            continue
        times = {name: [metrics[key] for metrics in each[warmup:]] for name, each in steps.items()}
        medians = "  ".join(f"{name} {statistics.median(t):.3f} s" for name, t in times.items())
        print(f"  {key:10s} {medians}")
        for other in programs.keys() - {"2 x 1"}:
            each = [a / b for a, b in zip(times[other], times["2 x 1"], strict=True)]
            spread = f"(min {min(each):.2f}, max {max(each):.2f})"
            print(f"  {'':10s} {other} / 2 x 1: {statistics.median(each):.2f} {spread}", flush=True)


if __name__ == "__main__":
    main()
