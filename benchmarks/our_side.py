"""This project's side of `benchmarks.versus_trl`: one workload, one JSON line.

python -m benchmarks.our_side --workload dpo --model small
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import workloads as W
from cookbook_core import (
    clients,
    datum_from_prompt_completion,
    datum_from_token_set,
    tinker,
    with_inputs,
)
from recipes.bradley_terry import bradley_terry_loss
from recipes.dpo import dpo_loss

import torch

ADAM = tinker.AdamParams(W.LEARNING_RATE, 0.9, 0.999, 1e-8, grad_clip_norm=W.CLIP)


def cpu_service(*, shard: bool = False) -> tinker.ServiceClient:
    """Service for all benchmarks: the CPU, in float32."""
    return tinker.ServiceClient(device="cpu", dtype="float32", shard=shard)


def grpo_loss(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> Any:
    total, tokens = logprobs[0].new_zeros(()), 0.0
    for d, lp in zip(data, logprobs, strict=True):
        x = {key: value.to_torch() for key, value in d.loss_fn_inputs.items()}
        ratio = (lp - x["sampling_logprobs"]).exp()
        policy = torch.minimum(ratio * x["advantages"], ratio.clamp(0.8, 1.2) * x["advantages"])
        gap = x["ref_logprobs"] - lp
        kl = gap.exp() - 1 - gap
        total = total + (x["weights"] * (W.KL_COEF * kl - policy)).sum()
        tokens += float(x["weights"].sum())
    return total / tokens, {}


class Side:
    """A client, its reference, and the workload's data."""

    def __init__(
        self, workload: str, model: str, steps: int, threads: int, *, shard: bool = False
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.workload, folder = workload, W.build_model(model)
        service = cpu_service(shard=shard)
        self.client = clients.start(service, folder, "", W.LORA_RANK, seed=0)
        self.base = clients.start(service, folder, "", 1, seed=0)  # B is 0: the bare base model
        if workload.startswith("sft"):
            batches = W.sft(model, steps, prompts=workload == "sft_completion")
            self.data = [[self.sequence(s) for s in batch] for batch in batches]
        elif workload in ("dpo", "reward"):
            make = self.sequence if workload == "dpo" else self.verdict
            self.data = [[make(s) for p in b for s in p] for b in W.pairs(model, steps)]
        else:
            self.prompts = W.prompts(model, steps, workload)

    def sequence(self, s: W.Sequence) -> tinker.Datum:
        return datum_from_prompt_completion(s.prompt, s.completion, score_prompt=False)

    def verdict(self, s: W.Sequence) -> tinker.Datum:
        return datum_from_token_set(s.prompt + s.completion, [8, 9])

    def step(self, k: int) -> dict[str, float]:
        """Run one optimizer step; return its loss and, for GRPO, the seconds of sampling."""
        if self.workload.startswith("sft"):
            tokens = sum(float(d.loss_fn_inputs["weights"].to_numpy().sum()) for d in self.data[k])
            mean = [
                with_inputs(d, weights=d.loss_fn_inputs["weights"].to_numpy() / tokens)
                for d in self.data[k]
            ]
            return self.finish(self.client.forward_backward(mean, "cross_entropy"))
        if self.workload == "reward":
            return self.finish(
                self.client.forward_backward_custom(self.data[k], bradley_terry_loss)
            )
        if self.workload == "dpo":
            data = clients.add_ref_logprobs(self.base, self.data[k])
            loss = partial(dpo_loss, beta=W.BETA)
            return self.finish(self.client.forward_backward_custom(data, loss))
        began = time.perf_counter()
        data = self.rollout(k)
        generated = time.perf_counter() - began
        data = clients.add_ref_logprobs(self.base, data)
        metrics = self.finish(self.client.forward_backward_custom(data, grpo_loss))
        return {**metrics, "generate_s": generated}

    def finish(self, backward: Any) -> dict[str, float]:
        stepped = self.client.optim_step(ADAM)
        metrics = backward.result().metrics
        stepped.result()
        return {"loss": metrics.get("loss", metrics.get("loss:sum", float("nan")))}

    def rollout(self, k: int) -> list[tinker.Datum]:
        sampler = self.client.save_weights_and_get_sampling_client()
        groups = [
            sampler.sample(
                tinker.ModelInput.from_ints(prompt),
                W.GRPO[self.workload][1],
                tinker.SamplingParams(max_tokens=W.NEW_TOKENS, seed=k, stop=[W.END]),
            )
            for prompt in self.prompts[k]
        ]
        data = []
        for prompt, group in zip(self.prompts[k], groups, strict=True):
            sequences = group.result().sequences
            rewards = torch.tensor([W.reward(list(s.tokens)) for s in sequences])
            for s, advantage in zip(sequences, (rewards - rewards.mean()).tolist(), strict=True):
                inputs = {"advantages": advantage, "sampling_logprobs": s.logprobs}
                data.append(
                    datum_from_prompt_completion(prompt, s.tokens, score_prompt=False, **inputs)
                )
        return data


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=W.WORKLOADS, required=True)
    parser.add_argument("--model", choices=sorted(W.MODELS), required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    steps = options.steps + options.warmup
    side = Side(options.workload, options.model, steps, options.threads)
    seconds, metrics = [], []
    for k in range(steps):
        began = time.perf_counter()
        metrics.append(side.step(k))
        seconds.append(time.perf_counter() - began)
    report = {
        "seconds": seconds[options.warmup :],
        "generate_s": [each.get("generate_s", 0.0) for each in metrics[options.warmup :]],
        "losses": [each["loss"] for each in metrics],
        "peak_mb": W.peak_mb(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
