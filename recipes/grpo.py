"""GRPO with KL: reinforce the completions that beat the others of their own prompt.

    L = sum over tokens of w * [ -min(ratio * A, clip(ratio) * A) + kl_coef * KL ]
    ratio = p(token) / p_sampled(token), clipped to [clip_low, clip_high]
    A = reward - mean reward of the prompt's group

Each step samples group_size completions per prompt from the current policy p at temperature 1,
rewards them, and descends L on the sampled token ids themselves. p_ref, the reference of the KL
term, is the model as the run starts, and never changes. w is the reduction.

Paper: Shao et al. 2024, arXiv 2402.03300. From Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783: the
reward is not divided by the group's standard deviation (--normalize_std brings it back), and the
constant-length reduction; from Yu et al. 2025 (DAPO), arXiv 2503.14476, the token mean. A group
whose rewards are all equal has no advantage: it is left out, KL term included, and counted
(zero_variance); the weights of the others still count its tokens.

KL is a trap. Per token, with d = log p - log p_ref and x under p, what --kl_estimator puts into
the loss has the expected gradient

    k2                    ratio (constant) * d^2 / 2         of KL(p || p_ref); the default
    k3_ratio              ratio * (exp(-d) - 1 + d)          of KL(p || p_ref)
    k1_reward             ratio * d (constant)               of KL(p || p_ref); a reward of -d
    k3                    exp(-d) - 1 + d                    of KL(p_ref || p): the other direction
    k1_no_regularisation  d                                  zero: published, regularises nothing

Data: column prompt, text or messages, and column answer, which `reward` reads.

    python -m recipes.grpo                      # bundled tiny model, under a minute on two cores
    python -m recipes.grpo --model Qwen/Qwen3-0.6B --dataset my_questions.jsonl --max_tokens 256
    python -m recipes.grpo --dataset tiny/dpo --max_tokens 24 --reward_model SCORER
                                                # SCORER: what recipes/bradley_terry.py saved

What you should see: reward rises by 0.35 or more; kl rises with it and levels off; ratio_max stays
near 1, logprob_gap below 1e-3 (float32). The loss starts near 0 and stays there: that is normal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

from cookbook_core import (
    chat,
    clients,
    datum_from_prompt_completion,
    runs,
    tinker,
)
from cookbook_core.alignment import columns
from cookbook_core.data import batch_indices, train_test

KLEstimator = Literal["k2", "k3_ratio", "k1_reward", "k3", "k1_no_regularisation"]
Reduction = Literal["token_mean", "sequence_mean", "constant"]

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.grpo`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/grpo"
    """Hub name, local file or folder with columns prompt, answer (prompt for a reward_model).
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder or LoRA folder to start from and the reference; its rank replaces --lora_rank."""
    reward_model: str = ""
    """A scorer saved by recipes/bradley_terry.py on the same base model, as the reward."""
    kl_coef: runs.NonNegativeFloat = 0.02
    """Weight of the KL term; 0 leaves it out."""
    kl_estimator: KLEstimator = "k2"
    """Form of the KL term: see the table at the top."""
    reduction: Reduction = "token_mean"
    """Of the token terms: mean over all tokens of the step, mean of each sequence's mean, or sum
    divided by sequences * max_tokens."""
    normalize_std: bool = False
    """Divide advantages by the group's standard deviation."""
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


# ---- reward ---------------------------------------------------------------------- change me ----


def reward(row: dict, completions: list[str]) -> list[float]:
    """1 where a completion is the row's answer and nothing else, 0 elsewhere."""
    return [float(text.strip() == str(row["answer"]).strip()) for text in completions]


def bradley_terry_reward(service: tinker.ServiceClient, config: Config) -> Callable:
    """The reward of a scorer that recipes/bradley_terry.py trained, nats."""
    try:
        from recipes.bradley_terry import load_scorer, score_texts
    except ModuleNotFoundError:  # this file is a copy: the installed package has the recipe
        from cookbook_core.recipes.bradley_terry import (  # pyright: ignore[reportMissingImports]
            load_scorer,
            score_texts,
        )

    scorer, judge = load_scorer(service, config.reward_model, config.model)
    return lambda row, texts: score_texts(scorer, judge, [(row["prompt"], t) for t in texts])


# ---- loss ------------------------------------------------------------------------ change me ----


def kl_term(
    estimator: KLEstimator, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, ratio: torch.Tensor
) -> torch.Tensor:
    """The KL term of each sampled token, `(N,)` nats; for its gradient see the top of this file.

    Source: Schulman's k1, k2, k3, joschu.net/blog/kl-approx.html. Which of them regularises is
    worked out by enumeration in tests/recipes/test_grpo.py.
    """
    d = logprobs - ref_logprobs
    k3 = torch.exp(-d.clamp(min=-20.0)) - 1 + d
    terms = {
        "k2": ratio.detach() * d**2 / 2,
        "k3_ratio": ratio * k3,
        "k1_reward": ratio * d.detach(),
        "k3": k3,
        "k1_no_regularisation": d,
    }
    return terms[estimator]


def grpo_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor], config: Config
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped policy gradient with a KL term, summed under the datums' weights.

        L = sum_t weights[t] * (-min(ratio A, clip(ratio) A) + kl_coef * KL)[t]

    Source: Shao et al. 2024, arXiv 2402.03300, equation 3. Differs: see the top of this file; the
    log-ratio is capped at 20 either way, so that no stray token gives inf.

    Args:
        data: D datums with "weights" (the reduction's, 0 on the prompt), "advantages",
            "sampling_logprobs" and "ref_logprobs", all `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        config: clip, kl_coef and kl_estimator are used.
    Returns:
        loss: 0-d.
        metrics: ratio_max, clip_fraction (of tokens whose gradient the clip stops), logprob_gap
            (largest |log p - log p_sampled|, nats: before an update, sampler against scorer).
    Raises:
        DatumError: an input missing or misaligned.
    """
    keys = ("weights", "advantages", "sampling_logprobs", "ref_logprobs")
    flat = columns(data, logprobs, *keys)
    lp, weights, advantages, sampled, ref = (x[flat[1] != 0] for x in flat)
    ratio = (lp - sampled).clamp(-20.0, 20.0).exp()
    clip_low, clip_high = config.clip
    clipped = ratio.clamp(clip_low, clip_high)
    policy = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = kl_term(config.kl_estimator, lp, ref, ratio)
    loss = (weights * (policy + config.kl_coef * kl)).sum()
    stopped = (ratio * advantages > clipped * advantages) & (ratio != clipped)
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
        advantages = torch.tensor(values) - sum(values) / len(values)
        if config.normalize_std and max(values) > min(values):
            advantages = advantages / advantages.pow(2).mean().sqrt()
        for s, advantage in zip(group, advantages.tolist(), strict=True):
            weight = token_weight(config.reduction, len(s.tokens), lengths, config.max_tokens)
            inputs = {"advantages": advantage, "sampling_logprobs": s.logprobs, "weights": weight}
            tokens = (row["prompt_tokens"], s.tokens)
            data.append(datum_from_prompt_completion(*tokens, score_prompt=False, **inputs))
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


def with_prompt_tokens(rows: list[dict], tokenizer, longest: int) -> list[dict]:
    """The rows whose prompt has at most `longest` tokens, with these."""
    kept_rows = []
    for row in rows:
        with chat.naming(row):  # errors name the row
            tokens = chat.render_prompt(tokenizer, row["prompt"])
        if len(tokens) <= longest:
            kept_rows.append({**row, "prompt_tokens": tokens})
    return kept_rows


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    fields = ("prompt",) if config.reward_model else ("prompt", "answer")
    train_rows, test_rows = train_test(config.dataset, fields, config.test_rows, config.seed)
    panels = [
        runs.Panel("reward", "mean per completion", ["reward", "test_reward"]),
        runs.Panel("KL to the reference", "nats per token", ["kl", "test_kl"], 0.0, "untrained"),
        runs.Panel(
            "off-policy", "ratio, or share", ["ratio_max", "clip_fraction", "zero_variance"]
        ),
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
        tokenizer = client.get_tokenizer()
        reward_fn = bradley_terry_reward(service, config) if config.reward_model else reward
        num_given = len(train_rows) + len(test_rows)
        longest = (client.get_info().model_data.max_context_length or 10**9) - config.max_tokens
        train_rows = with_prompt_tokens(train_rows, tokenizer, longest)
        test_rows = with_prompt_tokens(test_rows, tokenizer, longest)
        run.report_rows(
            "prompts",
            len(train_rows),
            len(test_rows),
            num_given,
            longest,
            flag="a smaller --max_tokens",
        )
        print("a loss near 0 is normal: advantages of a group sum to 0. Watch reward and kl.")

        def sample(rows: list[dict], count: int, seed: str) -> tuple[list, list, list]:
            """Completions, their rewards, and their datums with ref_logprobs."""
            sampler = client.save_weights_and_get_sampling_client().result()
            prompts = [row["prompt_tokens"] for row in rows]
            groups = clients.rollout(
                sampler, prompts, count, max_tokens=config.max_tokens, seed=seed
            )
            texts = [clients.texts_of(tokenizer, group) for group in groups]
            rewards = [clients.grade(reward_fn, row, t) for row, t in zip(rows, texts, strict=True)]
            data = build_data(rows, groups, rewards, config)
            return texts, rewards, clients.add_ref_logprobs(reference, data)

        def evaluate() -> tuple[dict[str, float], list[str]]:
            texts, rewards, data = sample(test_rows, 4, f"{config.seed}/test")
            metrics = {f"test_{k}": v for k, v in measure(data, rewards).items()}
            return metrics, [group[0] for group in texts[:3]]

        before, shown_before = run.once("before", evaluate)
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            started = time.perf_counter()
            chosen = batch_indices(len(train_rows), config.batch_size, step, config.seed)
            rows = [train_rows[i] for i in chosen]
            _, rewards, data = sample(rows, config.group_size, f"{config.seed}/{step}")
            metrics = measure(data, rewards)
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
        print(f"adapter: {adapter}\nplot: {run.plot(panels)}")
        return after


if __name__ == "__main__":
    runs.main(Config, train)
