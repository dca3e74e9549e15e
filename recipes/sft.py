"""Supervised fine-tuning: make the given answers likelier, token by token.

    L = - sum over tokens of weights * log p(token | before) / sum of weights

p is the policy in training; weights are 1 on the answer's tokens (its end token included) and 0 on
the prompt's. Nats; the loss is a mean over all weighted tokens of the batch, so a long answer
counts for more than a short one.

Paper: the objective is maximum likelihood; LoRA is Hu et al. 2021, arXiv 2106.09685. Left out:
sequence packing by the recipe (the backend batches as it sees fit) and warm-up.

With --keep PROMPTS it keeps what it had: the model answers PROMPTS as the run starts, and its own
answers are trained on beside the new ones (replay), so that it still answers like that:

    L + keep_weight * mean over the kept answers' tokens of - log p(token | before)

Data: columns prompt, completion; each plain text, or lists of messages as TRL has them
    {"prompt": [{"role": "user", "content": "..."}],
     "completion": [{"role": "assistant", "content": "..."}]}
or a column messages with whole conversations, of which --train_on says which answers are trained
on: "each" makes a sequence of each, for templates that drop the thinking of earlier ones. Turns
after the last answer are not used. PROMPTS: a column prompt alone. In every recipe, an assistant
message may have tool_calls, and rows may have columns tools and chat_template_kwargs.

    python -m recipes.sft                       # bundled tiny model, about a minute on two cores
    python -m recipes.sft --keep tiny/keep      # and does not forget sums and reversed lists
    python -m recipes.sft --model Qwen/Qwen3-0.6B --dataset my_data.jsonl

What you should see: held-out exact match near 0 before (the bundled task is a skill the tiny model
has never seen) and above 0.8 after; test_loss falls with the training loss. Held-out loss that
rises while the training loss falls is overfitting: fewer steps, or more data. With --keep,
test_kept, the share of held-out PROMPTS answered as before the run, stays above 0.95; with
--keep_weight 0, which only measures it, it falls to about 0.55.
"""

from dataclasses import dataclass
from typing import Literal

from cookbook_core import (
    chat,
    clients,
    data,
    datum_from_tokens_weights,
    regularise,
    runs,
    tinker,
    weighted_sums,
)

import torch

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.sft`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/sft"
    """Hub name, local file or folder with columns prompt, completion, or messages.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    train_on: Literal["last", "all", "each"] = "last"
    """Which assistant messages of a messages column are trained on; each: one sequence for each."""
    keep: str = ""
    """Dataset with a column prompt, or messages: what the model should still answer as it does
    when the run starts. Empty: nothing is kept."""
    keep_weight: runs.NonNegativeFloat = 1.0
    """Weight of the kept answers' loss; 0 only measures what is forgotten."""
    keep_batch: runs.PositiveInt = 16
    """Kept answers per step beside batch_size, or all of them if there are fewer."""
    init_from: str = ""
    """Run folder (for its final adapter) or LoRA folder to start from, with its own rank and alpha
    instead of --lora_rank. Empty starts a fresh adapter."""
    num_steps: runs.PositiveInt = 200
    """Optimizer steps."""
    batch_size: runs.PositiveInt = 32
    """Sequences per step."""
    learning_rate: runs.PositiveFloat = 2e-3
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    max_length: runs.PositiveInt = 512
    """Longest sequence, tokens; longer ones are dropped and counted."""
    test_rows: runs.PositiveInt = 100
    """Held-out sequences, and of --keep held-out prompts."""
    max_tokens: runs.PositiveInt = 64
    """Longest answer generated, to keep or to measure, tokens."""
    eval_every: runs.PositiveInt = 20
    """Steps between evaluations on the held-out sequences."""
    seed: int = 0
    """Seed of the adapter's initial values and of the order of the data."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/sft-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def sft_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy per weighted token.

        L = - sum_i sum_t weights[i][t] * logprobs[i][t] / sum_i sum_t weights[i][t]

    Source: maximum likelihood. Differs from the built-in "cross_entropy", which is a sum.

    Args:
        data: D datums with "weights" `(N_i,)`, 0 where nothing is learnt.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
    Returns:
        loss: 0-d, nats per token; mean over all weighted tokens of the batch.
        metrics: perplexity, exp(loss).
    Raises:
        DatumError: weights missing, or not one for each logprob.
    """
    sums = weighted_sums(data, logprobs)  # checks that every datum has its weights
    total = sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)
    loss = -sums.sum() / total
    return loss, {"perplexity": loss.exp().item()}


# ---- data ----------------------------------------------------------------------------------------


def build_data(
    rows: list[dict], tokenizer, max_length: int, train_on: Literal["last", "all", "each"]
) -> tuple[list[tinker.Datum], list[dict]]:
    """Rows -> datums, and the rows that were kept: those of at most max_length tokens."""
    datums, kept_rows = [], []
    for row in rows:
        with chat.naming(row):  # errors name the row
            extra = chat.template_arguments(row)
            if "messages" in row:
                which = "all" if train_on == "all" else "last"
                tokens, weights = chat.render_messages(tokenizer, row["messages"], which, **extra)
            else:
                parts = chat.render_completion(tokenizer, row["prompt"], row["completion"], **extra)
                tokens = parts[0] + parts[1]
                weights = [0.0] * len(parts[0]) + [1.0] * len(parts[1])
            if len(tokens) <= max_length:
                kept_rows.append(row)
                datums.append(datum_from_tokens_weights(tokens, weights))
    return datums, kept_rows


def question_and_answer(row: dict) -> tuple[str | list[chat.Message], str]:
    """The prompt of a row, and the text expected back for an exact match; "" where it has none."""
    if "messages" in row:
        prompt, answer = chat.before_last_answer(row["messages"], "messages")
        return prompt, chat.last_text([answer])
    return row["prompt"], chat.last_text(row["completion"]) if "completion" in row else ""


def expected_text(datum: tinker.Datum, tokenizer) -> str:
    """The text of the last answer trained on, as the template renders it: tool calls, thinking."""
    trained = datum.loss_fn_inputs["weights"].to_numpy() > 0
    end = int(trained.nonzero()[0][-1]) + 1
    start = end - int((~trained[:end][::-1]).argmax()) if not trained[:end].all() else 0
    tokens = datum.loss_fn_inputs["target_tokens"].to_numpy()[start:end]
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def prompt_tokens(rows: list[dict], tokenizer) -> list[list[int]]:
    """The tokens of each row's prompt."""
    tokens = []
    for row in rows:
        with chat.naming(row):  # errors name the row
            prompt, extra = question_and_answer(row)[0], chat.template_arguments(row)
            tokens.append(chat.render_prompt(tokenizer, prompt, **extra))
    return tokens


def generate(client: tinker.TrainingClient, rows: list[dict], max_tokens: int) -> list[str]:
    """The likeliest answer (temperature 0) to each row's prompt under the present weights."""
    tokenizer = client.get_tokenizer()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = prompt_tokens(rows, tokenizer)
    groups = clients.rollout(sampler, prompts, max_tokens=max_tokens, temperature=0)
    return clients.texts_of(tokenizer, [group[0] for group in groups])


def own_answers(
    client: tinker.TrainingClient, prompts: list[list[int]], config: Config
) -> list[list[int]]:
    """The tokens of one answer to each prompt, sampled at temperature 1 from the weights now."""
    sampler = client.save_weights_and_get_sampling_client().result()
    seed = f"{config.seed}/keep"
    groups = clients.rollout(sampler, prompts, max_tokens=config.max_tokens, seed=seed)
    return [[int(token) for token in group[0].tokens] for group in groups]


def build_kept(
    prompts: list[list[int]], answers: list[list[int]], max_length: int
) -> list[tinker.Datum]:
    """Datums of prompts and own answers, cut to max_length tokens, for the term replay alone."""
    datums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        datums.append(datum_from_tokens_weights(prompt + answer, weights, max_length))
    return regularise.keep_apart(datums)


def share_equal(answers: list[str], expected: list[str]) -> float:
    """Share of answers that are the expected text, surrounding whitespace apart."""
    hits = [a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)]
    return sum(hits) / len(hits)


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    columns = (("prompt", "completion"), ("messages",))
    train_rows, test_rows = data.train_test(config.dataset, columns, config.test_rows, config.seed)
    keep_rows, keep_test = [], []
    if config.keep:
        columns = (("prompt",), ("messages",))
        keep_rows, keep_test = data.train_test(config.keep, columns, config.test_rows, config.seed)
    panels = [
        runs.Panel("loss", "loss", ["loss", "test_loss", *(["replay"] if config.keep else [])]),
        runs.Panel("held-out exact match", "share", ["test_exact_match", "test_kept"], 0.0),
    ]
    progress = ("loss", "test_exact_match")
    with runs.Run.open(
        "sft", config, config.num_steps, flags, progress=progress, best="test_exact_match"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        tokenizer = run.tokenizer(client)
        if config.train_on == "each":
            train_rows, test_rows = (chat.answers_apart(rows) for rows in (train_rows, test_rows))
        num_given = len(train_rows) + len(test_rows)
        train_data, train_rows = build_data(
            train_rows, tokenizer, config.max_length, config.train_on
        )
        test_data, test_rows = build_data(test_rows, tokenizer, config.max_length, config.train_on)
        run.report_rows("sequences", len(train_rows), len(test_rows), num_given, config.max_length)
        expected = [expected_text(datum, tokenizer) for datum in test_data]
        samples = run.once("samples", lambda: clients.offers_sampling(service, config.model))

        loss_fn, kept, answers_kept = sft_loss, [], []
        if config.keep:
            loss_fn = regularise.regularised(
                sft_loss, replay=(config.keep_weight, regularise.replay)
            )
            prompts = prompt_tokens(keep_rows, tokenizer)
            prompts = [prompt for prompt in prompts if len(prompt) < config.max_length]
            print(f"kept: {len(prompts)} prompts of {len(keep_rows)}; the others are too long")
            answers = run.once("kept", lambda: own_answers(client, prompts, config))
            kept = build_kept(prompts, answers, config.max_length)
            answers_kept = run.once(
                "kept_test", lambda: generate(client, keep_test, config.max_tokens)
            )

        def evaluate() -> tuple[dict[str, float], list[str]]:
            logprobs = clients.score(client, test_data)
            loss = clients.evaluate(sft_loss, test_data, logprobs)["loss"]
            if not samples:
                return {"test_loss": loss}, ["(not sampled)"] * len(test_rows)
            answers = generate(client, test_rows, config.max_tokens)
            metrics = {"test_loss": loss, "test_exact_match": share_equal(answers, expected)}
            if config.keep:
                now = generate(client, keep_test, config.max_tokens)
                metrics["test_kept"] = share_equal(now, answers_kept)
            return metrics, answers

        before, answers_before = run.once("before", evaluate)
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            rows = data.batch_indices(len(train_data), config.batch_size, step, config.seed)
            batch = [train_data[row] for row in rows]
            if config.keep:
                size = min(config.keep_batch, len(kept))
                batch += [kept[i] for i in data.batch_indices(len(kept), size, step, config.seed)]
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom(batch, loss_fn)
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            metrics = backward.result().metrics | (stepped.result().metrics or {})
            run.log(step, metrics)

        after, answers_after = evaluate()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out, before and after", before, after)
        shown = [
            {
                "prompt": chat.last_text(question_and_answer(row)[0]),
                "before": b,
                "after": a,
                "expected": e,
            }
            for row, b, a, e in zip(
                test_rows[:3], answers_before[:3], answers_after[:3], expected[:3], strict=True
            )
        ]
        run.save_samples(shown)
        run.print_results(adapter, panels)
        return after


if __name__ == "__main__":
    runs.main(Config, train)
