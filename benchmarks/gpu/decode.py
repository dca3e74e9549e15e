"""Section 4: sampling against transformers' generate, and what a decoding step consists of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import peft
import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.models import SECONDS, Side, build, connect, datum, named, sequences
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.tinker import ModelInput


def sample(
    sampler: Any, prompts: Sequence[list[int]], new: int, stop: Sequence[int] = (), count: int = 1
) -> list[Any]:
    """Sample `count` completions of each prompt, decoded together."""
    params = [
        tinker.SamplingParams(max_tokens=new, seed=i, stop=list(stop)) for i in range(len(prompts))
    ]
    futures = sampler.sample_batch([ModelInput.from_ints(p) for p in prompts], count, params)
    return [s for future in futures for s in future.result(SECONDS).sequences]


def gap(
    report: Report,
    side: Side,
    prompts: Sequence[list[int]],
    drawn: Sequence[Any],
    what: str,
    goal: Any,
) -> float:
    """Report log p as sampled minus log p as scored; return the mean of its size, nats."""
    data = [datum([*p, *s.tokens]) for p, s in zip(prompts, drawn, strict=True)]
    output = side.client.forward(data, "cross_entropy").result(SECONDS)
    parts = []
    for prompt, s, scored in zip(prompts, drawn, output.loss_fn_outputs, strict=True):
        own = scored["logprobs"].to_torch()[len(prompt) - 1 :][: len(s.tokens)]
        parts.append(torch.tensor(s.logprobs).double() - own.double())
    off = torch.cat(parts)
    size = off.abs()
    mean = report.number(f"{what}sampled and scored, mean gap", float(size.mean()), "nats", goal)
    report.number(f"{what}sampled and scored, p99", float(size.quantile(0.99)), "nats")
    report.number(f"{what}sampled and scored, largest gap", float(size.max()), "nats")
    report.number(f"{what}sampled and scored, k3", float((off.exp() - 1 - off).mean()), "nats")
    return mean


def decode(report: Report, card: Card) -> None:
    config, new, short = named(card, "0.6B"), card.pick(128, 8), card.pick(32, 4)
    ours: dict[int, float] = {}
    with connect(card, config) as side:
        for rows in card.pick((32, 256), (2, 4)):
            prompts = sequences(rows, card.pick(128, 8), config.vocab_size)
            ours[rows] = our_rate(report, card, side, prompts, new, f"{rows} rows")
        sampler, few = side.sampler(), prompts[: card.pick(32, 2)]
        drawn = sample(sampler, few, new)
        gap(report, side, few, drawn, "0.6B: ", ("<=", 5e-3))
        ragged = [p[: len(p) // 4 + i * len(p) // (2 * len(few))] for i, p in enumerate(few)]
        taken = card.seconds(lambda: sample(sampler, ragged, new))
        report.number("ragged prompts, a step", _step(taken, new), "ms")
        # one token in 64 stops a row, so that rows leave the batch as it goes
        stop = range(0, config.vocab_size, 64)
        lengths = [len(s.tokens) for s in sample(sampler, few, new, stop)]
        taken = card.seconds(lambda: sample(sampler, few, new, stop))
        report.number("rows that stop early", sum(lengths) / statistics.median(taken), "tokens/s")
        step_parts(report, card, sampler, few, config.num_hidden_layers)
        tensors = side.adapter.named()
        lora = side.adapter.slot.config
    for merged in (False, True):
        model = plain_peft(card, config, lora, tensors)
        model = model.merge_and_unload() if merged else model
        name = "generate, merged" if merged else "generate, peft model"
        for rows, goal in card.pick(((32, 4.0), (256, 2.0)), ((2, 4.0), (4, 2.0))):
            if not report.has_time(f"{name}, {rows} rows", card.pick(20, 0)):
                continue
            ids = torch.tensor(sequences(rows, card.pick(128, 8), config.vocab_size))
            rate = their_rate(
                report, card, model, ids.to(card.device), short, f"{name}, {rows} rows"
            )
            wanted = (">=", goal) if merged else None
            report.number(f"{rows} rows: ours (unmerged) / {name}", ours[rows] / rate, "x", wanted)
        del model
        card.free()
    with_vllm(report, card, config, new)


def our_rate(
    report: Report, card: Card, side: Side, prompts: list[list[int]], new: int, name: str
) -> float:
    sampler = side.sampler()
    taken = card.seconds(lambda: sample(sampler, prompts, new))
    rates = [len(prompts) * new / t for t in taken]
    report.number(f"{name}: a step, prefill included", _step(taken, new), "ms")
    return report.median(f"{name}: ours", rates, "tokens/s")


def their_rate(report: Report, card: Card, model: Any, ids: Any, new: int, name: str) -> float:
    """transformers' generate, which computes no logprobs here."""

    def run() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )

    rates = [len(ids) * new / t for t in card.seconds(run)]
    return report.median(name, rates, "tokens/s")


def plain_peft(card: Card, config: Any, lora: Any, tensors: dict[str, Any]) -> Any:
    """The same base and adapter as plain transformers and peft load them."""
    dtype = torch.float32 if card.smoke else torch.bfloat16
    model = peft.get_peft_model(build(config, card.device, dtype), lora)
    peft.set_peft_model_state_dict(model, tensors)
    return model.eval()


def step_parts(report: Report, card: Card, sampler: Any, prompts: Any, layers: int) -> None:
    """Kernels and calls of the host in one decoding step, from completions of two lengths.

    Both are long enough for decoding in graphs, and both capture the same ones.
    """
    many, few = card.pick((40, 24), (6, 2))
    long, short = (card.profile(lambda n=n: sample(sampler, prompts, n)) for n in (many, few))
    steps = many - few
    report.number("kernels a step", (long.kernels - short.kernels) / steps, "")
    launches = (long.launches + long.graphs - short.launches - short.graphs) / steps
    goal = ("<=", 40.0)
    report.number("launches a step and layer", launches / layers, "", goal)
    report.number("of these graphs a step", (long.graphs - short.graphs) / steps, "")
    report.number("device busy while decoding", long.busy, "share")
    syncs = [card.syncs(lambda n=n: sample(sampler, prompts, n)) for n in (many, few)]
    report.number("waits for the device a step", (syncs[0] - syncs[1]) / steps, "")


def with_vllm(report: Report, card: Card, config: Any, new: int) -> None:
    """vLLM on the same configuration with its own random weights, where it is installed."""
    try:
        import vllm
    except ImportError:
        report.skip("vLLM", "not installed")
        return
    if card.smoke or not report.has_time("vLLM", 150):
        return
    folder = str(card.folder / "vllm")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    engine = vllm.LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=0.4,
        dtype="bfloat16", max_model_len=1024,
    )  # fmt: skip
    params = vllm.SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0)
    for rows in (32, 256):
        inputs = [{"prompt_token_ids": ids} for ids in sequences(rows, 128, config.vocab_size)]
        taken = card.seconds(lambda inputs=inputs: engine.generate(inputs, params, use_tqdm=False))
        report.number(
            f"{rows} rows: vLLM, no adapter", rows * new / statistics.median(taken), "tokens/s"
        )


def _step(taken: list[float], new: int) -> float:
    return statistics.median(taken) / new * 1e3
