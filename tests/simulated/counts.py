"""What the package makes an accelerator do, counted: launches, waits and copies.

    python -m tests.simulated.counts [--operators]

prints one table per dtype of the base model, with --operators what each row is made of;
`test_budgets.py` holds the numbers to their budgets. A count of one more layer, datum, token or
prompt is the difference of two runs, so what happens once does not enter. Models are random, of the
Qwen3 architecture, with LoRA on all linear layers.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from cookbook_core import clients, tinker
from cookbook_core.tinker import Datum, ModelInput, TrainingClient
from tests.simulated import device
from tests.simulated.choices import choose_as_on_cuda
from tests.simulated.device import Counts, count

import numpy as np
import torch

SECONDS = 120
VOCAB, TOKENS = 100, 20
LAYERS = (2, 4)


# ---- clients and data ----------------------------------------------------------------------------


@cache
def _model_folder(layers: int) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@cache
def client(layers: int, dtype: str) -> TrainingClient:
    """A training client on the simulated device, one per number of layers and dtype."""
    choose_as_on_cuda()
    service = tinker.ServiceClient(device="sim", dtype=dtype, checkpoint_dir=tempfile.mkdtemp())
    made = service.create_lora_training_client(
        _model_folder(layers), rank=4, seed=0, train_unembed=False
    )
    return made.result(SECONDS)


def datums(n: int, *, masked: bool = False) -> list[Datum]:
    """Make n datums of TOKENS random tokens that share no prefix; masked: half are scored."""
    rng = np.random.default_rng(n)
    made = []
    for _ in range(n):
        inputs: dict[str, Any] = {"target_tokens": rng.integers(0, VOCAB, TOKENS)}
        if masked:
            inputs["score_mask"] = np.arange(TOKENS) % 2
        made.append(Datum(ModelInput.from_ints(rng.integers(0, VOCAB, TOKENS)), inputs))
    return made


def squares(data: Any, logprobs: Any) -> Any:
    """A loss on the host."""
    del data
    return sum((lp**2).sum() for lp in logprobs), {}


# ---- what is counted -----------------------------------------------------------------------------


def train(client: TrainingClient, data: list[Datum]) -> Counts:
    """One forward and backward."""
    return count(lambda: client.forward_backward_custom(data, squares).result(SECONDS))


def score(client: TrainingClient, data: list[Datum]) -> Counts:
    """Logprobs without a gradient."""
    return count(lambda: clients.score(client, data))


def accumulate(client: TrainingClient) -> Counts:
    """Adding the gradient of one backward to the accumulated one."""
    adapter = client._backend._adapter
    add, counts = type(adapter).accumulate, Counts()

    def counted(*args: Any) -> None:
        with device.counting() as own:
            add(*args)
        vars(counts).update(vars(own))

    type(adapter).accumulate = counted
    try:
        train(client, datums(1))
    finally:
        type(adapter).accumulate = add
    return counts


def step(client: TrainingClient) -> Counts:
    """One optimizer step."""
    return count(lambda: client.optim_step(tinker.AdamParams(1e-3)).result(SECONDS))


def step_after_load(client: TrainingClient) -> Counts:
    """The first optimizer step after a checkpoint was loaded."""
    name = f"state{next(_numbers)}"
    train(client, datums(1))
    path = client.save_state(name).result(SECONDS).path
    client.load_state_with_optimizer(path).result(SECONDS)
    train(client, datums(1))
    return step(client)


_numbers = itertools.count()


def sample(client: TrainingClient, lengths: list[int], prompts: int = 1) -> Counts:
    """Decode one completion of each length from prompts that take turns."""
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)

    async def run() -> None:
        await asyncio.gather(
            *(
                sampler.sample_async(
                    ModelInput.from_ints([7, 8, 9, i % prompts]),
                    1,
                    tinker.SamplingParams(max_tokens=length, seed=i, stop=[]),
                )
                for i, length in enumerate(lengths)
            )
        )

    return count(lambda: asyncio.run(run()))  # together: the service decodes them in one batch


def per_layer(run: Callable[[TrainingClient], Counts], dtype: str) -> tuple[Counts, Counts]:
    """Counts of one layer, and of what is outside the layers."""
    few, many = LAYERS
    small, large = (run(client(layers, dtype)) for layers in LAYERS)
    each = (large - small) / (many - few)
    return each, small - each / (1 / few)


# ---- the table -----------------------------------------------------------------------------------


def decode_step(client: TrainingClient) -> Counts:
    """One more token of 4 rows."""
    return (sample(client, [40] * 4) - sample(client, [24] * 4)) / 16


def row_end(client: TrainingClient) -> Counts:
    """A row that ends before the others."""
    together, apart = sample(client, [40] * 4), sample(client, [24, 28, 32, 40])
    return (apart - together) / 3


def prompt_start(client: TrainingClient) -> Counts:
    """One more distinct prompt among 8 rows."""
    return (sample(client, [20] * 8, prompts=8) - sample(client, [20] * 8, prompts=2)) / 6


def measure(dtype: str) -> dict[str, Counts]:
    """All rows of the table for a base model of that dtype."""
    for layers in LAYERS:  # what is made at first use: the optimizer and its moments
        train(client(layers, dtype), datums(1))
        step(client(layers, dtype))
    rows: dict[str, Counts] = {}

    def both(name: str, run: Callable[[TrainingClient], Counts]) -> None:
        rows[f"{name}, a layer"], rows[f"{name}, the rest"] = per_layer(run, dtype)

    both("decode step", decode_step)
    both("a row ends", row_end)
    both("a prompt starts", prompt_start)
    both("forward + backward", lambda c: train(c, datums(1)))
    both("forward", lambda c: score(c, datums(1)))
    for masked in (False, True):
        name = "a datum more, half of it masked" if masked else "a datum more"
        few, many = datums(8, masked=masked), datums(64, masked=masked)
        _, rows[name] = per_layer(lambda c, f=few, m=many: (train(c, m) - train(c, f)) / 56, dtype)
    both("accumulate", accumulate)
    both("optim_step", _trained_step)
    both("optim_step after load", step_after_load)
    return rows


def _trained_step(client: TrainingClient) -> Counts:
    train(client, datums(1))
    return step(client)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    columns = ("launches", "waits", "h2d", "blocking", "d2h")
    for dtype in ("bfloat16", "float32"):
        print("".join([f"{dtype:36}", *(f"{name:>10}" for name in columns)]))
        for name, counts in measure(dtype).items():
            moved = (counts.moved[key] for key in ("h2d", "h2d blocking", "d2h"))
            numbers = (counts.launches, counts.waits, *moved)
            print("".join([f"{name:36}", *(f"{number:10.1f}" for number in numbers)]))
            if "--operators" in arguments and counts.launches:
                each = counts.by_operator.most_common()
                print("    " + ", ".join(f"{name} {number:.1f}" for name, number in each))
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
