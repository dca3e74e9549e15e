"""Training steps of this project against TRL's trainers: same model, token ids, LoRA, optimizer.

    pip install -e ".[bench]"
    python -m benchmarks.versus_trl                        # every workload on both models
    python -m benchmarks.versus_trl --workload dpo --model bigvocab

Float32 on the CPU, LoRA rank 16 on all attention and MLP layers, AdamW, one step per batch. Each
side runs in its own process, interleaved (ours, TRL, TRL compact, ours, ...), so that other jobs on
the machine slow all sides alike. Prints the median seconds of a step, the median of TRL's over ours
with the smallest and largest of the rounds, and the peak resident memory. Where both sides use the
same reduction (SFT, DPO), the first three losses must agree to 1e-3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import workloads as W

SIDES = {
    "ours": ["benchmarks.our_side"],
    "TRL": ["benchmarks.trl_side"],
    "TRL compact": ["benchmarks.trl_side", "--compact"],
}


def run(side: str, workload: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    module, *flags = SIDES[side]
    command = [sys.executable, "-m", module, "--workload", workload, "--model", model, *flags]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratio(name: str, theirs: list[float], ours: list[float]) -> str:
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    middle = statistics.median(each)
    return f"  {name:28s} {middle:5.2f}x  (min {min(each):.2f}, max {max(each):.2f})"


def compare(workload: str, model: str, options: argparse.Namespace) -> None:
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            reports[side].append(run(side, workload, model, options))
    if workload.startswith("sft") or workload == "dpo":
        ours = reports["ours"][0]["losses"][:3]
        for side in ("TRL", "TRL compact"):
            theirs = reports[side][0]["losses"][:3]
            gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            assert gap < 1e-3, f"losses differ: ours {ours}, {side} {theirs}"
    print(f"{workload}, {model}")
    steps: dict[str, list[float]] = {}
    for side, rounds in reports.items():
        steps[side] = [statistics.median(r["seconds"]) for r in rounds]
        memory = max(r["peak_mb"] for r in rounds)
        print(f"  {side:28s} {statistics.median(steps[side]):6.3f} s a step, peak {memory:5.0f} MB")
    for side in ("TRL", "TRL compact"):
        print(ratio(f"{side} / ours", steps[side], steps["ours"]))
        if workload.startswith("grpo"):
            train = {
                s: [
                    statistics.median(
                        a - b for a, b in zip(r["seconds"], r["generate_s"], strict=True)
                    )
                    for r in reports[s]
                ]
                for s in (side, "ours")
            }
            print(ratio(f"{side} / ours, training part", train[side], train["ours"]))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=W.WORKLOADS, nargs="*", default=W.WORKLOADS)
    models = ("small", "bigvocab")
    parser.add_argument("--model", choices=sorted(W.MODELS), nargs="*", default=models)
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    options = parser.parse_args()
    for name in options.model:
        W.build_model(name)
        for workload in options.workload:
            compare(workload, name, options)


if __name__ == "__main__":
    main()
