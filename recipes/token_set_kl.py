r"""KL over a fixed set of tokens: match how people spread over labels, not one label.

    L = mean over rows of KL(target || q),   q = softmax over k of log p(label_k | prompt)

Each row has a distribution over K label words: the shares of several annotators, say, or all of it
on the right letter of a multiple-choice question. p is read at one position, where the label would
stand, and renormalised over the set. Nats.

Source: cross-entropy against soft labels, as in Hinton et al. 2015, arXiv 1503.02531, restricted to
the labels' tokens. KL(target || q) differs from it by the target's entropy alone, so that 0 means a
perfect match. --divergence reverse gives KL(q || target), js the Jensen-Shannon divergence (Lin
1991). The divergence alone leaves what p puts outside the set to chance, and long runs drift there;
--mass_coef c adds -c log(mass of the set). Forward with c = 1 is KL over the whole vocabulary.

Data: columns text, label_probs (K numbers that sum to 1), or question, answer (one of the labels,
with or without its leading space); text and question as plain text; labels (the label words, the
same in each row) if they are not passed. With a column image or images (files) the model reads them
before the text.

    python -m recipes.token_set_kl              # bundled tiny model, one minute on two cores
    python -m recipes.token_set_kl --dataset tiny/multiple_choice --labels ' A' ' B' ' C' ' D' \
        --num_steps 100 --learning_rate 2e-3
    python -m recipes.token_set_kl --dataset tiny/digits --model tiny-vl \
        --num_steps 60 --learning_rate 6e-3
    python -m recipes.token_set_kl --model Qwen/Qwen3-0.6B --dataset my_ratings.jsonl \
        --labels bad fair good

What you should see: held-out KL falls by more than 60%. It cannot reach 0 where targets are shares
of a few annotators, whose scatter no model can foresee. For one-hot targets the loss is the
cross-entropy of the right label, and accuracy the share of rows where it is the likeliest.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from cookbook_core import chat, clients, runs, tinker, token_set
from cookbook_core.alignment import input_tensors
from cookbook_core.data import batch_indices, train_test

import torch

Divergence = Literal["forward", "reverse", "js"]
RATINGS = (" terrible", " poor", " fair", " good", " excellent")

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.token_set_kl`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/token_set_kl"
    """Hub name, local file or folder with columns text, label_probs, or question, answer.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    labels: tuple[str, ...] = ()
    """The label words, in the order of label_probs; each must be one token, space included. Empty
    takes the dataset's column labels; where it has none, the ratings terrible to excellent."""
    divergence: Divergence = "forward"
    """KL(target || model), or reverse: KL(model || target), or js: Jensen-Shannon."""
    smoothing: Annotated[float, runs.Rule(lambda share: 0 <= share < 1, "in [0, 1)")] = 0.0
    """Share of each target spread evenly over the labels; reverse needs it where a target is 0."""
    mass_coef: runs.NonNegativeFloat = 0.1
    """Weight of -log(mass of the set), which keeps p on the labels; 0 is the divergence alone."""
    init_from: str = ""
    """Run folder (for its final adapter) or LoRA folder to start from, with its own rank and alpha
    instead of --lora_rank. Empty starts a fresh adapter."""
    num_steps: runs.PositiveInt = 200
    """Optimizer steps."""
    batch_size: runs.PositiveInt = 32
    """Rows per step."""
    learning_rate: runs.PositiveFloat = 3e-3
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    max_length: runs.PositiveInt = 512
    """Longest prompt, tokens; longer ones are dropped and counted."""
    test_rows: runs.PositiveInt = 100
    """Held-out rows."""
    eval_every: runs.PositiveInt = 10
    """Steps between evaluations on the held-out rows."""
    seed: int = 0
    """Seed of the adapter's initial values and of the order of the data."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/token_set_kl-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def token_set_kl_loss(
    data: list[tinker.Datum],
    logprobs: list[torch.Tensor],
    *,
    divergence: Divergence = "forward",
    mass_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The divergence between each datum's target and the model, over the set, at one position.

        L = mean over i of divergence(t[i], q[i]) - mass_coef log sum_k exp logprobs[i][-1, k]
        q = softmax(logprobs[i][-1])
        forward  sum_k t log(t / q)       reverse  sum_k q log(q / t)
        js       (sum_k t log(t / m) + sum_k q log(q / m)) / 2,   m = (t + q) / 2

    Source: Kullback and Leibler 1951; Lin 1991 for js. 0 log 0 is 0.

    Args:
        data: D datums with "target_probs" `(K,)`, non-negative, summing to 1.
        logprobs: D tensors `(N_i, K)`, nats: log p of each label at every position, of which the
            last is used; gradient flows there.
        divergence: forward, reverse (every target above 0) or js.
        mass_coef: weight of the mass term, at least 0.
    Returns:
        loss: 0-d, nats; mean over datums.
        metrics: divergence (nats; the loss without the mass term), accuracy (of the likeliest
            label; a target's ties are shared), set_mass (what p gives to the whole set).
    Raises:
        DatumError: target_probs missing.
    """
    last = torch.stack([lp[-1] for lp in logprobs])  # (D, K)
    target = torch.stack(input_tensors(data, "target_probs")).to(last)
    log_q, log_t = last.log_softmax(dim=-1), target.log()
    if divergence == "forward":
        each = torch.special.xlogy(target, target) - target * log_q
    elif divergence == "reverse":
        each = log_q.exp() * (log_q - log_t)
    else:
        log_m = torch.logaddexp(log_t, log_q) - math.log(2)
        forward = torch.special.xlogy(target, target) - target * log_m
        each = (forward + log_q.exp() * (log_q - log_m)) / 2
    best = target == target.amax(dim=-1, keepdim=True)
    hit = best.gather(1, log_q.argmax(dim=-1, keepdim=True))[:, 0] / best.sum(dim=-1)
    distance, log_mass = each.sum(dim=-1).mean(), last.logsumexp(dim=-1)  # log_mass: (D,), nats
    return distance - mass_coef * log_mass.mean(), {
        "divergence": distance.item(),
        "accuracy": hit.mean().item(),
        "set_mass": log_mass.exp().mean().item(),
    }


# ---- data ----------------------------------------------------------------------------------------


def build_data(
    rows: list[dict], tokenizer, config: Config, split: str
) -> tuple[list[tinker.Datum], list[dict]]:
    """Rows -> datums, and the rows that were kept: those of at most max_length tokens."""
    labels = token_set.label_words(rows, config.labels, RATINGS)
    ids = token_set.single_tokens(tokenizer, labels)
    chats = getattr(tokenizer, "chat_template", None)
    data, kept_rows = [], []
    for i, row in enumerate(rows):
        probs = token_set.label_distribution(
            row,
            labels,
            getattr(row, "where", f"{config.dataset} ({split}) row {i}"),
            smoothing=config.smoothing,
            zeros=config.divergence != "reverse",
        )
        column = "text" if "text" in row else "question"
        prompt = [{"role": "user", "content": row[column]}] if chats else row[column]
        with chat.naming(row, prompt=column):  # errors name the row
            tokens = chat.render_prompt(tokenizer, prompt, **chat.template_arguments(row))
        if len(tokens) <= config.max_length:
            kept_rows.append(row)
            data.append(token_set.datum_from_token_set(tokens, ids, target_probs=probs))
    return data, kept_rows


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    columns = ("text", "label_probs"), ("question", "answer")
    columns = (*((*names, "labels") for names in columns), *columns)
    train_rows, test_rows = train_test(config.dataset, columns, config.test_rows, config.seed)
    config = replace(
        config, labels=token_set.label_words([*train_rows, *test_rows], config.labels, RATINGS)
    )
    chance = 1 / len(config.labels)
    panels = [
        runs.Panel(config.divergence, "nats", ["divergence", "test_divergence"]),
        runs.Panel("held-out accuracy", "share of rows", ["test_accuracy"], chance, "chance"),
        runs.Panel("mass on the set", "probability", ["set_mass", "test_set_mass"]),
    ]
    progress = ("divergence",)
    with runs.Run.open(
        "token_set_kl", config, config.num_steps, flags, progress=progress, best="-test_divergence"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        tokenizer = run.tokenizer(client)
        num_given = len(train_rows) + len(test_rows)
        data, train_rows = build_data(train_rows, tokenizer, config, "train")
        test_data, test_rows = build_data(test_rows, tokenizer, config, "test")
        run.report_rows("rows", len(train_rows), len(test_rows), num_given, config.max_length)
        loss_fn = partial(
            token_set_kl_loss, divergence=config.divergence, mass_coef=config.mass_coef
        )

        def evaluate() -> tuple[dict[str, float], list[list[float]]]:
            logprobs = clients.score(client, test_data)
            metrics = clients.evaluate(loss_fn, test_data, logprobs)
            shares = [lp[-1].softmax(dim=-1).tolist() for lp in logprobs[:3]]
            return {f"test_{k}": v for k, v in metrics.items()}, shares

        before, shown_before = run.once("before", evaluate)
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            rows = batch_indices(len(data), config.batch_size, step, config.seed)
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom([data[row] for row in rows], loss_fn)
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            metrics = backward.result().metrics | (stepped.result().metrics or {})
            run.log(step, metrics)

        after, shown_after = evaluate()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out rows, before and after", before, after)
        targets = [d.loss_fn_inputs["target_probs"].tolist() for d in test_data[:3]]
        run.save_samples(
            [
                {"prompt": row.get("text") or row["question"]}
                | {
                    name: "  ".join(
                        f"{p:.2f}{k}" for p, k in zip(shares, config.labels, strict=True)
                    )
                    for name, shares in (("before", b), ("after", a), ("target", t))
                }
                for row, b, a, t in zip(
                    test_rows[:3], shown_before, shown_after, targets, strict=True
                )
            ]
        )
        run.print_results(adapter, panels)
        return after


if __name__ == "__main__":
    runs.main(Config, train)
