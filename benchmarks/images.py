"""Training steps on pictures: with kept features against without, and against TRL's SFT.

    pip install -e ".[bench]"
    python -m benchmarks.images

Random Qwen3-VLs in float32 on the CPU, LoRA rank 16 on the language model, eight rows of one picture
each. Both sides of a row take steps by turns in one process, so that other work slows both alike.

    kept    the tower is larger than the text model; a step whose pictures were seen before, against
            one whose features were dropped
    first   against trl.SFTTrainer on prompts and completions, new pictures at each step
    again   the same in the second epoch, where our side has the features of all pictures

TRL gets the model's processor without its part for video, which needs torchvision. The losses of
both sides must agree to 1e-3 at the first three steps. Prints the median seconds and the median of
the ratios, with the smallest and largest.
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

PARTS = ("vision_start", "image", "vision_end", "video")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
ROWS, PROMPT, ANSWER = 8, 16, 16
"""Of a step; tokens of a row before and after the picture."""
SIZE = 192
"""Width and height of a picture, in pixels: 36 positions."""
TOWERS = {"large": (768, 8), "small": (256, 2)}
"""Width and depth."""


def build(tower: str) -> str:
    """Return the folder of a random Qwen3-VL over the text model `small`, built if missing."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder = Path("runs/benchmarks/models") / f"images-{tower}"
    if (folder / "processor_config.json").exists():
        return str(folder)
    tokenizer = W.tokenizer(W.MODELS["small"]["vocab_size"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    ids = dict(zip(PARTS, tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
    text = {**W.MODELS["small"], "vocab_size": len(tokenizer), "intermediate_size": 768}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"rope_parameters": rope, "pad_token_id": W.PAD, "eos_token_id": W.END}
    wide, depth = TOWERS[tower]
    vision = {"hidden_size": wide, "depth": depth, "intermediate_size": 4 * wide}
    vision |= {"num_heads": wide // 64, "out_hidden_size": text["hidden_size"]}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{part}_token_id": i for part, i in ids.items()},
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reads = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2}
    kinds = {"preprocessor": reads, "processor": {"processor_class": "Qwen3VLProcessor"}}
    for kind, values in kinds.items():
        (folder / f"{kind}_config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def rows(count: int) -> list[tuple[bytes, list[int], list[int]]]:
    """Pictures as PNG files, each with a prompt and an answer."""
    rng, pixels, made = random.Random(0), np.random.RandomState(0), []
    for _ in range(count):
        file = io.BytesIO()
        blocks = pixels.randint(0, 256, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "PNG")
        vocabulary = W.MODELS["small"]["vocab_size"]
        drawn = W.draw(rng, PROMPT + ANSWER - 1, vocabulary)
        made.append((file.getvalue(), drawn[:PROMPT], [*drawn[PROMPT:], W.END]))
    return made


class Ours:
    """An engine and its datums; `step(k)` trains on rows ROWS * k to ROWS * (k + 1)."""

    def __init__(self, folder: str, given: list[tuple[bytes, list[int], list[int]]]) -> None:
        self.engine = Engine(load_base_model(folder, "cpu", "float32"))
        self.adapter = self.engine.bank.create(LoraConfig(W.LORA_RANK, seed=0, alpha=W.LORA_ALPHA))
        self.tower = self.engine.scorer.tower()
        start, _, end, _ = self.engine.base.tokenizer().convert_tokens_to_ids(list(TOKENS))
        self.data = []
        for picture, prompt, answer in given:
            chunks = [tinker.EncodedTextChunk([start]), self.tower.reader.chunk(picture)]
            value = tinker.ModelInput([*chunks, tinker.EncodedTextChunk([end, *prompt])])
            self.data.append(datum_from_prompt_completion(value, answer, score_prompt=False))
        self.tower.reader._kept.clear()  # a step reads its pictures, as TRL's does

    def step(self, k: int) -> float:
        batch = self.data[ROWS * k : ROWS * (k + 1)]
        result = self.engine.forward_backward(self.adapter, batch, mean_loss)
        self.adapter.optim_step(ADAM)
        return result.loss


def mean_loss(data: Any, logprobs: Any) -> Any:
    del data
    return -sum(lp[-ANSWER:].sum() for lp in logprobs) / (ROWS * ANSWER), {}


def seconds_of(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def kept(options: argparse.Namespace) -> None:
    """Print the ratio of steps without and with kept features."""
    ours = Ours(build("large"), rows(ROWS))
    parts = {"tower": ours.tower._model.visual, "text": ours.tower._model.language_model}
    sizes = [f"{name} {sum(p.numel() for p in m.parameters()):,}" for name, m in parts.items()]
    print(f"kept: parameters of the {', the '.join(sizes)}")
    ours.step(0)
    cold, warm, before = [], [], ours.tower.runs
    for _ in range(options.steps):
        ours.tower._kept.clear()
        cold.append(seconds_of(lambda: ours.step(0)))
        warm.append(seconds_of(lambda: ours.step(0)))
    report("without / with kept features", cold, warm)
    print(f"  {ours.tower.runs - before} runs of the tower in {2 * options.steps} steps of {ROWS}")


def against_trl(options: argparse.Namespace) -> None:
    """Print the ratios of TRL's step to ours, which is taken after each of TRL's."""
    import peft
    import trl
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback

    folder, count = build("small"), options.steps + 1
    given = rows(ROWS * count)
    ours = Ours(folder, given)
    answers = [[W.text_of(answer)] for _, _, answer in given]
    columns = {
        "image": [Image.open(io.BytesIO(picture)) for picture, _, _ in given],
        "prompt": [PICTURE + W.text_of(prompt) for _, prompt, _ in given],
        "completion": [" " + answer for (answer,) in answers],
    }
    options.warmup = options.steps = count
    more = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": ROWS}
    trainer = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        args=trl.SFTConfig(**arguments(options, completion_only_loss=True, max_length=None, **more)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=load_processor(folder),
        peft_config=peft.LoraConfig(
            r=W.LORA_RANK,
            lora_alpha=W.LORA_ALPHA,
            target_modules=rf".*language_model.*\.({'|'.join(W.TARGETS)})",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    mine: list[float] = []
    theirs: list[float] = []
    losses: list[tuple[float, float]] = []
    one_step, began = trainer.training_step, [0.0]

    def training_step(*args: Any, **named: Any) -> Any:
        loss = one_step(*args, **named)
        losses.append((float(loss), 0.0))
        return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs.append(time.perf_counter() - began[0])
            place = (len(theirs) - 1) % count
            mine.append(seconds_of(lambda: losses.append((losses.pop()[0], ours.step(place)))))
            began[0] = time.perf_counter()

    trainer.training_step = training_step
    trainer.add_callback(Turns())
    trainer.train()
    gap = max(abs(a - b) for a, b in losses[:3])
    print(f"against TRL {trl.__version__}: the first three losses differ by at most {gap:.1e}")
    assert gap < 1e-3, losses[:3]
    report("first: TRL / ours", theirs[1:count], mine[1:count])
    report("again: TRL / ours", theirs[count:], mine[count:])
    print(f"  {ours.tower.runs} runs of the tower here, {2 * ROWS * count} in TRL")


def report(name: str, slow: list[float], fast: list[float]) -> None:
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    seconds = f"{statistics.median(slow):.3f} s and {statistics.median(fast):.3f} s a step"
    spread = f"{statistics.median(each):.2f}x ({min(each):.2f}-{max(each):.2f})"
    print(f"  {name}: {spread}, {seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side in a row")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--rows", choices=("kept", "trl"), nargs="*", default=("kept", "trl"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if "kept" in options.rows:
        kept(options)
    if "trl" in options.rows:
        against_trl(options)


if __name__ == "__main__":
    main()
