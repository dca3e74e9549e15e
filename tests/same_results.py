"""Repeat the same work under changing load; every repeat must give the same bits.

    python -m tests.same_results --repeats 200

A scored batch, a rollout and ten GRPO steps are repeated, each with the same seeds, while other
processes keep all cores busy and take and free memory. In this process the caller is delayed at
random between two submissions, what the engine believes to be free memory changes from call to
call, and a second engine, as other tests of a session leave them, samples now and then. Of each
piece of work one hash is expected. A short form runs in the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from cookbook_core import clients, datum_from_prompt_completion, tinker
from cookbook_core.backend.local.model import memory
from cookbook_core.backend.worker import Worker
from tests.oracles.logprobs import engine_of

import numpy as np
import torch

LONGEST_PAUSE = 0.01  # seconds between two submissions of the caller


def keep_busy(megabytes: int) -> None:
    """Multiply matrices for ever, in bursts; take memory and free it again."""
    rng = np.random.default_rng(os.getpid())
    x = rng.random((256, 256))
    while True:
        block = np.ones(rng.integers(1, megabytes + 1) << 17)
        for _ in range(rng.integers(1, 200)):
            x = x @ x / np.linalg.norm(x)
        del block
        time.sleep(rng.random() * 0.02)


@contextlib.contextmanager
def busy_machine(processes: int, megabytes: int = 400) -> Iterator[None]:
    """Inside, that many other processes use the cores, and up to that much memory each."""
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=keep_busy, args=(megabytes,), daemon=True) for _ in range(processes)
    ]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


@contextlib.contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """Inside, submissions are delayed and free memory is another at each call."""
    rng = random.Random(seed)
    put, free_bytes = Worker._put, memory.free_bytes

    def delayed(self: Worker, job: Any) -> None:
        put(self, job)
        time.sleep(rng.random() * LONGEST_PAUSE * rng.randint(0, 1))

    def changing(device: Any) -> int:
        return int(free_bytes(device) * rng.choice([1, 1e-2, 1e-3, 1e-4, 0]))

    with (
        mock.patch.object(Worker, "_put", delayed),
        mock.patch.object(memory, "free_bytes", changing),
    ):
        yield


class Work:
    """The pieces of work; each gives the bytes of its results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service = tinker.ServiceClient(checkpoint_dir=folder / "checkpoints")
        self.client = self.service.create_lora_training_client("tiny", rank=8, seed=0).result()
        encode = self.client.get_tokenizer().encode
        questions = [f"What is {a} + {b}?" for a in range(3, 9) for b in range(2, 8)]
        system = "You are a careful calculator. Answer with one number and nothing else. "
        self.prompts = [
            encode(system * (n % 3) + "please " * (n % 5) + question)
            for n, question in enumerate(questions)
        ]
        # prefixes that some of them share
        self.data = [
            datum_from_prompt_completion(prompt, encode(f" {n} is the answer" * (1 + n % 3)))
            for n, prompt in enumerate(self.prompts)
        ]
        engine_of(self.client).scorer.micro_batch_tokens = 400  # several micro-batches
        # away from its start, where B = 0 hides most of what could differ
        self.client.forward_backward(self.data, "cross_entropy").result()
        self.client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()

    def scored_batch(self) -> bytes:
        """Logprobs, loss and the step that the gradient of a batch leads to."""
        copy = self.service.create_training_client_from_state_with_optimizer(
            self.client.save_state("start", overwrite=True).result().path
        ).result()
        output = copy.forward_backward(self.data, "cross_entropy").result()
        copy.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        after = copy.forward(self.data, "cross_entropy").result()
        arrays = [out["logprobs"].to_numpy() for o in (output, after) for out in o.loss_fn_outputs]
        return repr(output.loss).encode() + b"".join(a.tobytes() for a in arrays)

    def rollout(self) -> bytes:
        """Tokens and logprobs of prompts of different lengths."""
        sampler = self.client.save_weights_and_get_sampling_client().result()
        groups = clients.rollout(sampler, self.prompts[:10], 3, max_tokens=16, seed=3)
        return repr([(s.tokens, s.logprobs) for group in groups for s in group]).encode()

    def grpo(self) -> bytes:
        """Metrics and adapter of ten steps."""
        from recipes.grpo import Config, train

        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            config = Config(
                num_steps=10, batch_size=4, group_size=4, max_tokens=8, test_rows=4, eval_every=10,
                dataset="tiny/grpo@train[:40]/test", log_path=f"{name}/run",
            )  # fmt: skip
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                mock.patch("cookbook_core.runs.run.draw_panels"),
            ):
                train(config)
            text = Path(name, "run", "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            timeless = [{k: v for k, v in r.items() if k not in NOT_RESULTS} for r in rows]
            (weights,) = Path(name, "run").rglob("final/adapter_model.safetensors")
            return json.dumps(timeless).encode() + weights.read_bytes()


NOT_RESULTS = ("tokens_per_second", "passes")
"""Metrics that may differ: speed, and whether free memory allowed one pass."""


def hashes(repeats: int, folder: Path, only: str = "") -> dict[str, Counter[str]]:
    """How often each piece of work gave which hash."""
    work, seen = Work(folder), {}
    pieces: dict[str, Callable[[], bytes]] = {
        "scored batch": work.scored_batch,
        "rollout": work.rollout,
        "ten GRPO steps": work.grpo,
    }
    bystander = tinker.ServiceClient().create_sampling_client(base_model="tiny").result()
    params = tinker.SamplingParams(max_tokens=8, stop=[])
    prompt = tinker.ModelInput.from_ints(work.prompts[0])
    for number in range(repeats):
        for name, run in pieces.items():
            if only and only != name:
                continue
            bystanding = bystander.sample(prompt, 1 + number % 3, params) if number % 2 else None
            with disturbed(seed=number):
                digest = hashlib.sha256(run()).hexdigest()[:16]
            seen.setdefault(name, Counter())[digest] += 1
            if bystanding is not None:
                bystanding.result()
    work.service.close()
    return seen


def main() -> int:
    """Print the hashes; 0 if each piece of work gave one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="other busy processes")
    parser.add_argument("--threads", type=int, default=1, help="of this process's products")
    parser.add_argument("--only", default="", help="one piece of work, by name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, busy_machine(args.busy or 0):
        seen = hashes(args.repeats, Path(folder), args.only)
    for name, counts in seen.items():
        print(f"{name}: {dict(counts)}")
    print(f"{args.repeats} repeats in {time.monotonic() - start:.0f} s")
    return 0 if all(len(counts) == 1 for counts in seen.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
