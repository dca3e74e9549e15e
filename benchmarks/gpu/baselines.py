"""Section 5: the same training step in a plain peft loop, and in TRL where it is installed."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks import trl_side, workloads
from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.models import build, connect, datums, named, plain_peft, sequences, train_step
from benchmarks.gpu.report import Report
from tests.oracles.logprobs import adapter_of


def baselines(report: Report, card: Card) -> None:
    config, lists = named(card, "0.6B"), sequences(*card.pick((16, 1024), (4, 16)))
    with connect(card, config) as client:
        adapter, data = adapter_of(client), datums(lists)
        taken = card.seconds(lambda: train_step(client, data))
        ours = report.number("ours", [sum(map(len, lists)) / t for t in taken], "tokens/s")
        peak = card.peak(lambda: train_step(client, data)) / GIB
        report.number("ours: peak", peak, "GiB")
    best = 0.0
    for checkpointing in (False, True):
        name = f"plain peft loop, checkpointing {'on' if checkpointing else 'off'}"
        if report.has_time(name, 15):
            model = plain_peft(card, config, adapter)
            rate, theirs = plain_loop(report, card, model, lists, checkpointing, name)
            best = max(best, rate)
            report.number(f"ours / {name}: peak", peak / theirs if theirs else 0.0, "")
            del model
    if best:
        report.number("ours / the faster plain peft loop", ours / best, "x", (">=", 2.0))
    if report.has_time("TRL", 40):
        with_trl(report, card, config, adapter, lists, ours, peak)


def plain_loop(
    report: Report, card: Card, model: Any, lists: Any, checkpointing: bool, name: str
) -> tuple[float, float]:
    """As trainers run it: bfloat16 autocast, SDPA, padded rows, float32 LoRA, fused AdamW.

    As many rows at a time as fit. Returns tokens a second and the peak in GiB.
    """
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=card.cuda)
    ids = torch.tensor(lists, device=card.device)
    rows = len(ids)

    def step() -> None:
        for part in ids.split(rows):
            with torch.autocast(card.device.type, torch.bfloat16, enabled=not card.smoke):
                mask = torch.ones_like(part)
                loss = model(input_ids=part, attention_mask=mask, labels=part, use_cache=False).loss
            (loss * len(part) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    while True:
        try:
            step()
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        optimizer.zero_grad()
        card.free()
    rate = report.number(name, [ids.numel() / t for t in card.seconds(step)], "tokens/s")
    report.note(f"{name}: {rows} of {len(ids)} rows at a time")
    peak = card.peak(step) / GIB
    report.number(f"{name}: peak", peak, "GiB")
    return rate, peak


def with_trl(
    report: Report, card: Card, config: Any, adapter: Any, lists: Any, ours: float, peak: float
) -> None:
    """TRL's SFTTrainer on the same ids, with its checkpointing, where it is installed."""
    try:
        import datasets
        import trl
    except ImportError as error:
        report.note(f"TRL: skipped: not installed ({error.name})")
        return
    rows = card.pick(8, 2)
    options = trl_side.arguments(
        argparse.Namespace(steps=6, warmup=2),
        output_dir=str(card.folder / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(lists) // rows,
        gradient_checkpointing=True,
        bf16=card.cuda,
        use_cpu=not card.cuda,
    )
    trainer = trl.SFTTrainer(
        model=build(config, card.device, card.pick(torch.bfloat16, torch.float32)),
        peft_config=adapter.slot.config,
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"input_ids": lists}),
        processing_class=workloads.tokenizer(config.vocab_size),
    )
    taken: list[float] = []
    most = card.peak(lambda: taken.extend(trl_side.step_seconds(trainer, card.sync))) / GIB
    rates, name = [sum(map(len, lists)) / t for t in taken[2:]], f"TRL {trl.__version__}"
    report.number(f"{name}: peak", most, "GiB")
    report.number("ours / TRL", ours / report.number(name, rates, "tokens/s"), "x", (">=", 2.5))
    report.number("ours / TRL: peak", peak / most if most else 0.0, "", ("<=", 0.5))
