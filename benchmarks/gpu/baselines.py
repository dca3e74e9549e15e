"""Section 5: the same training step in a plain peft loop, and in TRL where it is installed."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import peft
import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.memory import GIB
from benchmarks.gpu.models import RANK, build, connect, named, sequences
from benchmarks.gpu.report import Report
from benchmarks.gpu.train import data_of, train_step


def baselines(report: Report, card: Card) -> None:
    config = named(card, "0.6B")
    lists = sequences(*card.pick((16, 1024), (4, 16)), config.vocab_size)
    tokens = sum(map(len, lists))
    with connect(card, config) as side:
        data = data_of(lists)
        taken = card.seconds(lambda: train_step(side, data))
        ours = report.number("ours", tokens / statistics.median(taken), "tokens/s")
        peak = report.number("ours: peak", card.peak(lambda: train_step(side, data)) / GIB, "GiB")
    best = 0.0
    for checkpointing in (False, True):
        name = f"plain peft loop, checkpointing {'on' if checkpointing else 'off'}"
        if report.has_time(name, card.pick(15, 0)):
            rate, theirs = plain_loop(report, card, config, lists, checkpointing, name)
            best = max(best, rate)
            report.number(f"ours / {name}: peak", peak / theirs if theirs else 0.0, "")
    if best:
        goal = (">=", 2.0)
        report.number("ours / the faster plain peft loop", ours / best, "x", goal)
    with_trl(report, card, config, lists, ours, peak)


def plain_loop(
    report: Report, card: Card, config: Any, lists: Any, checkpointing: bool, name: str
) -> tuple[float, float]:
    """As trainers run it: bfloat16 autocast, SDPA, padded rows, float32 LoRA, fused AdamW.

    As many rows at a time as fit. Returns tokens a second and the peak in GiB.
    """
    dtype = torch.float32 if card.smoke else torch.bfloat16
    base = build(config, card.device, dtype)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
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
    rates = [ids.numel() / t for t in card.seconds(step)]
    rate = report.median(name, rates, "tokens/s")
    report.note(f"{name}: {rows} of {len(ids)} rows at a time")
    return rate, report.number(f"{name}: peak", card.peak(step) / GIB, "GiB")


def with_trl(report: Report, card: Card, config: Any, lists: Any, ours: float, peak: float) -> None:
    """TRL's SFTTrainer on the same ids, its defaults but for the batch; where it is installed."""
    try:
        import datasets
        import trl
        from transformers import PreTrainedTokenizerFast, TrainerCallback
    except ImportError as error:
        report.skip("TRL", f"not installed ({error.name})")
        return
    if not report.has_time("TRL", card.pick(40, 0)):
        return
    from tokenizers import Tokenizer, models

    words = {str(i): i for i in range(config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            card.sync()
            ends.append(time.perf_counter())

    steps, rows = 8, card.pick(8, 2)
    options = trl.SFTConfig(
        output_dir=str(card.folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(lists) // rows,
        bf16=card.cuda,
        use_cpu=not card.cuda,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=build(config, card.device, torch.bfloat16 if card.cuda else torch.float32),
        args=options,
        train_dataset=datasets.Dataset.from_dict({"input_ids": lists}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="1", pad_token="0", unk_token="0"
        ),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    most = card.peak(trainer.train) / GIB
    taken = [b - a for a, b in itertools.pairwise(ends)][2:]
    rate = sum(map(len, lists)) / statistics.median(taken)
    report.number(f"TRL {trl.__version__}", rate, "tokens/s")
    report.number(f"TRL {trl.__version__}: peak", most, "GiB")
    report.number("ours / TRL", ours / rate, "x", (">=", 2.5))
    goal = ("<=", 0.5)
    report.number("ours / TRL: peak", peak / most if most else 0.0, "", goal)
