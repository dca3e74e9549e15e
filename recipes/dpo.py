"""Direct Preference Optimization: make chosen answers likelier than rejected ones.

    L = -mean over pairs of log sigmoid(beta * logratio_margin)
    logratio_margin = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

p is the policy in training, p_ref a frozen reference, beta (1/nats) how closely to stay to it. Log
probabilities are summed over the completion's tokens (nats); the loss is a mean over pairs.

Paper: Rafailov et al. 2023, arXiv 2305.18290, equation 7. --loss selects another loss of the same
pairs, with m for logratio_margin, a for log p per token, and q = exp(a):

    ipo    (m - 1 / (2 beta))^2                            a margin to reach, not to exceed
    cdpo   dpo where a share of the labels is wrong        a finite margin is the optimum
    simpo  -log sigmoid(scale * (a_c - a_r) - gamma)       no reference, no length bias
    orpo   -a_c - odds_coef * log sigmoid(log odds_c - log odds_r),  odds = q / (1 - q)
                                                           no reference; sft and preference in one
    rpo    dpo - nll_coef * a_c                            keeps log p of chosen from falling

The reference is the model as it stands when the run starts: the base model, or the adapter given
as --init_from. It is saved under the name "reference", read back from there and never changed. Both
sides go through the same scoring path, so before the first step the margin is exactly 0 and DPO's
loss exactly ln 2. simpo and orpo use none: none is saved or computed.

Data: columns prompt, chosen, rejected (all three; splits train and, if there, test); each plain
text, or lists of messages as TRL has them, chosen and rejected with the one answer
    {"prompt": [{"role": "user", "content": "..."}],
     "chosen": [{"role": "assistant", "content": "..."}], "rejected": [...]}
or chosen and rejected as whole conversations, with or without a prompt beside them: the turns they
share at the start are the prompt.

    python -m recipes.dpo                       # bundled tiny model, about a minute on two cores
    python -m recipes.dpo --loss ipo
    python -m recipes.dpo --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl

What you should see, of DPO's own loss: it starts at ln 2 = 0.6931, accuracy at 0.5 (all ties). On
the bundled data held-out accuracy ends above 0.9 with the loss near 0.65: the sign of the margin is
learnt long before the margin is large. A loss that stays at 0.6931 means nothing was trained. Watch
chosen_logprob too: if it falls together with rejected_logprob, the model is unlearning both.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

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
import torch.nn.functional as F

Data = list[tinker.Datum]
Logprobs = list[torch.Tensor]
Result = tuple[torch.Tensor, dict[str, float]]

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
    loss: Literal["dpo", "ipo", "cdpo", "simpo", "orpo", "rpo"] = "dpo"
    """Which loss: see the top of this file. Further constants are arguments of its function."""
    beta: runs.PositiveFloat = 0.1
    """Strength of the pull to the reference, 1/nats. Larger stays closer. Not in simpo and orpo."""
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
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/dpo-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def dpo_loss(data: Data, logprobs: Logprobs, *, beta: float) -> Result:
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
    margin = beta * pair_margin(log_ratios(data, logprobs))
    return -F.logsigmoid(margin).mean(), pair_metrics(data, logprobs, margin)


def ipo_loss(data: Data, logprobs: Logprobs, *, beta: float) -> Result:
    """Squared distance of the log-ratio margin to 1 / (2 beta), mean over pairs.

    Source: Azar et al. 2023, arXiv 2310.12036v2, equation 17 (tau is beta). Differs: nothing; TRL
    takes the mean over tokens. Arguments, metrics and errors as in dpo_loss. nats^2.
    """
    margin = pair_margin(log_ratios(data, logprobs))
    loss = ((margin - 1 / (2 * beta)) ** 2).mean()
    return loss, pair_metrics(data, logprobs, beta * margin)


def cdpo_loss(data: Data, logprobs: Logprobs, *, beta: float, smoothing: float = 0.1) -> Result:
    """DPO in expectation where a label is wrong with probability smoothing, mean over pairs.

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", equation
    3. Differs: nothing. smoothing: in [0, 0.5). The rest as in dpo_loss.
    """
    margin = beta * pair_margin(log_ratios(data, logprobs))
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    loss = -((1 - smoothing) * right + smoothing * wrong).mean()
    return loss, pair_metrics(data, logprobs, margin)


def simpo_loss(data: Data, logprobs: Logprobs, *, scale: float = 2.0, gamma: float = 1.0) -> Result:
    """DPO without reference, on log p per token and with a margin of gamma, mean over pairs.

    Source: Meng et al. 2024, arXiv 2405.14734, its objective (beta is scale, 1/nats).
    Differs: nothing. Data without "ref_logprobs"; reward_margin times scale. The rest as in
    dpo_loss.
    """
    margin = scale * pair_margin(mean_logprobs(data, logprobs))
    return -F.logsigmoid(margin - gamma).mean(), pair_metrics(data, logprobs, margin)


def orpo_loss(data: Data, logprobs: Logprobs, *, odds_coef: float = 0.1) -> Result:
    """Negative log p per token of the chosen, plus a log odds ratio term, mean over pairs.

    Source: Hong et al. 2024, arXiv 2403.07691, equations 4, 6 and 7 (lambda is odds_coef).
    Differs: 1 - q is at least 1e-6. Data without "ref_logprobs"; reward_margin is the mean log
    odds ratio.
    """
    mean = mean_logprobs(data, logprobs)
    margin = pair_margin(mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6))))
    loss = -(mean[0::2] + odds_coef * F.logsigmoid(margin)).mean()
    return loss, pair_metrics(data, logprobs, margin)


def rpo_loss(data: Data, logprobs: Logprobs, *, beta: float, nll_coef: float = 0.1) -> Result:
    """DPO plus nll_coef times the negative log p per token of the chosen, mean over pairs.

    Source: Pang et al. 2024, arXiv 2404.19733, the DPO + NLL loss (alpha is nll_coef, 1 there).
    Differs: nothing. The rest as in dpo_loss.
    """
    loss, metrics = dpo_loss(data, logprobs, beta=beta)
    return loss - nll_coef * mean_logprobs(data, logprobs)[0::2].mean(), metrics


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "cdpo": cdpo_loss, "rpo": rpo_loss}
REFERENCE_FREE = {"simpo": simpo_loss, "orpo": orpo_loss}


def log_ratios(data: Data, logprobs: Logprobs) -> torch.Tensor:
    """log p - log p_ref of each completion, `(D,)` nats; sum over tokens."""
    policy = weighted_sums(data, logprobs)
    return policy - weighted_sums(data, "ref_logprobs").to(policy)


def mean_logprobs(data: Data, logprobs: Logprobs) -> torch.Tensor:
    """log p of each completion, `(D,)` nats per token."""
    policy = weighted_sums(data, logprobs)
    lengths = [datum.loss_fn_inputs["weights"].to_torch().sum() for datum in data]
    return policy / torch.stack(lengths).to(policy)


def pair_margin(values: torch.Tensor) -> torch.Tensor:
    """Values `(2P,)` of interleaved datums -> chosen - rejected, `(P,)`."""
    if len(values) % 2:
        raise ValueError(
            f"data[{len(values) - 1}]: has no partner. Expected chosen, rejected, chosen, ..., got "
            f"{len(values)} datums. Keep both members of each pair in the batch."
        )
    return values[0::2] - values[1::2]


def pair_metrics(data: Data, logprobs: Logprobs, margin: torch.Tensor) -> dict[str, float]:
    """The metrics of dpo_loss; margin: `(P,)`, the loss's own reward of chosen - rejected."""
    policy = weighted_sums(data, logprobs)
    wins = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {
        "accuracy": wins.mean().item(),
        "reward_margin": margin.mean().item(),
        "chosen_logprob": policy[0::2].mean().item(),
        "rejected_logprob": policy[1::2].mean().item(),
    }


# ---- data ----------------------------------------------------------------------------------------


def build_pairs(rows: list[dict], tokenizer, max_length: int) -> tuple[Data, list[dict]]:
    """Rows -> interleaved datums (chosen, rejected, ...), and the rows kept. Drop a pair if either
    member exceeds max_length tokens."""
    data, kept_rows = [], []
    for raw_row in rows:
        with chat.naming(raw_row):  # errors name the row
            row, pair = chat.split_pair(raw_row), []
        for side in ("chosen", "rejected"):
            with chat.naming(raw_row, completion=side):
                extra = chat.template_arguments(row)
                pair.append(chat.render_completion(tokenizer, row["prompt"], row[side], **extra))
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
        loss_fn, reference = REFERENCE_FREE.get(config.loss), None
        if loss_fn is None:
            loss_fn = partial(LOSSES[config.loss], beta=config.beta)
            reference = clients.frozen_copy(service, client, config.model, run.once)

        def with_reference(data: Data) -> Data:
            return clients.add_ref_logprobs(reference, data) if reference else data

        tokenizer = run.tokenizer(client)
        num_given = len(train_rows) + len(test_rows)
        data, train_rows = build_pairs(train_rows, tokenizer, config.max_length)
        test_data, test_rows = build_pairs(test_rows, tokenizer, config.max_length)
        run.report_rows("pairs", len(train_rows), len(test_rows), num_given, config.max_length)
        test_data = with_reference(test_data)

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
            batch = with_reference(batch)
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
