"""Sections 3 and 6: training of 0.6B in four shapes, then of larger models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu.decode import sample
from benchmarks.gpu.memory import GIB, eight_on_24
from benchmarks.gpu.models import (
    SECONDS,
    Side,
    connect,
    datum,
    families,
    named,
    own_cross_entropy,
    sequences,
    training_flops,
)
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.tinker import Datum

GOALS = {"0.6B": 0.20, "1.7B": 0.30, "8B": 0.43}
"""Share of the measured bfloat16 rate, packed rows of 16k tokens."""


def data_of(lists: Sequence[Sequence[int]]) -> list[Datum]:
    total = sum(len(ids) for ids in lists)
    return [datum(ids, 1.0 / total) for ids in lists]


def train_step(side: Side, data: list[Datum], loss: Any = "cross_entropy") -> float:
    """A built-in loss, or one's own, and an optimizer step; returns the number of passes."""
    if callable(loss):
        backward = side.client.forward_backward_custom(data, loss)
    else:
        backward = side.client.forward_backward(data, loss)
    side.client.optim_step(tinker.AdamParams(1e-5)).result(SECONDS)
    return backward.result(SECONDS).metrics["passes"]


def rate(
    report: Report, card: Card, side: Side, name: str, lists: list[list[int]], goal: Any = None
) -> None:
    """Tokens a second of a training step, its share of the product rate, its peak of memory."""
    data, tokens = data_of(lists), sum(map(len, lists))
    passes: list[float] = []
    taken = card.seconds(lambda: passes.append(train_step(side, data)))
    report.median(f"{name}: ours", [tokens / t for t in taken], "tokens/s")
    share = training_flops(side.config, lists) / statistics.median(taken) / card.rate()
    report.number(f"{name}: share of the bfloat16 rate", share, "", goal)
    report.number(f"{name}: passes", passes[-1], "")
    report.number(f"{name}: micro-batches", len(side.engine.scorer.batches(data)), "")
    report.number(f"{name}: peak", card.peak(lambda: train_step(side, data)) / GIB, "GiB")


def train(report: Report, card: Card) -> None:
    config = named(card, "0.6B")
    long, short, vocab = card.pick(1024, 16), card.pick(512, 8), config.vocab_size
    with connect(card, config) as side:
        for count, length in ((16, long), (card.pick(64, 4), long), (8, short)):
            goal = (">=", GOALS["0.6B"]) if count == 16 else None
            lists = sequences(count, length, vocab)
            rate(report, card, side, f"0.6B {count} x {length}", lists, goal)
        prompts, group, shared, own = card.pick((16, 8, 256, 256), (2, 2, 20, 4))
        name = f"0.6B {prompts} x {group} x ({shared} shared + {own})"
        rate(report, card, side, name, families(prompts, group, shared, own, vocab))
        parts(report, card, side, sequences(16, long, vocab), sequences(8, short, vocab))


def parts(
    report: Report, card: Card, side: Side, lists: list[list[int]], few: list[list[int]]
) -> None:
    """What a step consists of: the loss, the optimizer, the reference, kernels and waits."""
    data, small = data_of(lists), data_of(few)
    plain = card.seconds(lambda: train_step(side, data), repeats=7)
    custom = card.seconds(lambda: train_step(side, data, own_cross_entropy), repeats=7)
    ratio = statistics.median(custom) / statistics.median(plain)
    report.number("custom loss / built-in loss, a step", ratio, "", ("<=", 1.03))

    def optimize() -> None:
        side.adapter.accumulate(grads)  # a step takes them away
        side.client.optim_step(tinker.AdamParams(0.0)).result(SECONDS)

    side.client.forward_backward(small, "cross_entropy").result(SECONDS)
    grads = [g.clone() for g in side.adapter.grads]
    side.adapter.grads = None
    report.median("accumulate and optim_step alone", card.milliseconds(optimize), "ms")
    taken = card.milliseconds(lambda: side.score(data))
    report.median("reference alone (forward, no graph)", taken, "ms")
    for what, chosen in (("large", data), ("small", small)):

        def backward(data: list[Datum] = chosen) -> None:
            side.client.forward_backward(data, "cross_entropy").result(SECONDS)

        seen = card.profile(backward)
        report.number(f"{what} batch: device busy", seen.busy, "share")
        report.number(f"{what} batch: calls that wait for the device", seen.waits, "")
        if what == "small":  # one micro-batch: 4,096 tokens
            name = "kernels a layer, forward and backward, head included"
            layers = side.config.num_hidden_layers
            report.number(name, seen.kernels / layers, "", ("<=", 150.0))
        total = sum(seen.milliseconds.values())
        for kernel, spent in seen.milliseconds.most_common(12 if what == "large" else 4):
            report.number(f"{what} batch: {kernel}", spent, f"ms of {total:.1f}")
    side.adapter.grads = None
    waits = card.syncs(lambda: train_step(side, small))
    report.number("small batch: synchronizing calls a step, by torch", waits, "")


def larger(report: Report, card: Card) -> None:
    """16k tokens and a little decoding of 1.7B; of 8B where memory allows; 8B in 24 GB."""
    names = ["1.7B"]
    if card.smoke or card.memory >= 40 * 10**9:
        names.append("8B")
    else:
        report.skip("8B", f"{card.memory / 1e9:.0f} GB of memory, 40 needed")
    for name in names:
        if report.has_time(name, card.pick(25, 0)):
            with report.attempt(name):
                one_size(report, card, name)
    if card.smoke or card.memory >= 23.5 * 10**9:
        if report.has_time("8B within 24 GB", card.pick(25, 0)):
            with report.attempt("8B within 24 GB", must=False):  # a goal
                eight_on_24(report, card)
    else:
        report.skip("8B within 24 GB", f"the card has {card.memory / 1e9:.0f} GB")


def one_size(report: Report, card: Card, name: str) -> None:
    config, (count, length) = named(card, name), card.pick((16, 1024), (2, 16))
    with connect(card, config) as side:
        lists = sequences(count, length, config.vocab_size)
        rate(report, card, side, f"{name} {count} x {length}", lists, (">=", GOALS[name]))
        rows, length, new = card.pick((32, 128, 32), (2, 8, 4))
        prompts, sampler = sequences(rows, length, config.vocab_size), side.sampler()
        taken = card.seconds(lambda: sample(sampler, prompts, new))
        report.median(f"{name} decode, {rows} rows", [rows * new / t for t in taken], "tokens/s")
