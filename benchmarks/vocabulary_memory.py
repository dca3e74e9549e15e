"""Memory of exact distillation at a vocabulary of 151,936, beyond the model and its adapters.

    python -m benchmarks.vocabulary_memory --rows 4000          # as recipes/distill.py does it
    python -m benchmarks.vocabulary_memory --rows 250 --plain   # with all rows in the graph

One forward_backward of the forward KL to a teacher, of answers of 250 tokens, with the model
vocab150k of benchmarks/workloads.py in float32 on the CPU. The peak is that of the process's
resident memory (VmHWM, set back after a small first step; Linux only), so it contains what the
allocator holds on to.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import workloads as W
from benchmarks.our_side import cpu_service
from cookbook_core import clients, datum_from_prompt_completion, tinker
from cookbook_core.alignment import input_tensors
from recipes.distill import divergence_of, exact_loss

import torch

LENGTH = 250


def plain_loss(data: list[tinker.Datum], rows: list[Any], teacher_rows: list[Any]) -> Any:
    on = [w != 0 for w in input_tensors(data, "weights")]
    values = [
        divergence_of(p[mask], q[:], "forward")
        for p, q, mask in zip(rows, teacher_rows, on, strict=True)
    ]
    return torch.cat(values).mean(), {}


def resident_mib(key: str) -> float:
    """VmRSS, the resident memory now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    service, folder = cpu_service(), W.build_model("vocab150k")
    student = clients.start(service, folder, "", W.LORA_RANK, seed=0)
    teacher = clients.start(service, folder, "", W.LORA_RANK, seed=1)
    loss = plain_loss if args.plain else partial(exact_loss, divergence="forward")

    def step(answers: list[list[int]]) -> None:
        data = [datum_from_prompt_completion([8, 9, 10], answer) for answer in answers]
        tables = clients.vocab_logprobs(teacher, data)
        loss_fn = partial(loss, teacher_rows=tables)
        student.forward_backward_custom(data, loss_fn, loss_type_input="vocab_logprobs").result()

    step([[11, 12]])
    random = torch.Generator().manual_seed(0)
    answers = torch.randint(
        W.SPECIALS, 151936, (args.rows // LENGTH or 1, LENGTH), generator=random
    )
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM = VmRSS
    before, began = resident_mib("VmRSS"), time.perf_counter()
    step([answer.tolist() for answer in answers])
    print(
        f"{answers.numel()} rows of 151,936: {resident_mib('VmHWM') - before:.0f} MiB beyond "
        f"{before:.0f} MiB, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
