"""Section 2: memory of graphs against the estimate, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.correct import error
from benchmarks.gpu.decode import sample
from benchmarks.gpu.models import (
    SECONDS,
    Side,
    connect,
    datum,
    named,
    own_cross_entropy,
    sequences,
)
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.backend.local.model import memory as estimates
from cookbook_core.backend.local.scoring import attention, packing

GIB = 2**30


def memory(report: Report, card: Card) -> None:
    for name in ("0.6B", "1.7B"):
        with connect(card, named(card, name)) as side:
            with report.attempt(f"{name}: bytes a token"):
                graph_bytes(report, card, side, name)
            if name == "0.6B":
                with report.attempt("out of memory in training"):
                    training_runs_out(report, card, side)
                with report.attempt("out of memory in sampling"):
                    sampling_runs_out(report, card, side)
    with report.attempt("block mask"):
        block_mask(report, card)


def graph_bytes(report: Report, card: Card, side: Side, name: str) -> None:
    """Bytes a token of graph, by what is allocated while a batch of 1,024 tokens is kept."""
    tokens = card.pick(1024, 32)
    data = [datum(ids) for ids in sequences(2, tokens // 2, side.config.vocab_size)]
    side.client.forward_backward(data, "cross_entropy").result(SECONDS)
    card.free()
    before = card.allocated()
    with side.engine.score_with_graph(side.adapter, data) as scored:
        kept = card.allocated() - before
        report.check(f"{name}: the graph is kept", scored.passes == 1, scored.passes, 1)
        del scored
    side.adapter.grads = None
    measured = report.number(f"{name}: graph, measured", kept / tokens, "bytes a token")
    if hasattr(estimates, "estimate_graph_bytes"):
        estimate = estimates.estimate_graph_bytes(side.engine.base.model).whole
        own = side.engine.limits.graph_bytes(list(side.adapter.slot.params.values())).whole
        report.number(f"{name}: graph, as the package counted it", own, "bytes a token")
    else:
        estimate = estimates.graph_bytes_per_token(side.engine.base)
    report.number(f"{name}: graph, estimated", estimate, "bytes a token")
    report.number(f"{name}: estimate / measured", estimate / measured if measured else 0.0, "")


@contextlib.contextmanager
def running_out(card: Card, side: Side, share: float, peak: int) -> Iterator[None]:
    """Inside, only `share` of the memory that the work took beyond the model is left.

    On a device without a limit, micro-batches of more than 40 tokens fail instead.
    """
    if card.own:
        held = card.allocated()
        with card.within(held + int(share * (peak - held)), known=False):
            yield
        return
    scorer = side.engine.scorer
    score = scorer.score_batch

    def score_batch(batch: Any) -> Any:
        if batch.tokens > 40:
            raise torch.OutOfMemoryError("a stand-in on a device without a limit")
        return score(batch)

    with mock.patch.object(scorer, "score_batch", score_batch):
        yield


def training_runs_out(report: Report, card: Card, side: Side) -> None:
    """With a third of the memory it takes, a batch goes through in pieces, to the same gradient."""
    length = card.pick(512, 16)
    data = [datum(ids) for ids in sequences(16, length, side.config.vocab_size)]

    def step() -> torch.Tensor:
        side.client.forward_backward_custom(data, own_cross_entropy).result(SECONDS)
        return side.gradient()

    want = step()
    peak = card.peak(step)
    report.number(f"training step of {16 * length} tokens, peak", peak / GIB, "GiB")
    with running_out(card, side, 0.33, peak):
        off = error(step(), want)
        limits = side.engine.limits.limits(length)
        report.number("a third of it: tokens of a micro-batch", limits.micro_batch_tokens, "tokens")
        report.number("a third of it: tokens of kept graphs", limits.graph_tokens, "tokens")
    report.at_most("a third of it: gradient, relative error", off, 0.01)


def sampling_runs_out(report: Report, card: Card, side: Side) -> None:
    """With a third of the memory it takes, the same completions come in more than one wave."""
    if not card.own:
        report.skip("out of memory in sampling", "no limit of memory on this device")
        return
    rows, length, new = card.pick((256, 256, 32), (8, 16, 4))
    prompts, sampler = sequences(rows, length, side.config.vocab_size), side.sampler()
    want = sample(sampler, prompts, new)
    peak = card.peak(lambda: sample(sampler, prompts, new))
    report.number(f"sampling {rows} rows of {length + new} tokens, peak", peak / GIB, "GiB")
    with running_out(card, side, 0.33, peak):
        found = sample(sampler, prompts, new)
    same = sum(a.tokens == b.tokens for a, b in zip(want, found, strict=True))
    report.number("a third of it: rows with the same tokens", same / len(prompts), "share")
    report.check(
        "a third of it: every row has its tokens", all(len(s.tokens) == new for s in found)
    )


def block_mask(report: Report, card: Card) -> None:
    """Memory that making the block mask of a row of 16k tokens takes."""
    try:
        from cookbook_core.backend.local.scoring.flex import block_mask as make
    except ImportError:
        make = attention._block_mask  # before there was a choice of kernels
    ids = sequences(16, card.pick(1024, 16), 1000)
    for window in (None, card.pick(4096, 8)):
        layout = packing.lay_out(ids)
        before = card.allocated()
        peak = card.peak(lambda lay=layout, w=window: make(lay, w, card.device))
        name = f"block mask, {len(layout.tokens)} tokens, window {window}: peak"
        report.number(name, max(peak - before, 0) / 2**20, "MiB")


def eight_on_24(report: Report, card: Card) -> None:
    """8B with a bfloat16 base trains on 2,048 tokens in what a 24 GB card has for it."""
    limit = 23 * GIB  # 24,564 MiB less a context of CUDA and what the driver keeps
    config, name, trains = named(card, "8B"), "8B within 23 GiB, 2,048 tokens", 0.0
    try:
        with card.within(limit, known=True), connect(card, config) as side:
            data = [datum(ids) for ids in sequences(2, card.pick(1024, 16), config.vocab_size)]

            def step() -> None:
                side.client.forward_backward(data, "cross_entropy").result(SECONDS)
                side.client.optim_step(tinker.AdamParams(1e-5)).result(SECONDS)

            report.number(f"{name}: peak", card.peak(step) / GIB, "GiB")
            report.median(f"{name}: a step", card.seconds(step), "s")
            trains = 1.0
    finally:
        report.number(f"{name}: trains", trains, "", (">=", 1.0))
