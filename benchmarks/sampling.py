"""Sampling speed: a SamplingClient against `transformers.generate`, same model, one process.

    python -m benchmarks.sampling --repeats 7

The model is a random Qwen3 with a LoRA adapter (nothing is downloaded). All sides produce
prompts x samples completions of exactly `--new-tokens` tokens with the logprob of each;
`transformers.generate` runs on the peft model and, as a second baseline, on the model with the
adapter merged in advance. The repeats are interleaved. Prints the median time, the tokens per
second, and the median, smallest and largest ratio of times within one repeat.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cookbook_core import tinker

import peft
import torch
import transformers


def build_model(vocab_size: int, lora_rank: int) -> Any:
    """A random Qwen3 (hidden 256, 4 layers, 4 heads, 2 key-value heads) with LoRA throughout."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.Qwen3ForCausalLM(config)
    lora = peft.LoraConfig(r=lora_rank, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval()


def generate(model: Any, prompts: list[list[int]], samples: int, new_tokens: int) -> torch.Tensor:
    """`transformers.generate`, plain sampling; returns `(prompts x samples, new_tokens)` nats."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_return_sequences=samples,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    logprobs = torch.log_softmax(torch.stack(out.logits, dim=1).float(), dim=-1)
    return logprobs.gather(-1, out.sequences[:, width:, None])[..., 0]


def make_sampler(model: Any, folder: str) -> tinker.SamplingClient:
    """Save the base model and the adapter to folders, and open a client on them."""
    base = copy.deepcopy(model).unload()
    base.save_pretrained(f"{folder}/base")
    model.save_pretrained(f"{folder}/adapter")
    service = tinker.ServiceClient(device="cpu", dtype="float32")
    return service.create_sampling_client(f"{folder}/adapter", f"{folder}/base").result()


def sample(
    sampler: tinker.SamplingClient,
    prompts: list[list[int]],
    samples: int,
    new_tokens: int,
    one_each: bool = False,
) -> None:
    """Send one request per prompt, or per sample with `one_each`; wait for all."""
    params = tinker.SamplingParams(max_tokens=new_tokens, stop=[])
    count, copies = (1, samples) if one_each else (samples, 1)
    inputs = [tinker.ModelInput.from_ints(p) for p in prompts for _ in range(copies)]
    futures = [sampler.sample(prompt, count, params) for prompt in inputs]
    for future in futures:
        future.result()


def measure(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Measure seconds per call of each side, interleaved, in reversed order every other repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        for name in names:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ragged", action="store_true", help="prompts of unequal length")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = build_model(args.vocab_size, args.lora_rank)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    folder = tempfile.TemporaryDirectory()
    sampler = make_sampler(model, folder.name)
    generator = torch.Generator().manual_seed(1)
    step = args.prompt_tokens // (2 * args.prompts) if args.ragged else 0
    prompts = [
        torch.randint(args.vocab_size, (args.prompt_tokens - i * step,), generator=generator)
        for i in range(args.prompts)
    ]
    prompts = [prompt.tolist() for prompt in prompts]
    shape = (prompts, args.samples, args.new_tokens)
    seconds = measure(
        {
            "transformers.generate": lambda: generate(model, *shape),
            "transformers.generate, merged": lambda: generate(merged, *shape),
            "cookbook": lambda: sample(sampler, *shape),
            "cookbook, 1 sample a request": lambda: sample(sampler, *shape, one_each=True),
        },
        args.repeats,
    )
    tokens = args.prompts * args.samples * args.new_tokens
    base = seconds["transformers.generate"]
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        median = statistics.median(times)
        print(
            f"{name:34s} {median * 1e3:8.0f} ms {tokens / median:8.0f} tokens/s   "
            f"ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
