"""Share of the machine's matmul rate that a training step reaches, and the cost of a token.

    python -m benchmarks.floor                # share of the matmul rate, small and medium model
    python -m benchmarks.floor --sweep        # seconds per token from 1k to 64k tokens a batch

The rate is the best of many square float32 products. A step's floating-point operations are
counted, not measured: with P weights in the linear layers, p in their LoRA branches and T tokens,
2PT forward and 2PT for the gradients of activations, 6pT for LoRA, attention over n tokens 2 n^2 d
forward and 5 n^2 d backward (d = heads x head_dim, causal, so half of all pairs), and 4RVD for R
rows of the unembedding. Elementwise work is not counted, so it lowers the share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import workloads as W
from benchmarks.our_side import cpu_service
from cookbook_core import clients, datum_from_prompt_completion, tinker

import torch


def matmul_rate(size: int = 1024, repeats: int = 30) -> float:
    """Floating-point operations per second of a float32 product, best of `repeats`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def step_flops(model: str, lengths: list[int], rows: int) -> float:
    shape = W.MODELS[model]
    hidden, layers, vocab = (
        shape[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    inner, keys = 3 * hidden, hidden // 2
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = layers * sum(a * b for a, b in linear)
    lora = layers * sum(W.LORA_RANK * (a + b) for a, b in linear)
    tokens = sum(lengths)
    attention = layers * sum(7 * n * n * hidden for n in lengths)
    return 4 * weights * tokens + 6 * lora * tokens + attention + 4 * rows * vocab * hidden


def client_of(model: str) -> Any:
    return clients.start(cpu_service(), W.build_model(model), "", W.LORA_RANK, seed=0)


def step(client: Any, data: list[tinker.Datum]) -> float:
    """Seconds of one forward_backward and optim_step."""
    began = time.perf_counter()
    backward = client.forward_backward(data, "cross_entropy")
    client.optim_step(tinker.AdamParams(1e-6)).result()
    backward.result()
    return time.perf_counter() - began


def share(model: str, repeats: int) -> None:
    client = client_of(model)
    batches = W.sft(model, 3, prompts=False)
    data = [[datum_from_prompt_completion(s.prompt, s.completion) for s in b] for b in batches]
    lengths = [d.model_input.length for d in data[0]]
    flops = step_flops(model, lengths, sum(lengths))
    for batch in data:
        step(client, batch)
    shares = []
    for n in range(repeats):
        rate = matmul_rate()
        shares.append(flops / step(client, data[n % len(data)]) / rate)
    print(
        f"{model}: {flops / 1e9:.0f} GFLOP a step, matmul {rate / 1e9:.0f} GFLOP/s, "
        f"share reached {statistics.median(shares):.2f} (min {min(shares):.2f}, "
        f"max {max(shares):.2f})"
    )


def sweep(repeats: int) -> None:
    client, vocab = client_of("small"), W.MODELS["small"]["vocab_size"]
    rng = W.random.Random(0)
    sizes = [2**k for k in range(10, 17)]
    batches = {
        size: [
            datum_from_prompt_completion([8], W.draw(rng, 256, vocab)) for _ in range(size // 256)
        ]
        for size in sizes
    }
    costs: dict[int, list[float]] = {size: [] for size in sizes}
    for batch in batches.values():  # warm up: the first step allocates memory from the system
        step(client, batch)
    for _ in range(repeats):
        for size, batch in batches.items():
            costs[size].append(step(client, batch) / size)
    for size, cost in costs.items():
        relative = [c / f for c, f in zip(cost, costs[sizes[2]], strict=True)]
        print(
            f"{size:6d} tokens a batch: {1e6 * statistics.median(cost):6.1f} us a token, "
            f"{statistics.median(relative):.2f} of that at {sizes[2]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.sweep:
        sweep(options.repeats)
        return
    for model in ("small", "medium"):
        share(model, options.repeats)


if __name__ == "__main__":
    main()
