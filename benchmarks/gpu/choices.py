"""Section 7: one choice at a time, switched by one line, everything else equal."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.gpu import models as M
from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.decode import sample, sampler_of
from benchmarks.gpu.report import Report
from cookbook_core.backend.local.sampling import sampler as sampling
from cookbook_core.backend.local.scoring import kernels, packing, target_logprobs
from tests.oracles.logprobs import engine_of

import torch


def choices(report: Report, card: Card) -> None:
    report.attempt("attention kernels", lambda: attention_kernels(report, card), must=False)
    on_bfloat16 = (micro_batches, lora_dtype, decode_graph, head_tiles)
    for dtype, compared in (("bfloat16", on_bfloat16), ("auto", (fused_layers,))):
        with M.connect(card, M.named(card, "0.6B"), dtype) as client:
            data = M.datums(M.sequences(*card.pick((16, 1024), (4, 16))))
            for compare in compared:
                run = partial(compare, report, card, client, data)
                report.attempt(compare.__name__, run, 8, must=False)


def step(report: Report, card: Card, client: Any, data: Any, how: str) -> None:
    taken = card.milliseconds(lambda: M.train_step(client, data))
    report.number(f"training step, {how}", taken, "ms")


def micro_batches(report: Report, card: Card, client: Any, data: Any) -> None:
    for tokens in card.pick((2048, 4096, 8192, 16_384), (16, 64)):
        with mock.patch.object(engine_of(client).scorer, "micro_batch_tokens", tokens):
            how = f"micro-batches of {tokens} tokens"
            step(report, card, client, data, how)
            peak = card.peak(lambda: M.train_step(client, data)) / GIB
            report.number(f"training step, {how}: peak", peak, "GiB")


def lora_dtype(report: Report, card: Card, client: Any, data: Any) -> None:
    """Products of the LoRA in the base's dtype, and in float32 as peft computes them."""
    modules = engine_of(client).base.model.modules()
    layers = [m for m in modules if getattr(m, "lora_variant", None)]
    step(report, card, client, data, "LoRA in bfloat16")
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(mock.patch.object(layer, "cast_input_dtype_enabled", True))
            for variant in layer.lora_variant.values():
                in_float32, _ = variant.factors
                stack.enter_context(mock.patch.object(variant, "factors", [in_float32]))
        step(report, card, client, data, "LoRA in float32")


def decode_graph(report: Report, card: Card, client: Any, _: Any) -> None:
    """Decoding steps as captured graphs, and launched kernel by kernel."""
    prompts = M.sequences(*card.pick((32, 128), (2, 8)))
    sampler, new = sampler_of(client), card.pick(64, 20)
    for how, captures in (
        ("kernel by kernel", lambda *_: False),
        ("as chosen (in graphs on CUDA)", sampling.can_capture),
    ):
        with mock.patch.object(sampling, "can_capture", captures):
            taken = card.milliseconds(lambda: sample(sampler, prompts, new))
        report.number(f"decode {len(prompts)} x {new}, {how}", taken, "ms")


def head_tiles(report: Report, card: Card, client: Any, data: Any) -> None:
    """Scoring without a graph, by the size of a tile of logits."""
    for tile in ((2048, 8192), (4096, 8192), (4096, 16_384), (4096, 32_768)):
        with mock.patch.object(target_logprobs, "TILE", {"cpu": tile, "cuda": tile}):
            taken = card.milliseconds(lambda: M.score(client, data))
            report.number(f"scoring, tiles of {tile[0]} rows x {tile[1]} tokens", taken, "ms")


def fused_layers(report: Report, card: Card, client: Any, data: Any) -> None:
    """Norms and SwiGLU by the kernels chosen at loading, and as transformers computes them."""
    fused = [m for m in engine_of(client).base.model.modules() if "forward" in vars(m)]
    for kind, how in sorted({(type(m).__name__, m.forward.func.__qualname__) for m in fused}):
        report.note(f"{kind}: {how}")
    step(report, card, client, data, "norms and SwiGLU as chosen")
    for module in fused:
        del module.forward
    step(report, card, client, data, "norms and SwiGLU as in transformers")


def attention_kernels(report: Report, card: Card) -> None:
    """Forward and backward of one layer's attention over 16k tokens, by kernel."""
    total, heads, keys, width = card.pick((16_384, 16, 8, 128), (64, 4, 2, 16))
    q, k, v = (
        torch.randn(n, total, width, device=card.device, dtype=torch.bfloat16).requires_grad_()
        for n in (heads, keys, keys)
    )
    kind = kernels.Kind(card.device, q.dtype, heads, keys, width, width)
    for segments in (1, card.pick(64, 4)):
        layout = packing.lay_out(M.sequences(segments, total // segments))
        for name in kernels.candidates(kind):

            def run(name: str = name, layout: Any = layout) -> None:
                out = kernels.KERNELS[name].attend(q, k, v, width**-0.5, layout, None, None)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

            what = f"attention, {segments} segments, {name}"
            if obstacle := kernels.unmade_for(name, kind):
                report.note(f"{what}: skipped: {obstacle}")
            elif taken := report.attempt(what, lambda run=run: card.milliseconds(run), must=False):
                report.number(what, taken, "ms")
