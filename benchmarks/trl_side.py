"""TRL's side of `benchmarks.versus_trl`: one workload, one JSON line.

    python -m benchmarks.trl_side --workload dpo --model small [--compact]

A step is the time between two calls of `on_step_end`: collating, generation (GRPO), forward,
backward, clipping, AdamW. With --compact TRL skips unsupervised positions in the unembedding on the
CPU, as it does on CUDA; stock TRL projects all of them there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import workloads as W


def arguments(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Trainer arguments: float32, no checkpointing, no schedule, data in our order."""
    return {
        "output_dir": "runs/benchmarks/trl",
        "max_steps": options.steps + options.warmup,
        "learning_rate": W.LEARNING_RATE,
        "weight_decay": 0.0,
        "max_grad_norm": W.CLIP,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def make_trainer(options: argparse.Namespace) -> Any:
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    steps, workload = options.steps + options.warmup, options.workload
    folder = W.build_model(options.model)
    sequence_classes = workload == "reward"
    load = (
        transformers.AutoModelForSequenceClassification
        if sequence_classes
        else transformers.AutoModelForCausalLM
    )
    labels = {"num_labels": 1} if sequence_classes else {}
    common = {
        "model": load.from_pretrained(folder, dtype=torch.float32, **labels),
        "processing_class": transformers.AutoTokenizer.from_pretrained(folder),
        "peft_config": peft.LoraConfig(
            task_type="SEQ_CLS" if sequence_classes else "CAUSAL_LM",
            r=W.LORA_RANK,
            lora_alpha=W.LORA_ALPHA,
            target_modules=W.TARGETS,
            modules_to_save=["score"] if sequence_classes else None,
        ),
    }
    if workload.startswith("sft"):
        masked = workload == "sft_completion"
        rows = [s for batch in W.sft(options.model, steps, prompts=masked) for s in batch]
        columns = {"input_ids": [s.prompt + s.completion for s in rows]}
        if masked:
            columns["completion_mask"] = [
                [0] * len(s.prompt) + [1] * len(s.completion) for s in rows
            ]
        more = {"train_sampling_strategy": "sequential", "completion_only_loss": masked}
        config = trl.SFTConfig(**arguments(options, per_device_train_batch_size=8, **more))
        return trl.SFTTrainer(args=config, train_dataset=Dataset.from_dict(columns), **common)
    if workload in ("dpo", "reward"):
        rows = [pair for batch in W.pairs(options.model, steps) for pair in batch]
        more = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}
        if workload == "reward":
            data = Dataset.from_dict(
                {
                    "chosen_ids": [c.prompt + c.completion for c, _ in rows],
                    "rejected_ids": [r.prompt + r.completion for _, r in rows],
                }
            )
            config = trl.RewardConfig(**arguments(options, **more))
            return trl.RewardTrainer(args=config, train_dataset=data, **common)
        data = Dataset.from_dict(  # DPO takes no token ids; these words encode to exactly ours
            {
                "prompt": [W.text_of(c.prompt) for c, _ in rows],
                "chosen": [" " + W.text_of(c.completion) for c, _ in rows],
                "rejected": [" " + W.text_of(r.completion) for _, r in rows],
            }
        )
        config = trl.DPOConfig(**arguments(options, beta=W.BETA, **more))
        trainer = trl.DPOTrainer(args=config, train_dataset=data, **common)
        for ours, theirs in zip(rows, trainer.train_dataset, strict=True):
            ids = [theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
            assert ids == [ours[0].prompt, ours[0].completion, ours[1].completion]
        return trainer
    count, group_size, _ = W.GRPO[workload]
    texts = [W.text_of(p) for batch in W.prompts(options.model, steps, workload) for p in batch]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [W.reward(ids) for ids in completion_ids]

    config = trl.GRPOConfig(
        **arguments(
            options,
            per_device_train_batch_size=count * group_size,
            num_generations=group_size,
            max_completion_length=W.NEW_TOKENS,
            beta=W.KL_COEF,
            temperature=1.0,
            shuffle_dataset=False,
            use_vllm=False,
        )
    )
    data = Dataset.from_dict({"prompt": texts})
    return trl.GRPOTrainer(reward_funcs=reward, args=config, train_dataset=data, **common)


def step_seconds(trainer: Any, sync: Callable[[], Any] = lambda: None) -> list[float]:
    """Train; return the seconds of each step. `sync` waits for the device."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            sync()
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import PrinterCallback

    datasets.disable_progress_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.compact:
        import trl.trainer.utils as trainer_utils

        trainer_utils._use_triton = lambda device: True  # TRL skips rows if this is true
    trainer = make_trainer(options)
    trainer.remove_callback(PrinterCallback)
    losses, generated = [], []
    one_step = trainer.training_step

    def training_step(*args: Any, **more: Any) -> Any:
        loss = one_step(*args, **more)
        losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    if options.workload.startswith("grpo"):
        generate = trainer._generate_single_turn

        def timed(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            made = generate(*args, **more)
            generated.append(time.perf_counter() - began)
            return made

        trainer._generate_single_turn = timed
    seconds = step_seconds(trainer)[options.warmup :]
    assert len(seconds) == options.steps
    return {
        "seconds": seconds,
        "generate_s": generated[options.warmup :] or [0.0] * len(seconds),
        "losses": losses,
        "peak_mb": W.peak_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=W.WORKLOADS, required=True)
    parser.add_argument("--model", choices=sorted(W.MODELS), required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compact", action="store_true")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        report = run(options)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
