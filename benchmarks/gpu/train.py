"""Sections 2, 3 and 6: memory; training of 0.6B in four shapes; larger models."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.gpu import models as M
from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.decode import sample, sampler_of
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.backend.local.model import memory as package
from cookbook_core.backend.local.scoring import flex, packing
from cookbook_core.builtin_losses import cross_entropy
from tests.oracles.logprobs import adapter_of, engine_of

import torch

GOALS = {"0.6B": (">=", 0.20), "1.7B": (">=", 0.30), "8B": (">=", 0.43)}
"""Share of the measured bfloat16 rate, packed rows of 16k tokens."""


def memory(report: Report, card: Card) -> None:
    running_out = (training_runs_out, sampling_runs_out)
    for name, more in (("0.6B", running_out), ("1.7B", ())):
        with M.connect(card, M.named(card, name)) as client:
            for part in (graph_bytes, *more):
                run = partial(part, report, card, client, name)
                report.attempt(f"{name}: {part.__name__}", run)
    report.attempt("block mask", lambda: block_mask(report, card))


def graph_bytes(report: Report, card: Card, client: Any, name: str) -> None:
    """Bytes a token of graph, by what is allocated while a batch of 1,024 tokens is kept."""
    tokens, engine, adapter = card.pick(1024, 32), engine_of(client), adapter_of(client)
    data = M.datums(M.sequences(2, tokens // 2))
    client.forward_backward(data, "cross_entropy").result(M.SECONDS)
    card.free()
    before = card.allocated()
    with engine.score_with_graph(adapter, data) as scored:
        kept = card.allocated() - before
        report.check(f"{name}: the graph is kept", scored.passes == 1, scored.passes, "1")
        del scored
    adapter.grads = None
    measured = report.number(f"{name}: graph, measured", kept / tokens, "bytes a token")
    counted = engine.limits.graph_bytes(list(adapter.slot.params.values())).whole
    report.number(f"{name}: graph, as the package counted it", counted, "bytes a token")
    estimate = package.estimate_graph_bytes(engine.base.model).whole
    report.number(f"{name}: graph, estimated", estimate, "bytes a token")
    report.number(f"{name}: estimate / measured", estimate / measured if measured else 0.0, "")


def training_runs_out(report: Report, card: Card, client: Any, _: str) -> None:
    """With a third of the memory it takes, a batch goes through in pieces, to the same gradient.

    Not so on the CPU, which has no limit; the same holds for sampling.
    """
    length = card.pick(512, 16)
    data = M.datums(M.sequences(16, length))

    def step() -> torch.Tensor:
        client.forward_backward_custom(data, cross_entropy).result(M.SECONDS)
        return M.gradient(client)

    want, peak = step(), card.peak(step)
    report.number(f"training step of {16 * length} tokens, peak", peak / GIB, "GiB")
    with card.within_a_third(peak):
        off = M.error(step(), want)
        limits = engine_of(client).limits.limits(length)
    report.number("a third of it: tokens of a micro-batch", limits.micro_batch_tokens, "tokens")
    report.number("a third of it: tokens of kept graphs", limits.graph_tokens, "tokens")
    report.at_most("a third of it: gradient, relative error", off, 0.01)


def sampling_runs_out(report: Report, card: Card, client: Any, _: str) -> None:
    """With a third of the memory it takes, the same completions come in more than one wave."""
    rows, length, new = card.pick((256, 256, 32), (8, 16, 4))
    prompts, sampler = M.sequences(rows, length), sampler_of(client)
    want = sample(sampler, prompts, new)
    peak = card.peak(lambda: sample(sampler, prompts, new))
    report.number(f"sampling {rows} rows of {length + new} tokens, peak", peak / GIB, "GiB")
    with card.within_a_third(peak):
        found = sample(sampler, prompts, new)
    same = sum(a.tokens == b.tokens for a, b in zip(want, found, strict=True))
    report.number("a third of it: rows with the same tokens", same / rows, "share")
    whole = all(len(s.tokens) == new for s in found)
    report.check("a third of it: every row has its tokens", whole)


def block_mask(report: Report, card: Card) -> None:
    """Memory that making the block mask of a row of 16k tokens takes."""
    layout = packing.lay_out(M.sequences(16, card.pick(1024, 16)))
    for window in (None, card.pick(4096, 8)):
        before = card.allocated()
        peak = card.peak(lambda window=window: flex.block_mask(layout, window, card.device))
        name = f"block mask, {len(layout.tokens)} tokens, window {window}: peak"
        report.number(name, max(peak - before, 0) / 2**20, "MiB")


def step_rate(
    report: Report, card: Card, client: Any, what: str, lists: Any, goal: Any = None
) -> tuple[float, float]:
    """Tokens a second of a training step, its share of the product rate, its peak of memory.

    Returns the first and the last, in GiB.
    """
    engine, data, passes, what = engine_of(client), M.datums(lists), [], f"{what}: "
    taken = card.seconds(lambda: passes.append(M.train_step(client, data)))
    rate = report.rate(f"{what}ours", sum(map(len, lists)), taken)
    flops = M.training_flops(engine.base.model.config, lists)
    share = flops / statistics.median(taken) / card.rate()
    report.number(f"{what}share of the bfloat16 rate", share, "", goal)
    report.number(f"{what}passes", passes[-1], "")
    report.number(f"{what}micro-batches", len(engine.scorer.batches(data)), "")
    peak = card.peak(lambda: M.train_step(client, data)) / GIB
    return rate, report.number(f"{what}peak", peak, "GiB")


def train(report: Report, card: Card) -> None:
    config, long, short = M.named(card, "0.6B"), card.pick(1024, 16), card.pick(512, 8)
    with M.connect(card, config) as client:
        for count, length in ((16, long), (card.pick(64, 4), long), (8, short)):
            goal, lists = GOALS["0.6B"] if count == 16 else None, M.sequences(count, length)
            step_rate(report, card, client, f"0.6B {count} x {length}", lists, goal)
        prompts, group, shared, own = card.pick((16, 8, 256, 256), (2, 2, 20, 4))
        name = f"0.6B {prompts} x {group} x ({shared} shared + {own})"
        step_rate(report, card, client, name, M.families(prompts, group, shared, own))
        large, small = M.datums(M.sequences(16, long)), M.datums(M.sequences(8, short))
        parts(report, card, client, large)
        for what, data in (("large", large), ("small", small)):
            profile(report, card, client, what, data, config.num_hidden_layers)


def parts(report: Report, card: Card, client: Any, data: Any) -> None:
    """What a step consists of: the loss, the optimizer, the reference."""
    plain, custom = (
        statistics.median(card.seconds(partial(M.train_step, client, data, loss), repeats=7))
        for loss in ("cross_entropy", cross_entropy)
    )
    report.number("custom loss / built-in loss, a step", custom / plain, "", ("<=", 1.03))
    adapter = adapter_of(client)
    client.forward_backward(data, "cross_entropy").result(M.SECONDS)
    grads = [g.clone() for g in adapter.grads]
    adapter.grads = None

    def optimize() -> None:
        adapter.accumulate(grads)  # a step takes them away
        client.optim_step(tinker.AdamParams(0.0)).result(M.SECONDS)

    report.number("accumulate and optim_step alone", card.milliseconds(optimize), "ms")
    taken = card.milliseconds(lambda: M.score(client, data))
    report.number("reference alone (forward, no graph)", taken, "ms")


def profile(report: Report, card: Card, client: Any, what: str, data: Any, layers: int) -> None:
    """Kernels and waits of a forward and backward."""
    counts, spent = card.profile(
        lambda: client.forward_backward(data, "cross_entropy").result(M.SECONDS)
    )
    adapter_of(client).grads = None
    report.number(f"{what} batch: device busy", counts["busy"], "share")
    report.number(f"{what} batch: calls that wait for the device", counts["waits"], "")
    if what == "small":  # one micro-batch: 4,096 tokens
        name = "kernels a layer, forward and backward, head included"
        report.number(name, counts["kernels"] / layers, "", ("<=", 150.0))
    for kernel, ms in spent.most_common(12):
        report.number(f"{what} batch: {kernel}", ms, f"ms of {spent.total():.1f}")


def larger(report: Report, card: Card) -> None:
    """16k tokens and a little decoding of 1.7B; of 8B where memory allows; 8B in 24 GB."""
    in_24 = "8B within 23 GiB, 2,048 tokens"  # a goal, no check
    for name, gigabytes, must, part in (
        ("1.7B", 0, True, one_size), ("8B", 40, True, one_size), (in_24, 23.5, False, eight_on_24),
    ):  # fmt: skip
        total = torch.cuda.mem_get_info()[1] / 1e9 if card.cuda else 100
        if total < gigabytes:
            report.note(f"{name}: skipped: {total:.0f} GB, {gigabytes} needed")
        else:
            report.attempt(name, partial(part, report, card, name), 25, must=must)


def one_size(report: Report, card: Card, name: str) -> None:
    count, length = card.pick((16, 1024), (2, 16))
    rows, prompt, new = card.pick((32, 128, 32), (2, 8, 4))
    with M.connect(card, M.named(card, name)) as client:
        lists = M.sequences(count, length)
        step_rate(report, card, client, f"{name} {count} x {length}", lists, GOALS[name])
        prompts, sampler = M.sequences(rows, prompt), sampler_of(client)
        taken = card.seconds(lambda: sample(sampler, prompts, new))
        report.rate(f"{name} decode, {rows} rows", rows * new, taken)


def eight_on_24(report: Report, card: Card, name: str) -> None:
    """8B with a bfloat16 base trains on 2,048 tokens in what a 24 GB card has for it."""
    limit = 23 * GIB  # 24,564 MiB less a context of CUDA and what the driver keeps
    data, trains = M.datums(M.sequences(2, card.pick(1024, 16))), 0.0
    known = {"total_bytes": lambda _: limit, "free_bytes": lambda _: limit - card.allocated()}
    try:
        with (
            card.within(limit),
            mock.patch.multiple(package, **known),
            M.connect(card, M.named(card, "8B")) as client,
        ):
            step = partial(M.train_step, client, data)
            report.number(f"{name}: peak", card.peak(step) / GIB, "GiB")
            report.number(f"{name}: a step", card.seconds(step), "s")
            trains = 1.0
    finally:
        report.number(f"{name}: trains", trains, "", (">=", 1.0))
