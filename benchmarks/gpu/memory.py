"""Section 2: memory of graphs against the estimate, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.decode import sample, sampler_of
from benchmarks.gpu.models import (
    SECONDS, connect, datums, error, gradient, named, sequences, train_step,
)  # fmt: skip
from benchmarks.gpu.report import Report
from cookbook_core.backend.local.model import memory as package
from cookbook_core.backend.local.scoring import flex, packing
from cookbook_core.builtin_losses import cross_entropy
from tests.oracles.logprobs import adapter_of, engine_of


def memory(report: Report, card: Card) -> None:
    for name in ("0.6B", "1.7B"):
        with connect(card, named(card, name)) as client:
            with report.attempt(f"{name}: bytes a token"):
                graph_bytes(report, card, client, name)
            if name == "0.6B":
                with report.attempt("out of memory in training"):
                    training_runs_out(report, card, client)
                with report.attempt("out of memory in sampling"):
                    sampling_runs_out(report, card, client)
    with report.attempt("block mask"):
        block_mask(report, card)


def graph_bytes(report: Report, card: Card, client: Any, name: str) -> None:
    """Bytes a token of graph, by what is allocated while a batch of 1,024 tokens is kept."""
    tokens, engine, adapter = card.pick(1024, 32), engine_of(client), adapter_of(client)
    data = datums(sequences(2, tokens // 2))
    client.forward_backward(data, "cross_entropy").result(SECONDS)
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


@contextlib.contextmanager
def a_third(card: Card, client: Any, peak: int) -> Iterator[None]:
    """Inside, only a third of the memory that the work took beyond the model is left.

    On the CPU, which has no limit, micro-batches of more than 40 tokens fail instead.
    """
    scorer = engine_of(client).scorer
    score_batch = scorer.score_batch

    def refuse_large(batch: Any) -> Any:
        if batch.tokens > 40:
            raise torch.OutOfMemoryError("a stand-in on a device without a limit")
        return score_batch(batch)

    held = card.allocated()
    limit = card.within(held + int(0.33 * (peak - held)))
    with limit if card.own else mock.patch.object(scorer, "score_batch", refuse_large):
        yield


def training_runs_out(report: Report, card: Card, client: Any) -> None:
    """With a third of the memory it takes, a batch goes through in pieces, to the same gradient."""
    length = card.pick(512, 16)
    data = datums(sequences(16, length))

    def step() -> torch.Tensor:
        client.forward_backward_custom(data, cross_entropy).result(SECONDS)
        return gradient(client)

    want, peak = step(), card.peak(step)
    report.number(f"training step of {16 * length} tokens, peak", peak / GIB, "GiB")
    with a_third(card, client, peak):
        off = error(step(), want)
        limits = engine_of(client).limits.limits(length)
    report.number("a third of it: tokens of a micro-batch", limits.micro_batch_tokens, "tokens")
    report.number("a third of it: tokens of kept graphs", limits.graph_tokens, "tokens")
    report.at_most("a third of it: gradient, relative error", off, 0.01)


def sampling_runs_out(report: Report, card: Card, client: Any) -> None:
    """With a third of the memory it takes, the same completions come in more than one wave."""
    if not card.own:
        report.note("out of memory in sampling: skipped: no limit of memory on this device")
        return
    rows, length, new = card.pick((256, 256, 32), (8, 16, 4))
    prompts, sampler = sequences(rows, length), sampler_of(client)
    want = sample(sampler, prompts, new)
    peak = card.peak(lambda: sample(sampler, prompts, new))
    report.number(f"sampling {rows} rows of {length + new} tokens, peak", peak / GIB, "GiB")
    with a_third(card, client, peak):
        found = sample(sampler, prompts, new)
    same = sum(a.tokens == b.tokens for a, b in zip(want, found, strict=True))
    report.number("a third of it: rows with the same tokens", same / rows, "share")
    whole = all(len(s.tokens) == new for s in found)
    report.check("a third of it: every row has its tokens", whole)


def block_mask(report: Report, card: Card) -> None:
    """Memory that making the block mask of a row of 16k tokens takes."""
    layout = packing.lay_out(sequences(16, card.pick(1024, 16)))
    for window in (None, card.pick(4096, 8)):
        before = card.allocated()
        peak = card.peak(lambda window=window: flex.block_mask(layout, window, card.device))
        name = f"block mask, {len(layout.tokens)} tokens, window {window}: peak"
        report.number(name, max(peak - before, 0) / 2**20, "MiB")


def eight_on_24(report: Report, card: Card, name: str) -> None:
    """8B with a bfloat16 base trains on 2,048 tokens in what a 24 GB card has for it."""
    limit = 23 * GIB  # 24,564 MiB less a context of CUDA and what the driver keeps
    data, trains = datums(sequences(2, card.pick(1024, 16))), 0.0
    try:
        with (
            card.within(limit),
            mock.patch.object(package, "total_bytes", lambda _: limit),
            mock.patch.object(package, "free_bytes", lambda _: limit - card.allocated()),
            connect(card, named(card, "8B")) as client,
        ):
            peak = card.peak(lambda: train_step(client, data))
            report.number(f"{name}: peak", peak / GIB, "GiB")
            report.number(f"{name}: a step", card.seconds(lambda: train_step(client, data)), "s")
            trains = 1.0
    finally:
        report.number(f"{name}: trains", trains, "", (">=", 1.0))
