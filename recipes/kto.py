"""KTO: learn from answers that people gave a thumbs up or a thumbs down, without pairs.

    L = mean over answers of  desirable_weight   * [1 - sigmoid(beta * (r - z0))]   where good
                              undesirable_weight * [1 - sigmoid(beta * (z0 - r))]   where bad
    r = log p(answer) - log p_ref(answer),   z0 = max(0, mean of r over mismatched answers)

p is the policy in training, p_ref a frozen reference, beta (1/nats) how closely to stay to it. Log
probabilities are summed over the answer's tokens (nats). z0 estimates KL(p || p_ref): the mean of r
where each prompt of the batch gets the answer of the next one. It carries no gradient.

Paper: Ethayarajh et al. 2024, arXiv 2402.01306; z0 is estimated as there, from the one batch. Left
out: its mean over several processes. Where good and bad answers are unequally many, the paper sets
desirable_weight * (number of good) / (undesirable_weight * number of bad) to between 1 and 4/3.

The reference is the model as it stands when the run starts (the base model, or the adapter given as
--init_from), saved under the name "reference". Policy and reference share one scoring path, so
before the first step r and z0 are exactly 0 and the loss is 0.5.

Data: columns prompt, completion, label, as TRL has them: label is true (good) or false (bad); the
others are text, or lists of messages
    {"prompt": [{"role": "user", "content": "..."}],
     "completion": [{"role": "assistant", "content": "..."}], "label": true}
or preference pairs as in recipes/dpo.py, to try the recipe on: each keeps one of its two answers,
drawn at random. With pairs of your own, DPO learns more from the same rows.

    python -m recipes.kto                       # bundled tiny model, under a minute on two cores
    python -m recipes.kto --model Qwen/Qwen3-0.6B --dataset my_thumbs.jsonl
    python -m recipes.kto --shuffle_labels      # the null: nothing to learn

What you should see: held-out AUC, the share of (good, bad) couples whose good answer has the larger
r, from 0.5 (all ties) to about 0.95, good_reward above 0 and bad_reward below. The loss is a weak
guide: it starts at exactly 0.5 and ends near 0.48, because z0 rises with r. With --shuffle_labels
good_reward and bad_reward stay together; AUC, which knows no size, then lies anywhere around 0.5.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from cookbook_core import (
    chat,
    clients,
    datum_from_prompt_completion,
    runs,
    tinker,
    weighted_sums,
)
from cookbook_core.data import batch_indices, train_test

import torch

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.kto`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/dpo"
    """Hub name, local file or folder with columns prompt, completion, label, or pairs.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder (for its final adapter) or LoRA folder to start from; it is then the reference
    too. Its own rank and alpha are used instead of --lora_rank."""
    beta: runs.PositiveFloat = 0.1
    """Strength of the pull to the reference, 1/nats. Larger stays closer."""
    desirable_weight: runs.PositiveFloat = 1.0
    """Weight of good answers."""
    undesirable_weight: runs.PositiveFloat = 1.0
    """Weight of bad answers."""
    shuffle_labels: bool = False
    """Give the training rows each other's labels: what a run looks like that has nothing to learn.
    Held-out labels stay."""
    num_steps: runs.PositiveInt = 60
    """Optimizer steps."""
    batch_size: Annotated[int, runs.Rule(lambda size: size >= 2, ">= 2")] = 32
    """Answers per step; z0 needs two."""
    learning_rate: runs.PositiveFloat = 4e-4
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    max_length: runs.PositiveInt = 512
    """Longest prompt + completion, tokens; longer rows are dropped and counted."""
    test_rows: runs.PositiveInt = 200
    """Held-out answers."""
    eval_every: runs.PositiveInt = 20
    """Steps between evaluations on the held-out answers."""
    seed: int = 0
    """Seed of the adapter's initial values, of the order of the data and of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/kto-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def kto_loss(
    data: list[tinker.Datum],
    logprobs: list[torch.Tensor],
    *,
    beta: float,
    z0: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """KTO's loss over single answers.

        L = mean_i weight_i * (1 - sigmoid(beta * (r_i - z0)))    with z0 - r_i where i is bad

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, the KTO loss. Differs: nothing.

    Args:
        data: D datums with "weights" (1 on the completion), "ref_logprobs" and "desirable" (1 on
            the completion where it is good, 0 where it is bad), all `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        beta: > 0, 1/nats.
        z0: >= 0, nats; the reference point that r is compared with, see `mean_log_ratio`.
        desirable_weight: weight of good answers.
        undesirable_weight: weight of bad answers.
    Returns:
        loss: 0-d, between 0 and the larger weight; sum over tokens, mean over answers.
        metrics: auc in [0, 1] (a tie counts one half, and so does a batch of one kind), good_reward
            and bad_reward (mean of r, nats; 0 where there is none), z0.
    Raises:
        DatumError: an input missing or misaligned.
    """
    r = weighted_sums(data, logprobs)
    r = r - weighted_sums(data, "ref_logprobs").to(r)
    good = weighted_sums(data, "desirable") > 0
    value = torch.sigmoid(beta * torch.where(good, r - z0, z0 - r))
    weight = torch.where(good, desirable_weight, undesirable_weight).to(r)
    return (weight * (1 - value)).mean(), {
        "auc": auc(r[good], r[~good]),
        "good_reward": r[good].sum().item() / max(1, int(good.sum())),
        "bad_reward": r[~good].sum().item() / max(1, int((~good).sum())),
        "z0": z0,
    }


def auc(good: torch.Tensor, bad: torch.Tensor) -> float:
    """Share of couples with good[i] > bad[j]; a tie counts one half. 0.5 where one is empty."""
    gap = good[:, None] - bad[None, :]
    return 0.5 + 0.5 * gap.sign().mean().item() if gap.numel() else 0.5


def example_data() -> list[tinker.Datum]:
    """Eight answers of two to four tokens, good and bad in turn, for `cookbook doctor`."""
    answers = [([7, 8, 9, 10][: 2 + i % 3], float(i % 2 == 0)) for i in range(8)]
    return [
        datum_from_prompt_completion([1, 2 + i], tokens, desirable=good, ref_logprobs=-1 - i / 8)
        for i, (tokens, good) in enumerate(answers)
    ]


# ---- data ----------------------------------------------------------------------------------------

Parts = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer."""


def build_data(
    rows: list[dict], tokenizer, max_length: int
) -> tuple[list[tinker.Datum], list[Parts], list[dict]]:
    """Datums, their tokens and their rows: those of at most max_length tokens."""
    data, parts, kept_rows = [], [], []
    for row in rows:
        with chat.naming(row):  # errors name the row
            extra = chat.template_arguments(row)
            tokens = chat.render_completion(tokenizer, row["prompt"], row["completion"], **extra)
        if len(tokens[0]) + len(tokens[1]) <= max_length:
            kept_rows.append(row)
            parts.append(tokens)
            good = float(row["label"])
            data.append(datum_from_prompt_completion(*tokens, score_prompt=False, desirable=good))
    return data, parts, kept_rows


def mismatched(parts: list[Parts], max_length: int) -> list[tinker.Datum]:
    """Datums of each prompt with the next one's answer, cut to max_length tokens."""
    answers = [answer for _, answer in parts[1:] + parts[:1]]
    return [
        datum_from_prompt_completion(prompt, answer, max_length, score_prompt=False)
        for (prompt, _), answer in zip(parts, answers, strict=True)
    ]


def mean_log_ratio(
    client: tinker.TrainingClient, reference: tinker.TrainingClient, data: list[tinker.Datum]
) -> float:
    """z0, nats: the mean of log p - log p_ref over completions, at least 0."""
    logprobs, ref_logprobs = (clients.score(each, data) for each in (client, reference))
    r = weighted_sums(data, logprobs) - weighted_sums(data, ref_logprobs)
    return max(0.0, r.mean().item())


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    train_rows, test_rows = train_test(config.dataset, chat.LABELLED, config.test_rows, config.seed)
    train_rows, test_rows = (chat.labelled(rows, config.seed) for rows in (train_rows, test_rows))
    if config.shuffle_labels:
        labels = [row["label"] for row in train_rows]
        random.Random(config.seed).shuffle(labels)
        for row, label in zip(train_rows, labels, strict=True):
            row["label"] = label
    panels = [
        runs.Panel("loss", "loss", ["loss", "test_loss"], 0.5, "untrained"),
        runs.Panel("held-out AUC", "share of couples", ["test_auc"], 0.5, "chance"),
        runs.Panel("held-out log-ratio", "nats", ["test_good_reward", "test_bad_reward"], 0.0),
        runs.Panel("z0", "nats", ["z0", "test_z0"], 0.0),
    ]
    progress = ("loss", "auc")
    with runs.Run.open(
        "kto", config, config.num_steps, flags, progress=progress, best="test_auc"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        reference = clients.frozen_copy(service, client, config.model, run.once)

        tokenizer = run.tokenizer(client)
        num_given = len(train_rows) + len(test_rows)
        data, parts, train_rows = build_data(train_rows, tokenizer, config.max_length)
        test_data, test_parts, test_rows = build_data(test_rows, tokenizer, config.max_length)
        run.report_rows("answers", len(train_rows), len(test_rows), num_given, config.max_length)
        num_good = sum(row["label"] for row in train_rows)
        print(f"labels: {num_good} good, {len(train_rows) - num_good} bad")
        test_data = clients.add_ref_logprobs(reference, test_data)

        def loss_at(parts: list[Parts]):
            """The loss with z0 of these answers under the present weights."""
            return partial(
                kto_loss,
                beta=config.beta,
                z0=mean_log_ratio(client, reference, mismatched(parts, config.max_length)),
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            )

        def evaluate() -> dict[str, float]:
            loss_fn = loss_at(test_parts)
            metrics = clients.evaluate(loss_fn, test_data, clients.score(client, test_data))
            return {f"test_{k}": v for k, v in metrics.items()}

        samples = run.once("samples", lambda: clients.offers_sampling(service, config.model))

        def show() -> list[str]:
            rows = test_rows[:3]
            return sample(client, rows, config.seed) if samples else ["(not sampled)"] * len(rows)

        before, shown_before = run.once("before", lambda: (evaluate(), show()))
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate() if step else before)
            rows = batch_indices(len(data), config.batch_size, step, config.seed)
            batch = clients.add_ref_logprobs(reference, [data[row] for row in rows])
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom(batch, loss_at([parts[row] for row in rows]))
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            metrics = backward.result().metrics | (stepped.result().metrics or {})
            run.log(step, metrics)

        after, shown_after = evaluate(), show()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out answers, before and after", before, after)
        run.save_samples(
            [
                {"prompt": chat.last_text(row["prompt"]), "before": b, "after": a}
                for row, b, a in zip(test_rows[:3], shown_before, shown_after, strict=True)
            ]
        )
        run.print_results(adapter, panels)
        return after


def sample(client: tinker.TrainingClient, rows: list[dict], seed: int) -> list[str]:
    """One completion of each row's prompt at temperature 1."""
    tokenizer = client.get_tokenizer()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [
        chat.render_prompt(tokenizer, row["prompt"], **chat.template_arguments(row)) for row in rows
    ]
    groups = clients.rollout(sampler, prompts, max_tokens=64, seed=seed)
    return clients.texts_of(tokenizer, [group[0] for group in groups])


if __name__ == "__main__":
    runs.main(Config, train)
