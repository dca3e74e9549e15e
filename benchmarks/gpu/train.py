"""Sections 3 and 6: training of 0.6B in four shapes, then of larger models."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.decode import sample, sampler_of
from benchmarks.gpu.memory import eight_on_24
from benchmarks.gpu.models import (
    SECONDS, connect, datums, families, named, score, sequences, train_step, training_flops,
)  # fmt: skip
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.builtin_losses import cross_entropy
from tests.oracles.logprobs import adapter_of, engine_of

GOALS = {"0.6B": (">=", 0.20), "1.7B": (">=", 0.30), "8B": (">=", 0.43)}
"""Share of the measured bfloat16 rate, packed rows of 16k tokens."""


def rate(report: Report, card: Card, client: Any, name: str, lists: Any, goal: Any = None) -> None:
    """Tokens a second of a training step, its share of the product rate, its peak of memory."""
    config, data, passes = engine_of(client).base.model.config, datums(lists), []
    taken = card.seconds(lambda: passes.append(train_step(client, data)))
    report.number(f"{name}: ours", [sum(map(len, lists)) / t for t in taken], "tokens/s")
    share = training_flops(config, lists) / statistics.median(taken) / card.rate()
    report.number(f"{name}: share of the bfloat16 rate", share, "", goal)
    report.number(f"{name}: passes", passes[-1], "")
    report.number(f"{name}: micro-batches", len(engine_of(client).scorer.batches(data)), "")
    report.number(f"{name}: peak", card.peak(lambda: train_step(client, data)) / GIB, "GiB")


def train(report: Report, card: Card) -> None:
    config = named(card, "0.6B")
    long, short = card.pick(1024, 16), card.pick(512, 8)
    with connect(card, config) as client:
        for count, length in ((16, long), (card.pick(64, 4), long), (8, short)):
            lists = sequences(count, length)
            goal = GOALS["0.6B"] if count == 16 else None
            rate(report, card, client, f"0.6B {count} x {length}", lists, goal)
        prompts, group, shared, own = card.pick((16, 8, 256, 256), (2, 2, 20, 4))
        name = f"0.6B {prompts} x {group} x ({shared} shared + {own})"
        rate(report, card, client, name, families(prompts, group, shared, own))
        large, small = datums(sequences(16, long)), datums(sequences(8, short))
        parts(report, card, client, large)
        profiles(report, card, client, large, small, config.num_hidden_layers)


def parts(report: Report, card: Card, client: Any, data: Any) -> None:
    """What a step consists of: the loss, the optimizer, the reference."""
    plain, custom = (
        statistics.median(card.seconds(lambda loss=loss: train_step(client, data, loss), repeats=7))
        for loss in ("cross_entropy", cross_entropy)
    )
    report.number("custom loss / built-in loss, a step", custom / plain, "", ("<=", 1.03))
    adapter = adapter_of(client)
    client.forward_backward(data, "cross_entropy").result(SECONDS)
    grads = [g.clone() for g in adapter.grads]
    adapter.grads = None

    def optimize() -> None:
        adapter.accumulate(grads)  # a step takes them away
        client.optim_step(tinker.AdamParams(0.0)).result(SECONDS)

    report.number("accumulate and optim_step alone", card.milliseconds(optimize), "ms")
    taken = card.milliseconds(lambda: score(client, data))
    report.number("reference alone (forward, no graph)", taken, "ms")


def profiles(report: Report, card: Card, client: Any, large: Any, small: Any, layers: int) -> None:
    """Kernels and waits, forward and backward."""
    for what, data, most in (("large", large, 12), ("small", small, 4)):
        seen = card.profile(
            lambda data=data: client.forward_backward(data, "cross_entropy").result(SECONDS)
        )
        report.number(f"{what} batch: device busy", seen.busy, "share")
        report.number(f"{what} batch: calls that wait for the device", seen.waits, "")
        if what == "small":  # one micro-batch: 4,096 tokens
            name = "kernels a layer, forward and backward, head included"
            report.number(name, seen.kernels / layers, "", ("<=", 150.0))
        total = sum(seen.milliseconds.values())
        for kernel, spent in seen.milliseconds.most_common(most):
            report.number(f"{what} batch: {kernel}", spent, f"ms of {total:.1f}")
    adapter_of(client).grads = None


def larger(report: Report, card: Card) -> None:
    """16k tokens and a little decoding of 1.7B; of 8B where memory allows; 8B in 24 GB."""
    for name, least, must, measure in (
        ("1.7B", 0, True, one_size),
        ("8B", 40e9, True, one_size),
        ("8B within 23 GiB, 2,048 tokens", 23.5e9, False, eight_on_24),  # a goal
    ):
        if card.memory < least:
            report.note(f"{name}: skipped: {card.memory / 1e9:.0f} GB, {least / 1e9} needed")
        elif report.has_time(name, 25):
            with report.attempt(name, must=must):
                measure(report, card, name)


def one_size(report: Report, card: Card, name: str) -> None:
    count, length = card.pick((16, 1024), (2, 16))
    rows, prompt, new = card.pick((32, 128, 32), (2, 8, 4))
    with connect(card, named(card, name)) as client:
        lists = sequences(count, length)
        rate(report, card, client, f"{name} {count} x {length}", lists, GOALS[name])
        prompts, sampler = sequences(rows, prompt), sampler_of(client)
        taken = card.seconds(lambda: sample(sampler, prompts, new))
        report.number(f"{name} decode, {rows} rows", [rows * new / t for t in taken], "tokens/s")
