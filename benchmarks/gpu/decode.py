"""Section 4: sampling against transformers' generate, and what a decoding step consists of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu import models as M
from benchmarks.gpu.card import Card
from benchmarks.gpu.report import Report
from cookbook_core import clients, tinker
from cookbook_core.tinker import ModelInput
from tests.oracles.logprobs import adapter_of

import torch


def sampler_of(client: Any) -> Any:
    return client.save_weights_and_get_sampling_client().result(M.SECONDS)


def sample(
    sampler: Any, prompts: Sequence[list[int]], new: int, stop: Sequence[int] = ()
) -> list[Any]:
    """Sample a completion of each prompt, decoded together."""
    params = [
        tinker.SamplingParams(max_tokens=new, seed=i, stop=list(stop)) for i in range(len(prompts))
    ]
    futures = sampler.sample_batch([ModelInput.from_ints(p) for p in prompts], 1, params)
    return [future.result(M.SECONDS).sequences[0] for future in futures]


def gap(
    report: Report, client: Any, prompts: Sequence[list[int]], drawn: Any, what: str, goal: Any
) -> float:
    """Report log p as sampled minus log p as scored; return the mean of its size, nats."""
    data = M.datums([[*p, *s.tokens] for p, s in zip(prompts, drawn, strict=True)])
    parts = [
        torch.tensor(s.logprobs).double() - lp[len(p) - 1 :][: len(s.tokens)]
        for p, s, lp in zip(prompts, drawn, clients.score(client, data), strict=True)
    ]
    off, what = torch.cat(parts), f"{what}sampled and scored, "
    mean = report.number(f"{what}mean gap", float(off.abs().mean()), "nats", goal)
    report.number(f"{what}p99", float(off.abs().quantile(0.99)), "nats")
    report.number(f"{what}largest gap", float(off.abs().max()), "nats")
    report.number(f"{what}k3", float((off.exp() - 1 - off).mean()), "nats")
    return mean


def decode(report: Report, card: Card) -> None:
    config, new = M.named(card, "0.6B"), card.pick(128, 8)
    prompts = M.sequences(card.pick(256, 4), card.pick(128, 8))
    few, ours = prompts[: card.pick(32, 2)], []
    with M.connect(card, config) as client:
        sampler = sampler_of(client)
        for batch in (few, prompts):
            taken, name = card.seconds(partial(sample, sampler, batch, new)), f"{len(batch)} rows"
            report.number(f"{name}: a step, prefill included", [t / new * 1e3 for t in taken], "ms")
            ours.append(report.rate(f"{name}: ours", len(batch) * new, taken))
        gap(report, client, few, sample(sampler, few, new), "0.6B: ", ("<=", 5e-3))
        ragged = [p[: len(p) // 4 + i * len(p) // (2 * len(few))] for i, p in enumerate(few)]
        taken = card.milliseconds(lambda: sample(sampler, ragged, new))
        report.number("ragged prompts, a step", [t / new for t in taken], "ms")
        # one token in 64 stops a row, so that rows leave the batch as it goes
        early = partial(sample, sampler, few, new, range(0, config.vocab_size, 64))
        tokens = sum(len(s.tokens) for s in early())
        report.rate("rows that stop early", tokens, card.seconds(early))
        step_parts(report, card, sampler, few, config.num_hidden_layers)
        adapter = adapter_of(client)
    model = M.plain_peft(card, config, adapter).eval()
    for name, goals in (
        ("generate, peft model", (None, None)), ("generate, merged", ((">=", 4.0), (">=", 2.0))),
    ):  # fmt: skip
        model = model.merge_and_unload() if name == "generate, merged" else model
        for batch, rate, goal in zip((few, prompts), ours, goals, strict=True):
            rows = f"{len(batch)} rows"
            run = partial(generate, report, card, model, batch, f"{name}, {rows}")
            if theirs := report.attempt(f"{name}, {rows}", run, 20, must=False):
                report.number(f"{rows}: ours (unmerged) / {name}", rate / theirs, "x", goal)
    del model
    card.free()
    report.attempt(
        "vLLM", lambda: with_vllm(report, card, config, (few, prompts), new), 150, must=False
    )


def generate(report: Report, card: Card, model: Any, prompts: Any, name: str) -> float:
    """Tokens a second of transformers' generate, which computes no logprobs here."""
    ids, new = torch.tensor(prompts, device=card.device), card.pick(32, 4)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"max_new_tokens": new, "min_new_tokens": new}
    mask = torch.ones_like(ids)
    run = partial(model.generate, input_ids=ids, attention_mask=mask, **options)
    return report.rate(name, len(ids) * new, card.seconds(run))


def step_parts(report: Report, card: Card, sampler: Any, prompts: Any, layers: int) -> None:
    """Kernels and calls of the host in one decoding step, from completions of two lengths.

    Both are long enough for decoding in graphs, and both capture the same ones.
    """
    many, few = card.pick((40, 24), (6, 2))
    long, short = (card.profile(partial(sample, sampler, prompts, n))[0] for n in (many, few))
    one = {key: (long[key] - short[key]) / (many - few) for key in long | short}
    launches = one.get("launches", 0.0) + one.get("graphs", 0.0)
    report.number("kernels a step", one["kernels"], "")
    report.number("launches a step and layer", launches / layers, "", ("<=", 40.0))
    report.number("of these graphs a step", one.get("graphs", 0.0), "")
    report.number("waits for the device a step", one.get("waits", 0.0), "")
    report.number("device busy while decoding", long["busy"], "share")


def with_vllm(report: Report, card: Card, config: Any, batches: Any, new: int) -> None:
    """vLLM on the same configuration with its own random weights, where it is installed."""
    import vllm  # pyright: ignore[reportMissingImports]

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
        taken = card.seconds(partial(engine.generate, inputs, params, use_tqdm=False))
        report.rate(f"{len(batch)} rows: vLLM, no adapter", len(batch) * new, taken)
