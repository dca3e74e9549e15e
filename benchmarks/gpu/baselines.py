"""Section 5: the same training step in a plain peft loop, and in TRL where it is installed."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from benchmarks import trl_side, workloads
from benchmarks.gpu import models as M
from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.report import Report
from benchmarks.gpu.train import step_rate
from tests.oracles.logprobs import adapter_of

import torch


def baselines(report: Report, card: Card) -> None:
    config, lists = M.named(card, "0.6B"), M.sequences(*card.pick((16, 1024), (4, 16)))
    with M.connect(card, config) as client:
        adapter = adapter_of(client)
        ours, peak = step_rate(report, card, client, "0.6B", lists)
    loops = []
    for how in ("off", "on"):
        name = f"plain peft loop, checkpointing {how}"
        run = partial(plain_loop, report, card, config, adapter, lists, name)
        if found := report.attempt(name, run, 15, must=False):
            loops.append(found[0])
            report.number(f"ours / {name}: peak", peak / (found[1] or 1.0), "")
    if loops:
        report.number("ours / the faster plain peft loop", ours / max(loops), "x", (">=", 2.0))
    run = partial(with_trl, report, card, config, adapter, lists, ours, peak)
    report.attempt("TRL", run, 40, must=False)


def plain_loop(
    report: Report, card: Card, config: Any, adapter: Any, lists: Any, name: str
) -> tuple[float, float]:
    """As trainers run it: bfloat16 autocast, SDPA, padded rows, float32 LoRA, fused AdamW.

    As many rows at a time as fit. Returns tokens a second and the peak in GiB.
    """
    model = M.plain_peft(card, config, adapter).train()
    if name.endswith("on"):
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
    report.note(f"{name}: {rows} of {len(ids)} rows at a time")
    rate = report.rate(name, ids.numel(), card.seconds(step))
    return rate, report.number(f"{name}: peak", card.peak(step) / GIB, "GiB")


def with_trl(
    report: Report, card: Card, config: Any, adapter: Any, lists: Any, ours: float, peak: float
) -> None:
    """TRL's SFTTrainer on the same ids, with its checkpointing, where it is installed."""
    import datasets
    import trl

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
        model=M.build(config, card.device, card.pick(torch.bfloat16, torch.float32)),
        peft_config=adapter.slot.config,
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"input_ids": lists}),
        processing_class=workloads.tokenizer(config.vocab_size),
    )
    taken: list[float] = []
    most = card.peak(lambda: taken.extend(trl_side.step_seconds(trainer, card.sync))) / GIB
    theirs = report.rate(f"TRL {trl.__version__}", sum(map(len, lists)), taken[2:])
    report.number(f"TRL {trl.__version__}: peak", most, "GiB")
    report.number("ours / TRL", ours / theirs, "x", (">=", 2.5))
    report.number("ours / TRL: peak", peak / (most or 1.0), "", ("<=", 0.5))
