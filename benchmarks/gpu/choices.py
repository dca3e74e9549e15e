"""Section 7: one choice at a time, switched by one line, everything else equal."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.card import Card, changed
from benchmarks.gpu.models import SECONDS, Side, connect, named, sequences
from benchmarks.gpu.report import NotHere, Report
from benchmarks.gpu.train import data_of, plain_step
from cookbook_core.backend.local.scoring import attention, packing, target_logprobs


def choices(report: Report, card: Card) -> None:
    config = named(card, "0.6B")
    with connect(card, config) as side:
        for compare in (micro_batches, heads):
            with report.attempt(compare.__name__, must=False):
                compare(report, card, side)
    with report.attempt("attention kernels", must=False):
        attention_kernels(report, card)


def milliseconds(report: Report, card: Card, name: str, run: Callable[[], Any]) -> None:
    taken = [t * 1e3 for t in card.seconds(run)]
    report.number(name, statistics.median(taken), "ms", None, taken)


def micro_batches(report: Report, card: Card, side: Side) -> None:
    data = data_of(sequences(*card.pick((16, 1024), (4, 16)), side.config.vocab_size))
    for tokens in card.pick((2048, 4096, 8192, 16_384), (16, 64)):
        with changed(side.engine.scorer, "micro_batch_tokens", tokens):
            name = f"step of {16 * 1024} tokens, micro-batches of {tokens}"
            milliseconds(report, card, name, lambda: plain_step(side, data))
            side.client.forward_backward(data, "cross_entropy").result(SECONDS)
            peak = card.peak(lambda: plain_step(side, data))
            report.number(f"{name}: peak", peak / 2**30, "GiB")


def heads(report: Report, card: Card, side: Side) -> None:
    """Target logprobs of 4,096 rows and their gradient, by the size of a tile."""
    rows, width = card.pick(4096, 32), side.config.hidden_size
    weight = side.engine.scorer.head.module.weight
    hidden = torch.randn(rows, width, device=card.device).to(weight.dtype).requires_grad_()
    targets = torch.randint(len(weight), (rows, 1), device=card.device)

    def run() -> None:
        scored = target_logprobs.target_logprobs(side.engine.scorer.head, hidden, targets)
        torch.autograd.grad(scored.sum(), hidden)

    own = dict(target_logprobs.TILE)
    for tile in ((2048, 8192), (4096, 8192), (4096, 16_384), (4096, 32_768)):
        with changed(target_logprobs, "TILE", {**own, "cuda": tile, "cpu": tile}):
            milliseconds(report, card, f"head, {rows} rows, tiles of {tile[0]} x {tile[1]}", run)


def attention_kernels(report: Report, card: Card) -> None:
    """Forward and backward of a row of 16k tokens in 1 and in 64 segments."""
    total, dtype = card.pick(16_384, 64), torch.bfloat16
    q, k, v = (
        torch.randn(
            1, n, total, card.pick(128, 16), device=card.device, dtype=dtype
        ).requires_grad_()
        for n in (card.pick(16, 4), card.pick(8, 2), card.pick(8, 2))
    )
    for segments in (1, card.pick(64, 4)):
        layout = packing.lay_out(sequences(segments, total // segments, 1000))
        for name, kernel in kernels_of_version().items():

            def run(kernel: Any = kernel, layout: Any = layout) -> None:
                if kernel is None:
                    raise NotHere
                out = kernel(q, k, v, layout)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

            with report.attempt(f"attention, {name}", must=False):
                milliseconds(report, card, f"attention, {segments} segments, {name}", run)


def kernels_of_version() -> dict[str, Any]:
    """The kernels that this version has, as functions of q, k, v and the layout."""

    def chosen(q: Any, k: Any, v: Any, layout: Any) -> Any:
        return attention.packed_attention(None, q, k, v, None, layout=layout)[0]

    return {"as chosen": chosen}
