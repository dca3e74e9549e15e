"""GRPO with KL: reinforce the completions that beat the others of their own prompt.

    L = sum over tokens of w * [ -min(ratio * A, clip(ratio) * A) + kl_coef * KL ]
    ratio = p(token) / p_sampled(token), clipped to [clip_low, clip_high]
    A = reward - mean reward of the prompt's group, see `advantages`

Each step samples group_size completions per prompt from the current policy p, rewards them, and
descends L on the sampled token ids themselves. p_ref, the reference of the KL term, is the model as
the run starts, and never changes. w is the reduction. All logprobs are those at --temperature, at
which completions are sampled: the ratio is 1 before an update.

Paper: Shao et al. 2024, arXiv 2402.03300. From Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783: the
reward is not divided by the group's standard deviation, and the constant-length reduction; from Yu
et al. 2025 (DAPO), arXiv 2503.14476, the token mean and the penalty on long completions. A group
whose rewards are all equal has no advantage: it is left out, KL term included, and counted
(zero_variance); the weights of the others still count its tokens. Other forms, by --ratio:

    token     the above
    sequence  the ratio of a token is the geometric mean of its completion's (GSPO, Zheng et al.
              2025, arXiv 2507.18071; with --reduction sequence_mean): all of it is clipped, or none
    cispo     -clip(ratio) * A * log p, clip(ratio) constant (MiniMax 2025, arXiv 2506.13585): a
              clipped token keeps its gradient

They differ once ratios leave 1, that is with updates_per_rollout above 1. The KL term is k2, which
has the gradient of KL(p || p_ref); `kl_term` has the others, and the ones that do not regularise.

Data: column prompt, text or messages, and column answer, which `exact_match` reads. A reward gets
the whole row, every column of the dataset, and completions with their `tokens` and `stop_reason`;
one that waits for something is `async def`: up to 16 of its calls run at a time.

    python -m recipes.grpo                      # bundled tiny model, under a minute on two cores
    python -m recipes.grpo --model Qwen/Qwen3-0.6B --dataset my_questions.jsonl --max_tokens 256
    python -m recipes.grpo --rewards exact overlong=0.5 --temperature 0.8
    python -m recipes.grpo --dataset tiny/dpo --max_tokens 24 --rewards SCORER
                                                # SCORER: what recipes/bradley_terry.py saved

What you should see: reward rises by 0.35 or more; kl rises with it and levels off; ratio_max stays
near 1, logprob_gap below 1e-3 (float32). The loss starts near 0 and stays there: that is normal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from cookbook_core import chat, clients, runs, tinker
from cookbook_core.alignment import columns
from cookbook_core.data import batch_indices, train_test
from cookbook_core.regularise import kl_term

import torch

Reduction = Literal["token_mean", "sequence_mean", "constant"]

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.grpo`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/grpo"
    """Hub name, local file or folder with column prompt, and those that the rewards read.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder or LoRA folder to start from and the reference; its rank replaces --lora_rank."""
    rewards: tuple[str, ...] = ("exact",)
    """Reward functions to sum, NAME or NAME=WEIGHT: exact, overlong, or the path of a scorer that
    recipes/bradley_terry.py saved on the same base model."""
    kl_coef: runs.NonNegativeFloat = 0.02
    """Weight of the KL term; 0 leaves it out."""
    reduction: Reduction = "token_mean"
    """Of the token terms: mean over all tokens of the step, mean of each sequence's mean, or sum
    divided by sequences * max_tokens."""
    ratio: Literal["token", "sequence", "cispo"] = "token"
    """Form of the policy term: see the top of this file."""
    clip: Annotated[
        tuple[float, float],
        runs.Rule(lambda c: 0 < c[0] < 1 < c[1], "0 < clip_low < 1 < clip_high"),
    ] = (0.8, 1.2)
    """clip_low and clip_high: the ratio's bounds for negative and for positive advantages."""
    num_steps: runs.PositiveInt = 40
    """Rollout steps."""
    updates_per_rollout: runs.PositiveInt = 1
    """Optimizer steps on each rollout; above 1 the ratio leaves 1 and clipping acts."""
    batch_size: runs.PositiveInt = 16
    """Prompts per step."""
    group_size: Annotated[int, runs.Rule(lambda size: size >= 2, ">= 2")] = 8
    """Completions per prompt."""
    max_tokens: runs.PositiveInt = 8
    """Longest completion, tokens."""
    temperature: runs.PositiveFloat = 1.0
    """Of sampling and of every logprob; services score at 1 only."""
    learning_rate: runs.PositiveFloat = 1e-3
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    test_rows: runs.PositiveInt = 100
    """Held-out prompts, each answered four times."""
    eval_every: runs.PositiveInt = 10
    """Steps between evaluations on the held-out prompts."""
    seed: int = 0
    """Seed of the adapter's initial values, of the order of the data and of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/grpo-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- rewards and advantages ------------------------------------------------------ change me ----


def exact_match(row: dict, completions: list[str]) -> list[float]:
    """1 where a completion is the row's answer and nothing else, 0 elsewhere."""
    return [float(text.strip() == str(row["answer"]).strip()) for text in completions]


def overlong(row: dict, completions: list, *, max_tokens: int, share: float = 0.2) -> list[float]:
    """0, falling to -1 within the last `share` of max_tokens: the soft penalty of DAPO."""
    del row
    buffer = max(1, round(share * max_tokens))  # L_cache; max_tokens is L_max
    return [min(0.0, (max_tokens - len(c.tokens)) / buffer - 1) for c in completions]


def reward_functions(service: tinker.ServiceClient, config: Config) -> dict[str, tuple]:
    """The functions that --rewards names, each with its weight: name -> (weight, function)."""
    known = {"exact": exact_match, "overlong": partial(overlong, max_tokens=config.max_tokens)}
    weights = clients.weights_by_name("Config.rewards", config.rewards, known)
    return {
        "scorer" if "/" in name else name: (
            weight,
            known.get(name) or bradley_terry_reward(service, name, config.model),
        )
        for name, weight in weights.items()
    }


def bradley_terry_reward(service: tinker.ServiceClient, path: str, model: str) -> Callable:
    """The reward of a scorer that recipes/bradley_terry.py trained, nats."""
    try:
        from recipes import bradley_terry as bt
    except ModuleNotFoundError:  # this file is a copy: the installed package has the recipe
        from cookbook_core.recipes import (  # pyright: ignore[reportMissingImports]
            bradley_terry as bt,
        )
    scorer, judge = bt.load_scorer(service, path, model)
    return lambda row, texts: bt.score_texts(scorer, judge, row, texts)


def advantages(rewards: list[float]) -> list[float]:
    """The advantage of each completion of a group, from their rewards: reward - mean.

    Others, with c the centred rewards: leave-one-out c * G / (G - 1), which Adam cannot tell from
    c; c / std, which makes groups count alike, however small their differences.
    """
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


# ---- loss ------------------------------------------------------------------------ change me ----


def grpo_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor], config: Config, kl_estimator: str = "k2"
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped policy gradient with a KL term, summed under the datums' weights.

        L = sum_t weights[t] * (-min(ratio A, clip(ratio) A) + kl_coef * KL)[t]

    Source: see the top of this file. Differs: so does it; the log-ratio is capped at 20 either
    way, so that no stray token gives inf, and cispo clips below too, where its paper does not.

    Args:
        data: D datums with "weights" (the reduction's, 0 on the prompt), "advantages",
            "sampling_logprobs" and "ref_logprobs", all `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        config: clip, kl_coef and ratio are used.
        kl_estimator: see `kl_term`.
    Returns:
        loss: 0-d.
        metrics: ratio_max, clip_fraction (of tokens whose gradient the clip stops or, for cispo,
            limits), logprob_gap (largest |log p - log p_sampled|, nats: before an update, sampler
            against scorer).
    Raises:
        DatumError: an input missing or misaligned.
    """
    keys = ("weights", "advantages", "sampling_logprobs", "ref_logprobs")
    flat = columns(data, logprobs, *keys)
    lp, weights, advantages, sampled, ref = (x[flat[1] != 0] for x in flat)
    log_ratio = (lp - sampled).clamp(-20.0, 20.0)
    kl = kl_term(kl_estimator, lp, ref, log_ratio.exp())
    if config.ratio == "sequence":  # the value of the sequence's, the gradient of the token's own
        lengths = [int(d.loss_fn_inputs["weights"].to_torch().count_nonzero()) for d in data]
        means = [own.mean().expand(len(own)) for own in log_ratio.detach().split(lengths)]
        log_ratio = torch.cat(means) + lp - lp.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(*config.clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    stopped = (ratio * advantages > clipped * advantages) & (ratio != clipped)
    if config.ratio == "cispo":
        gain, stopped = clipped.detach() * advantages * lp, ratio != clipped
    loss = (weights * (config.kl_coef * kl - gain)).sum()
    return loss, {
        "ratio_max": ratio.max().item(),
        "clip_fraction": stopped.float().mean().item(),
        "logprob_gap": (lp - sampled).abs().max().item(),
    }


# ---- data ----------------------------------------------------------------------------------------


def token_weight(reduction: Reduction, length: int, lengths: list[int], max_tokens: int) -> float:
    """Weight of each token of a completion of `length`, among all sampled ones of `lengths`."""
    if reduction == "token_mean":
        return 1 / sum(lengths)
    return 1 / (len(lengths) * (length if reduction == "sequence_mean" else max_tokens))


def build_data(
    rows: list[dict], groups: list[list], rewards: list[list[float]], config: Config
) -> list[tinker.Datum]:
    """A datum of each completion, in order, made from the sampled token ids."""
    lengths = [len(s.tokens) for group in groups for s in group]
    data = []
    for row, group, values in zip(rows, groups, rewards, strict=True):
        for s, advantage in zip(group, advantages(values), strict=True):
            weight = token_weight(config.reduction, len(s.tokens), lengths, config.max_tokens)
            inputs = {"advantages": advantage, "weights": weight}
            data.append(clients.sampled_datum(row["prompt_tokens"], s, **inputs))
    return data


def measure(data: list[tinker.Datum], rewards: list[list[float]]) -> dict[str, float]:
    """Of all completions: the mean reward; per token, the KL to the reference (k1: the mean of
    log p - log p_ref, which is unbiased) and the entropy estimate (the mean of -log p), nats."""
    flat = columns(data, "sampling_logprobs", "weights", "ref_logprobs")
    logprobs, _, ref_logprobs = (x[flat[1] != 0] for x in flat)
    return {
        "reward": sum(map(sum, rewards)) / len(data),
        "kl": (logprobs - ref_logprobs).mean().item(),
        "entropy": -logprobs.mean().item(),
    }


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    exact = any(entry.partition("=")[0] == "exact" for entry in config.rewards)
    train_rows, test_rows = train_test(
        config.dataset,
        ("prompt", "answer") if exact else ("prompt",),
        config.test_rows,
        config.seed,
        all_columns=True,
    )
    panels = [
        runs.Panel("reward", "mean per completion", ["reward", "test_reward"]),
        runs.Panel("KL to the reference", "nats per token", ["kl", "test_kl"], 0.0, "untrained"),
        runs.Panel("off-policy", "ratio, share", ["ratio_max", "clip_fraction", "zero_variance"]),
        runs.Panel("entropy", "nats per token", ["entropy", "test_entropy"]),
    ]
    progress = ("reward", "kl", "loss")
    with runs.Run.open(
        "grpo", config, config.num_steps, flags, progress=progress, best="test_reward"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        reference = clients.frozen_copy(service, client, config.model, run.once)
        tokenizer = run.tokenizer(client)
        functions = reward_functions(service, config)
        num_given = len(train_rows) + len(test_rows)
        longest = (client.get_info().model_data.max_context_length or 10**9) - config.max_tokens
        train_rows = clients.with_prompt_tokens(train_rows, tokenizer, longest)
        test_rows = clients.with_prompt_tokens(test_rows, tokenizer, longest)
        counts = (len(train_rows), len(test_rows), num_given, longest)
        run.report_rows("prompts", *counts, flag="a smaller --max_tokens")
        print("a loss near 0 is normal: advantages of a group sum to 0. Watch reward and kl.")

        def sample(rows: list[dict], count: int, seed: str) -> tuple[list, list, list, dict]:
            """Completions, their rewards, their datums with ref_logprobs, and metrics of them."""
            sampler = client.save_weights_and_get_sampling_client().result()
            prompts = [row["prompt_tokens"] for row in rows]
            options = {"max_tokens": config.max_tokens, "temperature": config.temperature}
            groups = clients.rollout(sampler, prompts, count, **options, seed=seed)
            texts = [clients.texts_of(tokenizer, group) for group in groups]
            rewards, named = clients.grade(functions, rows, texts)
            data = build_data(rows, groups, rewards, config)
            data = clients.add_ref_logprobs(reference, data)
            return texts, rewards, data, {**measure(data, rewards), **named}

        def evaluate() -> tuple[dict[str, float], list[str]]:
            texts, _, _, metrics = sample(test_rows, 4, f"{config.seed}/test")
            return {f"test_{k}": v for k, v in metrics.items()}, [group[0] for group in texts[:3]]

        before, shown_before = run.once("before", evaluate)
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            started = time.perf_counter()
            chosen = batch_indices(len(train_rows), config.batch_size, step, config.seed)
            rows = [train_rows[i] for i in chosen]
            _, rewards, data, metrics = sample(rows, config.group_size, f"{config.seed}/{step}")
            tokens = sum(d.loss_fn_inputs["weights"].to_torch().count_nonzero() for d in data)
            alive = [max(group) > min(group) for group in rewards]
            data = [d for i, d in enumerate(data) if alive[i // config.group_size]]
            metrics["zero_variance"] = 1 - sum(alive) / len(alive)
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            for update in range(config.updates_per_rollout if data else 0):
                backward = client.forward_backward_custom(data, partial(grpo_loss, config=config))
                stepped = client.optim_step(adam)
                new = backward.result().metrics | (stepped.result().metrics or {})
                gap = new["logprob_gap"] if update == 0 else metrics["logprob_gap"]
                metrics |= {**new, "logprob_gap": gap}  # later it holds the updates' own change
            seconds = time.perf_counter() - started
            metrics["tokens_per_second"] = int(tokens) / seconds
            run.log(step, metrics)

        after, shown_after = evaluate()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out prompts, before and after", before, after)
        run.save_samples(
            [
                {"prompt": chat.last_text(row["prompt"]), "before": b, "after": a}
                for row, b, a in zip(test_rows[:3], shown_before, shown_after, strict=True)
            ]
        )
        run.print_results(adapter, panels)
        return after


if __name__ == "__main__":
    runs.main(Config, train)
