"""Random models and seeded token ids that both sides of `benchmarks.versus_trl` train on.

Batch k is optimizer step k. Lengths are drawn once per workload, so all steps have the same shapes
and the median over steps is a median over repeats. Nothing is downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096},
    "bigvocab": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 65536},
    "vocab150k": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 151936},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32768},
}
WORKLOADS = ("sft", "sft_completion", "dpo", "reward", "grpo", "grpo_long")
LORA_RANK, LORA_ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE, CLIP = 1e-4, 1.0
BETA = 0.1  # of DPO
NEW_TOKENS, KL_COEF = 64, 0.04  # of GRPO
GRPO = {"grpo": (4, 8, 128), "grpo_long": (2, 16, 512)}  # prompts, group size, prompt tokens
PAD, END, SPECIALS = 0, 1, 8  # ids below SPECIALS are never drawn


@dataclass(frozen=True)
class Sequence:
    """Prompt and completion, token ids; the completion ends with END."""

    prompt: list[int]
    completion: list[int]


def build_model(name: str) -> str:
    """Return the folder of a random float32 Qwen3, built if missing; one word per token id."""
    folder = Path("runs/benchmarks/models") / name
    if (folder / "tokenizer.json").exists():
        return str(folder)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = MODELS[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        **shape,
        intermediate_size=3 * shape["hidden_size"],
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=shape["hidden_size"] // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer(shape["vocab_size"]).save_pretrained(folder)
    return str(folder)


def tokenizer(vocab_size: int) -> Any:
    """A tokenizer of one word per token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word_of(i): i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<2>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<0>", eos_token="<1>", unk_token="<2>"
    )


def word_of(i: int) -> str:
    return f"w{i}" if i >= SPECIALS else f"<{i}>"


def text_of(ids: list[int]) -> str:
    """Text that the tokenizer encodes to exactly these ids."""
    return " ".join(map(word_of, ids))


def draw(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(SPECIALS, vocab) for _ in range(length)]


def sft(model: str, steps: int, *, prompts: bool) -> list[list[Sequence]]:
    """8 sequences of 64 to 512 tokens a step; with prompts, the first half of each is prompt."""
    lengths = random.Random(1).choices(range(64, 513), k=8)
    rng, vocab = random.Random(2), MODELS[model]["vocab_size"]
    batches = []
    for _ in range(steps):
        rows = [[*draw(rng, n - 1, vocab), END] for n in lengths]
        cut = [len(row) // 2 if prompts else 1 for row in rows]
        batches.append([Sequence(r[:c], r[c:]) for r, c in zip(rows, cut, strict=True)])
    return batches


def pairs(model: str, steps: int) -> list[list[tuple[Sequence, Sequence]]]:
    """8 pairs a step: a prompt of 256 tokens, two answers of 32 to 128."""
    lengths = [random.Random(3 + i).choices(range(32, 129), k=2) for i in range(8)]
    rng, vocab = random.Random(4), MODELS[model]["vocab_size"]
    batches = []
    for _ in range(steps):
        batch = []
        for each in lengths:
            prompt = draw(rng, 256, vocab)
            answers = [[*draw(rng, n - 1, vocab), END] for n in each]
            batch.append((Sequence(prompt, answers[0]), Sequence(prompt, answers[1])))
        batches.append(batch)
    return batches


def prompts(model: str, steps: int, workload: str) -> list[list[list[int]]]:
    """Prompts of each step for the GRPO workloads."""
    rng, vocab = random.Random(5), MODELS[model]["vocab_size"]
    count, _, length = GRPO[workload]
    return [[draw(rng, length, vocab) for _ in range(count)] for _ in range(steps)]


def reward(completion: list[int]) -> float:
    """Share of even token ids."""
    return sum(1 for t in completion if t % 2 == 0) / max(1, len(completion))


def peak_mb() -> float:
    """Largest resident memory of this process so far (Linux), MB of 2**20 bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")
