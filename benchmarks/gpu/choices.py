"""Section 7: one choice at a time, switched by one line, everything else equal."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from benchmarks.gpu.card import Card, changed
from benchmarks.gpu.decode import sample
from benchmarks.gpu.models import Side, connect, named, sequences
from benchmarks.gpu.report import NotHere, Report
from benchmarks.gpu.train import data_of, train_step
from cookbook_core.backend.local.scoring import packing, target_logprobs


def choices(report: Report, card: Card) -> None:
    with report.attempt("attention kernels", must=False):
        attention_kernels(report, card)
    on_bfloat16 = (micro_batches, lora_dtype, decode_graph, head_tiles)
    for dtype, compared in (("bfloat16", on_bfloat16), ("auto", (fused_layers,))):
        with connect(card, named(card, "0.6B"), dtype) as side:
            for compare in compared:
                if report.has_time(compare.__name__, card.pick(8, 0)):
                    with report.attempt(compare.__name__, must=False):
                        compare(report, card, side)


def batch(card: Card, side: Side) -> Any:
    return data_of(sequences(*card.pick((16, 1024), (4, 16)), side.config.vocab_size))


def micro_batches(report: Report, card: Card, side: Side) -> None:
    data = batch(card, side)
    for tokens in card.pick((2048, 4096, 8192, 16_384), (16, 64)):
        with changed(side.engine.scorer, "micro_batch_tokens", tokens):
            name = f"training step, micro-batches of {tokens} tokens"
            report.median(name, card.milliseconds(lambda: train_step(side, data)), "ms")
            peak = card.peak(lambda: train_step(side, data))
            report.number(f"{name}: peak", peak / 2**30, "GiB")


def lora_dtype(report: Report, card: Card, side: Side) -> None:
    """Products of the LoRA in the base's dtype, and in float32 as peft computes them."""
    layers = [m for m in side.engine.base.model.modules() if getattr(m, "lora_variant", None)]
    variants = [v for layer in layers for v in layer.lora_variant.values()]
    if not all(len(getattr(v, "factors", ())) == 2 for v in variants):
        raise NotHere("LoRA products in one dtype only, or a float32 base")
    data = batch(card, side)
    report.median(
        "training step, LoRA in bfloat16", card.milliseconds(lambda: train_step(side, data)), "ms"
    )
    with contextlib.ExitStack() as stack:
        for v in variants:
            stack.enter_context(changed(v, "factors", v.factors[:1]))
        for layer in layers:
            stack.enter_context(changed(layer, "cast_input_dtype_enabled", True))
        report.median(
            "training step, LoRA in float32",
            card.milliseconds(lambda: train_step(side, data)),
            "ms",
        )


def decode_graph(report: Report, card: Card, side: Side) -> None:
    """Decoding steps as captured graphs, and launched kernel by kernel."""
    from cookbook_core.backend.local.sampling import sampler as decoding

    prompts = sequences(card.pick(32, 2), card.pick(128, 8), side.config.vocab_size)
    sampler, new = side.sampler(), card.pick(64, 20)
    name = f"decode {len(prompts)} x {new}"
    with changed(decoding, "can_capture", lambda *_: False):
        taken = card.milliseconds(lambda: sample(sampler, prompts, new))
        report.median(f"{name}, kernel by kernel", taken, "ms")
    taken = card.milliseconds(lambda: sample(sampler, prompts, new))
    report.median(f"{name}, as chosen (in graphs on CUDA)", taken, "ms")


def head_tiles(report: Report, card: Card, side: Side) -> None:
    """Scoring without a graph, by the size of a tile of logits."""
    data = batch(card, side)
    for tile in ((2048, 8192), (4096, 8192), (4096, 16_384), (4096, 32_768)):
        with changed(target_logprobs, "TILE", dict.fromkeys(("cpu", "cuda"), tile)):
            name = f"scoring, tiles of {tile[0]} rows x {tile[1]} tokens"
            report.median(name, card.milliseconds(lambda: side.score(data)), "ms")


def fused_layers(report: Report, card: Card, side: Side) -> None:
    """Norms and SwiGLU by the kernels chosen at loading, and as transformers computes them."""
    fused = [m for m in side.engine.base.model.modules() if "forward" in vars(m)]
    if not fused:
        raise NotHere("no layer has a kernel of its own")
    data = batch(card, side)
    for kind, how in sorted({(type(m).__name__, m.forward.func.__qualname__) for m in fused}):
        report.note(f"{kind}: {how}")
    taken = card.milliseconds(lambda: train_step(side, data))
    report.median("training step, norms and SwiGLU as chosen", taken, "ms")
    for module in fused:
        del module.forward
    taken = card.milliseconds(lambda: train_step(side, data))
    report.median("training step, norms and SwiGLU as in transformers", taken, "ms")


def attention_kernels(report: Report, card: Card) -> None:
    """Forward and backward of one layer's attention over 16k tokens, by kernel."""
    try:
        from cookbook_core.backend.local.scoring import kernels
    except ImportError as error:
        raise NotHere("attention has no choice of kernels") from error
    total, heads, keys, width = card.pick((16_384, 16, 8, 128), (64, 4, 2, 16))
    q, k, v = (
        torch.randn(n, total, width, device=card.device, dtype=torch.bfloat16).requires_grad_()
        for n in (heads, keys, keys)
    )
    kind = kernels.Kind(card.device, q.dtype, heads, keys, width, width)
    for segments in (1, card.pick(64, 4)):
        layout = packing.lay_out(sequences(segments, total // segments, 1000))
        for name in kernels.candidates(kind):
            what = f"attention, {segments} segments, {name}"
            if obstacle := kernels.unmade_for(name, kind):
                report.skip(what, obstacle)
                continue
            with report.attempt(what, must=False):
                attend = kernels.KERNELS[name].attend

                def run(attend: Any = attend, layout: Any = layout) -> None:
                    out = attend(q, k, v, width**-0.5, layout, None, None)
                    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

                report.median(what, card.milliseconds(run), "ms")
