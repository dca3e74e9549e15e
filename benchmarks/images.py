"""Training steps on pictures: with kept features against without, and against TRL's SFT.

    pip install -e ".[bench]"
    python -m benchmarks.images

Random Qwen3-VLs in float32 on the CPU, LoRA rank 16 on the language model, steps of eight rows: one
picture, 16 tokens of prompt, 16 of completion. TRL gets the processor without its part for video,
which needs torchvision. Both sides take steps by turns in one process: on pictures of their own, on
one picture for every four rows, and both again in the second epoch, when our side has the features.
The losses of the first three steps must agree to 1e-3.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import workloads as W
from benchmarks.our_side import ADAM
from benchmarks.trl_side import arguments
from cookbook_core import datum_from_prompt_completion, tinker
from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.images import load_processor
from cookbook_core.types import LoraConfig

import numpy as np
import torch
from PIL import Image

TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
NAMES = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
TOWERS = {"kept": (384, 4), "trl": (256, 2)}  # width and depth
ROWS, PROMPT, ANSWER, SIZE = 8, 16, 16, 192
Row = tuple[bytes, list[int], list[int]]


def build(name: str) -> str:
    """Write a random Qwen3-VL over the text model `small`; return its folder."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder = Path("runs/benchmarks/models") / f"images-{name}"
    tokenizer = W.tokenizer(W.MODELS["small"]["vocab_size"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
    text = {**W.MODELS["small"], "vocab_size": len(tokenizer), "intermediate_size": 768}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"rope_parameters": rope, "pad_token_id": W.PAD, "eos_token_id": W.END}
    wide, depth = TOWERS[name]
    vision = {"hidden_size": wide, "depth": depth, "intermediate_size": 4 * wide}
    vision |= {"num_heads": wide // 64, "out_hidden_size": text["hidden_size"]}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    parts = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = Qwen3VLConfig(**parts, **dict(zip(NAMES, ids, strict=True)))
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reads = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(reads), encoding="utf-8")
    return str(folder)


def draw(count: int, share: int = 1) -> list[Row]:
    """Pictures as PNG files, each with `share` prompts and completions."""
    rng, pixels, rows = random.Random(0), np.random.RandomState(0), []
    for i in range(count):
        if i % share == 0:
            file = io.BytesIO()
            blocks = Image.fromarray(pixels.randint(0, 256, (12, 12, 3)).astype(np.uint8))
            blocks.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "PNG")
        ids = W.draw(rng, PROMPT + ANSWER - 1, W.MODELS["small"]["vocab_size"])
        rows.append((file.getvalue(), ids[:PROMPT], [*ids[PROMPT:], W.END]))
    return rows


class Ours:
    """`step(k)` trains on rows ROWS * k to ROWS * (k + 1)."""

    def __init__(self, folder: str, rows: list[Row]) -> None:
        self.engine = Engine(load_base_model(folder, "cpu", "float32"))
        config = LoraConfig(W.LORA_RANK, seed=0, train_unembed=False)
        self.adapter, self.tower = self.engine.bank.create(config), self.engine.scorer.tower()
        before, _, after, _ = self.engine.base.tokenizer().convert_tokens_to_ids(list(TOKENS))
        self.data = []
        for picture, prompt, answer in rows:
            chunk, Text = self.tower.reader.chunk(picture), tinker.EncodedTextChunk
            value = tinker.ModelInput([Text([before]), chunk, Text([after, *prompt])])
            self.data.append(datum_from_prompt_completion(value, answer, score_prompt=False))
        self.tower.reader._kept.clear()  # a step reads its pictures, as TRL's does

    def step(self, k: int) -> float:
        def loss_fn(data: Any, logprobs: Any) -> Any:
            return -sum(lp[-ANSWER:].mean() for lp in logprobs) / len(data), {}

        batch = self.data[ROWS * k : ROWS * (k + 1)]
        loss = self.engine.forward_backward(self.adapter, batch, loss_fn).loss
        self.adapter.optim_step(ADAM)
        return loss


def seconds_of(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def report(name: str, slow: list[float], fast: list[float]) -> None:
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    spread = f"{statistics.median(each):.2f}x ({min(each):.2f}-{max(each):.2f})"
    print(f"{name}: {spread}, {statistics.median(slow):.3f} s and {statistics.median(fast):.3f} s")


def kept(steps: int) -> None:
    ours = Ours(build("kept"), draw(ROWS))
    parts = ours.tower._model.visual, ours.tower._model.language_model
    sizes = [f"{sum(p.numel() for p in part.parameters()):,}" for part in parts]
    ours.step(0)
    cold, warm = [], []
    for _ in range(steps):
        ours.tower._kept.clear()
        cold.append(seconds_of(lambda: ours.step(0)))
        warm.append(seconds_of(lambda: ours.step(0)))
    report(f"features dropped / kept (tower {sizes[0]}, text {sizes[1]} numbers)", cold, warm)


def against_trl(steps: int, share: int) -> None:
    import peft
    import trl
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback

    folder, count = build("trl"), steps + 1
    rows = draw(ROWS * count, share)
    ours = Ours(folder, rows)
    columns = {
        "image": [Image.open(io.BytesIO(picture)) for picture, _, _ in rows],
        "prompt": ["".join(TOKENS[:3]) + W.text_of(prompt) for _, prompt, _ in rows],
        "completion": [" " + W.text_of(answer) for _, _, answer in rows],
    }
    options = argparse.Namespace(steps=2 * count, warmup=0)
    more = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": ROWS}
    layers = rf".*language_model.*\.({'|'.join(W.TARGETS)})"
    trainer = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        args=trl.SFTConfig(**arguments(options, max_length=None, **more)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=load_processor(folder),
        peft_config=peft.LoraConfig(r=W.LORA_RANK, lora_alpha=W.LORA_ALPHA, target_modules=layers),
    )
    theirs: list[float] = []
    mine: list[float] = []
    losses: list[float] = []
    one_step = trainer.training_step

    def training_step(*args: Any, **named: Any) -> Any:
        losses.append(float(loss := one_step(*args, **named)))
        return loss

    class Turns(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs.append(time.perf_counter() - self.began)
            place = len(mine) % count
            mine.append(seconds_of(lambda: losses.append(ours.step(place))))
            self.began = time.perf_counter()

    trainer.training_step = training_step
    trainer.add_callback(Turns())
    trainer.train()
    gap = max(abs(a - b) for a, b in zip(losses[:6:2], losses[1:6:2], strict=True))
    assert gap < 1e-3, losses[:6]
    print(f"a picture for {share} rows: losses differ by {gap:.1e}, {ours.tower.runs} tower runs")
    report("  TRL / ours, first epoch", theirs[1:count], mine[1:count])
    report("  TRL / ours, second epoch", theirs[count:], mine[count:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    kept(steps)
    against_trl(steps, 1)
    against_trl(steps, 4)


if __name__ == "__main__":
    main()
