"""Cost of a custom loss: one pass against the built-in loss, and two passes against one.

    python -m benchmarks.one_pass

Interleaved in one process, on the random `small` model, over the same datums: `forward_backward`
with "cross_entropy", `forward_backward_custom` with each loss, and the two-pass form that hosted
services use (`forward_backward_two_pass`). Prints the median of the ratios within a round, with the
smallest and largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import workloads as W
from benchmarks.our_side import cpu_service, grpo_loss
from cookbook_core import clients, datum_from_prompt_completion, tinker, with_inputs
from cookbook_core.builtin_losses import cross_entropy
from cookbook_core.custom_loss import forward_backward_two_pass
from recipes.dpo import dpo_loss

import torch


def data() -> list[tinker.Datum]:
    """Build eight pairs with every input that the losses read."""
    made = []
    for pair in W.pairs("small", 1)[0]:
        for s in pair:
            datum = datum_from_prompt_completion(
                s.prompt, s.completion, score_prompt=False, advantages=0.5, sampling_logprobs=-8.0
            )
            made.append(
                with_inputs(datum, ref_logprobs=torch.full((datum.model_input.length,), -8.0))
            )
    return made


def variance(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> Any:
    del data
    return torch.stack([lp.sum() for lp in logprobs]).var(), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    client = clients.start(cpu_service(), W.build_model("small"), "", W.LORA_RANK, seed=0)
    batch = data()
    dpo = partial(dpo_loss, beta=W.BETA)
    losses = {
        "cross-entropy": cross_entropy,
        "DPO": dpo,
        "GRPO": grpo_loss,
        "variance": variance,
    }
    runs: dict[str, Callable[[], Any]] = {
        "built-in": lambda: client.forward_backward(batch, "cross_entropy").result()
    }
    for name, loss in losses.items():
        runs[name] = lambda loss=loss: client.forward_backward_custom(batch, loss).result()
    runs["two passes"] = lambda: forward_backward_two_pass(client, batch, dpo)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(options.rounds + 2):
        for name, one in runs.items():
            began = time.perf_counter()
            one()
            if n >= 2:
                seconds[name].append(time.perf_counter() - began)
        client.optim_step(tinker.AdamParams(1e-6)).result()
    print(f"built-in cross-entropy: {statistics.median(seconds['built-in']):.3f} s")
    for name in losses:
        print(spread(f"{name} / built-in", seconds[name], seconds["built-in"]))
    print(spread("two passes / one pass (DPO)", seconds["two passes"], seconds["DPO"]))


def spread(name: str, above: list[float], below: list[float]) -> str:
    each = [a / b for a, b in zip(above, below, strict=True)]
    middle = statistics.median(each)
    return f"{name:30s} {middle:5.2f}  (min {min(each):.2f}, max {max(each):.2f})"


if __name__ == "__main__":
    main()
