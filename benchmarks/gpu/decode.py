"""Section 4: sampling against transformers' generate, and what a decoding step consists of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.models import SECONDS, connect, datums, named, plain_peft, sequences
from benchmarks.gpu.report import Report
from cookbook_core import clients, tinker
from cookbook_core.tinker import ModelInput
from tests.oracles.logprobs import adapter_of


def sampler_of(client: Any) -> Any:
    return client.save_weights_and_get_sampling_client().result(SECONDS)


def sample(
    sampler: Any, prompts: Sequence[list[int]], new: int, stop: Sequence[int] = ()
) -> list[Any]:
    """Sample a completion of each prompt, decoded together."""
    params = [
        tinker.SamplingParams(max_tokens=new, seed=i, stop=list(stop)) for i in range(len(prompts))
    ]
    futures = sampler.sample_batch([ModelInput.from_ints(p) for p in prompts], 1, params)
    return [future.result(SECONDS).sequences[0] for future in futures]


def gap(
    report: Report, client: Any, prompts: Sequence[list[int]], drawn: Any, what: str, goal: Any
) -> float:
    """Report log p as sampled minus log p as scored; return the mean of its size, nats."""
    scored = clients.score(
        client, datums([[*p, *s.tokens] for p, s in zip(prompts, drawn, strict=True)])
    )
    parts = [
        torch.tensor(s.logprobs).double() - lp[len(p) - 1 :][: len(s.tokens)]
        for p, s, lp in zip(prompts, drawn, scored, strict=True)
    ]
    off = torch.cat(parts)
    mean = report.number(
        f"{what}sampled and scored, mean gap", float(off.abs().mean()), "nats", goal
    )
    report.number(f"{what}sampled and scored, p99", float(off.abs().quantile(0.99)), "nats")
    report.number(f"{what}sampled and scored, largest gap", float(off.abs().max()), "nats")
    report.number(f"{what}sampled and scored, k3", float((off.exp() - 1 - off).mean()), "nats")
    return mean


def decode(report: Report, card: Card) -> None:
    config, new = named(card, "0.6B"), card.pick(128, 8)
    prompts = sequences(card.pick(256, 4), card.pick(128, 8))
    batches, ours = [prompts[: card.pick(32, 2)], prompts], []
    with connect(card, config) as client:
        sampler, few = sampler_of(client), batches[0]
        for batch in batches:
            taken = card.seconds(lambda batch=batch: sample(sampler, batch, new))
            name = f"{len(batch)} rows"
            report.number(f"{name}: a step, prefill included", [t / new * 1e3 for t in taken], "ms")
            rates = [len(batch) * new / t for t in taken]
            ours.append(report.number(f"{name}: ours", rates, "tokens/s"))
        gap(report, client, few, sample(sampler, few, new), "0.6B: ", ("<=", 5e-3))
        ragged = [p[: len(p) // 4 + i * len(p) // (2 * len(few))] for i, p in enumerate(few)]
        taken = card.milliseconds(lambda: sample(sampler, ragged, new))
        report.number("ragged prompts, a step", [t / new for t in taken], "ms")
        # one token in 64 stops a row, so that rows leave the batch as it goes
        stop = range(0, config.vocab_size, 64)
        tokens = sum(len(s.tokens) for s in sample(sampler, few, new, stop))
        taken = card.seconds(lambda: sample(sampler, few, new, stop))
        report.number("rows that stop early", [tokens / t for t in taken], "tokens/s")
        step_parts(report, card, sampler, few, config.num_hidden_layers)
        adapter = adapter_of(client)
    model, name = plain_peft(card, config, adapter).eval(), "generate, peft model"
    for goals in ((None, None), ((">=", 4.0), (">=", 2.0))):
        for batch, rate, goal in zip(batches, ours, goals, strict=True):
            if report.has_time(f"{name}, {len(batch)} rows", 20):
                theirs = generate(report, card, model, batch, f"{name}, {len(batch)} rows")
                what = f"{len(batch)} rows: ours (unmerged) / {name}"
                report.number(what, rate / theirs, "x", goal)
        model, name = model.merge_and_unload(), "generate, merged"
    with_vllm(report, card, config, batches, new)


def generate(report: Report, card: Card, model: Any, prompts: Any, name: str) -> float:
    """Tokens a second of transformers' generate, which computes no logprobs here."""
    ids, new = torch.tensor(prompts, device=card.device), card.pick(32, 4)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"max_new_tokens": new, "min_new_tokens": new}

    def run() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return report.number(name, [len(ids) * new / t for t in card.seconds(run)], "tokens/s")


def step_parts(report: Report, card: Card, sampler: Any, prompts: Any, layers: int) -> None:
    """Kernels and calls of the host in one decoding step, from completions of two lengths.

    Both are long enough for decoding in graphs, and both capture the same ones.
    """
    many, few = card.pick((40, 24), (6, 2))
    long, short = (card.profile(lambda n=n: sample(sampler, prompts, n)) for n in (many, few))
    kernels, launches, graphs, waits = (
        (getattr(long, name) - getattr(short, name)) / (many - few)
        for name in ("kernels", "launches", "graphs", "waits")
    )
    report.number("kernels a step", kernels, "")
    report.number("launches a step and layer", (launches + graphs) / layers, "", ("<=", 40.0))
    report.number("of these graphs a step", graphs, "")
    report.number("waits for the device a step", waits, "")
    report.number("device busy while decoding", long.busy, "share")


def with_vllm(report: Report, card: Card, config: Any, batches: Any, new: int) -> None:
    """vLLM on the same configuration with its own random weights, where it is installed."""
    try:
        import vllm
    except ImportError:
        report.note("vLLM: skipped: not installed")
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
    for batch in batches:
        inputs = [{"prompt_token_ids": ids} for ids in batch]
        taken = card.seconds(lambda inputs=inputs: engine.generate(inputs, params, use_tqdm=False))
        rates = [len(batch) * new / t for t in taken]
        report.number(f"{len(batch)} rows: vLLM, no adapter", rates, "tokens/s")
