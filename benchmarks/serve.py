"""Cost of the wire: the `tinker` SDK over `cookbook serve` beside the in-process client.

    PYTHONPATH=.:.venv/sdk/0.38.0 python -m benchmarks.serve --rounds 15

The server is a process of its own with the bundled model; the rounds are interleaved. A step is a
forward_backward and an optim_step of 8 datums of 64 tokens. Prints the median, smallest and largest
ratio (or difference) within a round. One thread each: run it where two cores are idle.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.one_pass import spread
from cookbook_core import tinker as own

import numpy as np
import tinker as sdk

DATUMS, TOKENS, RANK, RATE = 8, 64, 16, 1e-6
SAMPLES, NEW_TOKENS = 256, 32


@contextmanager
def server() -> Iterator[str]:
    """The address of a server that ends with the block."""
    command = [sys.executable, "-m", "cookbook_core.commands.cli", "serve", "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--checkpoint_dir", folder],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, "the server did not start"
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def batch(types: Any) -> list[Any]:
    """The datums, in the types of one of the two packages."""
    rng, made = np.random.default_rng(0), []
    for _ in range(DATUMS):
        ids = rng.integers(10, 900, TOKENS + 1)
        inputs = {"target_tokens": ids[1:], "weights": np.ones(TOKENS, np.float32)}
        prompt = types.ModelInput.from_ints(ids[:-1].tolist())
        made.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
    return made


def squared(data: Any, logprobs: Any) -> Any:
    return sum((lp**2).sum() for lp in logprobs), {}


def traced(logprobs: Any, weights: Any) -> Any:
    return (weights * logprobs**2).sum(), {}


def steps(client: Any, types: Any, uploaded: Any = None) -> dict[str, Callable[[], Any]]:
    """A step by name, with a function as its loss and with an uploaded one."""
    data, adam = batch(types), types.AdamParams(learning_rate=RATE)

    def step(backward: Callable[[], Any]) -> None:
        result = backward()
        stepped = client.optim_step(adam)
        result.result()
        stepped.result()

    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: step(lambda: client.forward_backward(data, "cross_entropy")),
        "function": lambda: step(lambda: client.forward_backward_custom(data, squared)),
    }
    if uploaded is not None:
        runs["uploaded"] = lambda: step(lambda: client.forward_backward_custom(data, uploaded))
    return runs


def samples(sampler: Any, types: Any) -> Callable[[], Any]:
    """SAMPLES requests at once, of one sample each."""
    prompt = types.ModelInput.from_ints(list(range(20, 52)))
    params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])

    def run() -> None:
        futures = [sampler.sample(prompt, 1, params) for _ in range(SAMPLES)]
        for future in futures:
            future.result()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with server() as url:
        there = sdk.ServiceClient(base_url=url, api_key="tml-local")
        here = own.ServiceClient(device="cpu")
        make = {"rank": RANK, "seed": 0}
        wire = there.create_lora_training_client("tiny", **make).result()
        local = here.create_lora_training_client("tiny", **make).result()
        uploaded = there.create_custom_loss(traced, {"logprobs": 1, "weights": 1}).result()
        runs = {f"wire {k}": run for k, run in steps(wire, sdk, uploaded).items()}
        runs |= {f"here {k}": run for k, run in steps(local, own).items()}
        runs["wire samples"] = samples(wire.save_weights_and_get_sampling_client().result(), sdk)
        one = local.save_weights_and_get_sampling_client().result()
        prompt = own.ModelInput.from_ints(list(range(20, 52)))
        params = own.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
        runs["here samples"] = lambda: one.sample(prompt, SAMPLES, params).result()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for n in range(options.rounds + 2):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if n >= 2:
                    seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        print(f"{name:30s} {1e3 * statistics.median(each):7.1f} ms")
    pairs = zip(seconds["wire plain"], seconds["here plain"], strict=True)
    added = [1e3 * (a - b) for a, b in pairs]
    low, high = min(added), max(added)
    print(f"{'wire - here, plain step':30s} {statistics.median(added):5.1f} ms  "
          f"(min {low:.1f}, max {high:.1f})")  # fmt: skip
    for above, below in (
        ("wire plain", "here plain"),
        ("wire function", "wire plain"),
        ("wire uploaded", "wire plain"),
        ("here function", "here plain"),
        ("wire samples", "here samples"),
    ):
        print(spread(f"{above} / {below}", seconds[above], seconds[below]))


if __name__ == "__main__":
    main()
