"""Direct Preference Optimization: make chosen answers likelier than rejected ones.

    L = -mean over pairs of log sigmoid(beta * logratio_margin)
    logratio_margin = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

p is the policy in training, p_ref a frozen reference, beta (1/nats) how closely to stay to it. Log
probabilities are summed over the completion's tokens (nats); the loss is a mean over pairs.

Paper: Rafailov et al. 2023, arXiv 2305.18290, equation 7. Left out: label smoothing and
length normalisation; both are one line in `dpo_loss`.

The reference is the model as it stands when the run starts: the base model, or the adapter given
as --init_from. It is saved under the name "reference", read back from there and never changed. Both
sides go through the same scoring path, so before the first step the margin is exactly 0 and DPO's
loss exactly ln 2.

Data: columns prompt, chosen, rejected (all three; splits train and, if there, test); each plain
text, or lists of messages as TRL has them, chosen and rejected with the one answer
    {"prompt": [{"role": "user", "content": "..."}],
     "chosen": [{"role": "assistant", "content": "..."}], "rejected": [...]}
or chosen and rejected as whole conversations, with or without a prompt beside them: the turns they
share at the start are the prompt.

    python -m recipes.dpo                       # bundled tiny model, about a minute on two cores
    python -m recipes.dpo --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl

What you should see, of DPO's own loss: it starts at ln 2 = 0.6931, accuracy at 0.5 (all ties). On
the bundled data held-out accuracy ends above 0.9 with the loss near 0.65: the sign of the margin is
learnt long before the margin is large. A loss that stays at 0.6931 means nothing was trained. Watch
chosen_logprob too: if it falls together with rejected_logprob, the model is unlearning both.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from cookbook_core import (
    chat,
    clients,
    datum_from_prompt_completion,
    runs,
    tinker,
    weighted_sums,
)
from cookbook_core.data import batch_indices, train_test

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.dpo`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/dpo"
    """Hub name, local file or folder with columns prompt, chosen, rejected, or the last two.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder (for its final adapter) or LoRA folder to start from; it is then the reference
    too. Its own rank and alpha are used instead of --lora_rank."""
    beta: runs.PositiveFloat = 0.1
    """Strength of the pull to the reference, 1/nats. Larger stays closer."""
    num_steps: runs.PositiveInt = 120
    """Optimizer steps."""
    batch_size: runs.PositiveInt = 16
    """Pairs per step."""
    learning_rate: runs.PositiveFloat = 2e-4
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    max_length: runs.PositiveInt = 512
    """Longest prompt + completion, tokens; a pair with a longer one is dropped and counted."""
    test_rows: runs.PositiveInt = 100
    """Held-out pairs."""
    eval_every: runs.PositiveInt = 20
    """Steps between evaluations on the held-out pairs."""
    seed: int = 0
    """Seed of the adapter's initial values, of the order of the data and of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32 or bfloat16; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/dpo-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def dpo_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor], *, beta: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """DPO's loss over pairs, which lie interleaved: chosen, rejected, chosen, rejected, ...

        L = -mean_p log sigmoid(beta * (log_ratio[2p] - log_ratio[2p + 1]))

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7. Differs: nothing.

    Args:
        data: D = 2P datums with "weights" (1 on the completion) and "ref_logprobs", both `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        beta: > 0, 1/nats.
    Returns:
        loss: 0-d, nats; sum over tokens, mean over pairs.
        metrics: accuracy in [0, 1] (a tie counts one half), reward_margin (times beta),
            chosen_logprob and rejected_logprob (nats per sequence).
    Raises:
        ValueError: odd number of datums. DatumError: ref_logprobs or weights missing, misaligned.
    """
    if len(data) % 2:
        raise ValueError(
            f"data[{len(data) - 1}]: has no partner. Expected chosen, rejected, chosen, ..., got "
            f"{len(data)} datums. Keep both members of each pair in the batch."
        )
    policy = weighted_sums(data, logprobs)  # (D,) log p of each completion
    reference = weighted_sums(data, "ref_logprobs").to(policy)
    log_ratio = policy - reference
    logratio_margin = log_ratio[0::2] - log_ratio[1::2]  # (P,)
    loss = -F.logsigmoid(beta * logratio_margin).mean()
    wins = (logratio_margin > 0).float() + 0.5 * (logratio_margin == 0).float()
    return loss, {
        "accuracy": wins.mean().item(),
        "reward_margin": beta * logratio_margin.mean().item(),
        "chosen_logprob": policy[0::2].mean().item(),
        "rejected_logprob": policy[1::2].mean().item(),
    }


# ---- data ----------------------------------------------------------------------------------------


def build_pairs(
    rows: list[dict], tokenizer, max_length: int
) -> tuple[list[tinker.Datum], list[dict]]:
    """Rows -> interleaved datums (chosen, rejected, ...), and the rows kept. Drop a pair if either
    member exceeds max_length tokens."""
    data, kept_rows = [], []
    for raw_row in rows:
        with chat.naming(raw_row):  # errors name the row
            row, pair = chat.split_pair(raw_row), []
        for side in ("chosen", "rejected"):
            with chat.naming(raw_row, completion=side):
                pair.append(chat.render_completion(tokenizer, row["prompt"], row[side]))
        if max(len(prompt) + len(completion) for prompt, completion in pair) > max_length:
            continue
        kept_rows.append(row)
        data += [datum_from_prompt_completion(*tokens, score_prompt=False) for tokens in pair]
    return data, kept_rows


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    train_rows, test_rows = train_test(config.dataset, chat.PAIRS, config.test_rows, config.seed)
    panels = [
        runs.Panel("loss", "loss", ["loss", "test_loss"]),
        runs.Panel("held-out accuracy", "share of pairs", ["test_accuracy"], 0.5, "chance"),
        runs.Panel("held-out margin", "beta * nats", ["test_reward_margin"]),
        runs.Panel(
            "held-out logprobs",
            "nats per sequence",
            ["test_chosen_logprob", "test_rejected_logprob"],
        ),
    ]
    progress = ("loss", "accuracy")
    with runs.Run.open(
        "dpo", config, config.num_steps, flags, progress=progress, best="test_accuracy"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        reference = clients.frozen_copy(service, client, config.model, run.once)

        tokenizer = client.get_tokenizer()
        num_given = len(train_rows) + len(test_rows)
        data, train_rows = build_pairs(train_rows, tokenizer, config.max_length)
        test_data, test_rows = build_pairs(test_rows, tokenizer, config.max_length)
        run.report_rows("pairs", len(train_rows), len(test_rows), num_given, config.max_length)
        test_data = clients.add_ref_logprobs(reference, test_data)
        loss_fn = partial(dpo_loss, beta=config.beta)

        def evaluate() -> dict[str, float]:
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
            rows = batch_indices(len(data) // 2, config.batch_size, step, config.seed)
            batch = [data[2 * row + side] for row in rows for side in (0, 1)]
            batch = clients.add_ref_logprobs(reference, batch)
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom(batch, loss_fn)
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            metrics = backward.result().metrics | (stepped.result().metrics or {})
            run.log(step, metrics)

        after, shown_after = evaluate(), show()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out pairs, before and after", before, after)
        run.save_samples(
            [
                {
                    "prompt": chat.last_text(row["prompt"]),
                    "before": b,
                    "after": a,
                    "chosen": chat.last_text(row["chosen"]),
                }
                for row, b, a in zip(test_rows[:3], shown_before, shown_after, strict=True)
            ]
        )
        print(f"adapter: {adapter}\nplot: {run.plot(panels)}")
        return after


def sample(client: tinker.TrainingClient, rows: list[dict], seed: int) -> list[str]:
    """One completion of each row's prompt at temperature 1."""
    tokenizer = client.get_tokenizer()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [chat.render_prompt(tokenizer, row["prompt"]) for row in rows]
    groups = clients.rollout(sampler, prompts, max_tokens=64, seed=seed)
    return clients.texts_of(tokenizer, [group[0] for group in groups])


if __name__ == "__main__":
    runs.main(Config, train)
