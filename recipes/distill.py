r"""Distillation: make the student's distribution the teacher's, token by token.

    L = mean over the answers' tokens of D( p(. | x, y before), q(. | x', y before) )     nats

p is the student in training, q the teacher: the model of a run, a LoRA folder, another model with
the same tokenizer (--teacher), or the student itself as the run starts. The teacher is asked x',
which is x inside --context: what it does when told to, the student learns to do unasked.

    --divergence  forward KL(q || p), reverse KL(p || q), or jensen_shannon
    --estimate    exact     over the whole vocabulary; on this machine only
                  top_k     forward, over the teacher's top_k likeliest tokens, renormalised
                  sampled   reverse: policy gradient with reward log q - log p of the student's own
                            tokens; forward: log p of the teacher's own tokens
    --answers     who writes y, at temperature 1: the student (on-policy) or the teacher

Papers: Agarwal et al. 2023 (GKD), arXiv 2306.13649; Askell et al. 2021 (context distillation),
arXiv 2112.00861. Left out: GKD's temperature and its mixture of both writers.

Reverse KL needs support. It weighs tokens by p: what the student never writes is in none of its
answers, so `sampled` learns nothing of it and `exact` little, while forward KL, which weighs by q,
learns it all. Where the student does it now and then, reverse KL comes closest. A service takes
top_k, or sampled where it takes one target per position only; exact is refused.

Data: column prompt, text or messages.

    python -m recipes.distill --context "reverse: {prompt}"     # about a minute on two cores
    python -m recipes.distill --teacher runs/sft-1 --dataset tiny/sft
    python -m recipes.distill             # the null: the teacher is the student, and all stays at 0

What you should see: held-out kl, the mean of log p - log q over tokens of the student's own
answers, falls from about 5 to 0.2, and agreement, the share of held-out prompts that both answer
with the same text at temperature 0, rises from 0 to over 0.95.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from cookbook_core import alignment, chat, clients, data, datum_from_prompt_completion, runs, tinker
from cookbook_core.errors import ConfigError

import torch

Divergence = Literal["forward", "reverse", "jensen_shannon"]
Data = list[tinker.Datum]
HAS_PROMPT = runs.Rule(lambda text: "{prompt}" in text, 'text with "{prompt}"')
Result = tuple[torch.Tensor, dict[str, float]]

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.distill`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/lists"
    """Hub name, local file or folder with a column prompt.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    teacher: str = ""
    """Run folder (for its final adapter), LoRA folder, or another model with the same tokenizer;
    empty: the student as the run starts."""
    context: Annotated[str, HAS_PROMPT] = "{prompt}"
    """What the teacher is asked; {prompt} stands for the prompt or, of messages, the last one."""
    init_from: str = ""
    """Run folder or LoRA folder that the student starts from; its rank replaces --lora_rank."""
    divergence: Divergence = "forward"
    """Which divergence: see the top of this file."""
    estimate: Literal["exact", "top_k", "sampled"] = "exact"
    """How it is estimated: see the top of this file."""
    answers: Literal["student", "teacher"] = "student"
    """Who writes the answers that both are compared on."""
    top_k: runs.PositiveInt = 20
    """Tokens compared by --estimate top_k."""
    num_steps: runs.PositiveInt = 60
    """Optimizer steps."""
    batch_size: runs.PositiveInt = 16
    """Prompts per step."""
    group_size: runs.PositiveInt = 4
    """Answers per prompt."""
    max_tokens: runs.PositiveInt = 24
    """Longest answer, tokens."""
    learning_rate: runs.PositiveFloat = 2e-3
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    test_rows: runs.PositiveInt = 100
    """Held-out prompts."""
    eval_every: runs.PositiveInt = 20
    """Steps between evaluations on the held-out prompts."""
    seed: int = 0
    """Seed of the adapter's initial values, of the order of the data and of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32 or bfloat16; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/distill-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)
        sampled = "reverse" if self.answers == "student" else "forward"
        needed = {"top_k": "forward", "sampled": sampled}.get(self.estimate, self.divergence)
        if self.divergence != needed:
            what = f"no estimate {self.estimate} of it from the {self.answers}'s answers"
            fix = f"Give --divergence {needed}, or --estimate exact."
            where, got = "Config.divergence", self.divergence
            raise ConfigError(where, what, expected=needed, got=got, fix=fix)


# ---- loss ------------------------------------------------------------------------ change me ----


def divergence_of(log_p: torch.Tensor, log_q: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Divergence of each row, `(R,)` nats >= 0, of distributions `(R, V)`; gradient flows to log_p.

    Adding p - q, which sums to 0, changes no value, but makes the gradient exactly 0 where p = q.
    """
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward":
        return (q * (log_q - log_p) + p - q).sum(-1)
    if divergence == "reverse":
        return (p * (log_p - log_q) - p + q).sum(-1)
    gap = -(log_p - log_q).abs()
    log_m = torch.maximum(log_p, log_q) + torch.log1p(torch.expm1(gap) / 2)
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def exact_loss(
    data: Data,
    vocab_logprobs: list[Any],
    *,
    divergence: Divergence,
    teacher_rows: Sequence[Any] | None = None,
) -> Result:
    """The divergence over the whole vocabulary, mean over the answers' tokens.

    Source: Agarwal et al. 2023, arXiv 2306.13649; its generalised JSD at beta = 1/2. Differs: no.

    Args:
        data: D datums with "weights" `(N_i,)`, 1 on the answer's C_i tokens.
        vocab_logprobs: D tables `(N_i, V)`, nats, a few rows at a time; gradient flows here.
        divergence: see the top of this file.
        teacher_rows: D tables `(C_i, V)` of the teacher's logprobs, nats; None: they are in the
            datums, "teacher_logprobs" `(N_i, V)`.
    Returns:
        loss: 0-d, nats per token. metrics: divergence, the same.
    Raises:
        DatumError: an input is missing or misaligned.
    """
    alignment.check_alignment(data, vocab_logprobs, "weights")
    on = [w != 0 for w in alignment.input_tensors(data, "weights")]
    if teacher_rows is None:
        alignment.check_alignment(data, vocab_logprobs, "teacher_logprobs")
        tables = alignment.input_tensors(data, "teacher_logprobs")
        teacher_rows = [table[mask] for table, mask in zip(tables, on, strict=True)]
    per_row = partial(divergence_of, divergence=divergence)
    parts = zip(vocab_logprobs, teacher_rows, on, strict=True)
    values = [alignment.map_rows(per_row, p, log_q, rows=mask) for p, log_q, mask in parts]
    loss = torch.cat(values).mean()
    return loss, {"divergence": loss.item()}


def top_k_loss(data: Data, logprobs: list[torch.Tensor]) -> Result:
    """KL(q || p) over the teacher's K likeliest tokens, mean over the answers' tokens.

        L = mean_t sum_k q[t,k] * (log q[t,k] - log p[t,k])      q renormalised over the K

    Only forward: what p gives to other tokens is missing on these K, so it counts all the same.

    Args:
        data: D datums with target_tokens and "teacher_logprobs" `(N_i, K)`, and "weights" `(N_i,)`.
        logprobs: D tensors `(N_i, K)`, nats; gradient flows here.
    Returns, Raises: as exact_loss.
    """
    flat = alignment.columns(data, logprobs, "weights", "teacher_logprobs")
    log_p, _, log_q = (x[flat[1] != 0] for x in flat)
    log_q = log_q.log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return loss, {"divergence": loss.item()}


def sampled_loss(data: Data, logprobs: list[torch.Tensor], *, divergence: Divergence) -> Result:
    """A KL's gradient from the answers' own tokens, mean over these.

        reverse  L =  mean_t log p[t] * (log p[t] - log q[t])     the bracket is constant
        forward  L = -mean_t log p[t]

    In expectation the gradient of each token's KL(p || q) if the student wrote the answers, of
    KL(q || p) if the teacher did. Reverse without support stays where it is: no answer contains
    what the student never writes, so the reward can only rank what it writes already.

    Args:
        data: D datums with "weights", 1 on the answer's tokens, and "teacher_logprobs", `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        divergence: reverse or forward.
    Returns, Raises: as exact_loss; the divergence is an estimate of the KL and may be negative.
    """
    flat = alignment.columns(data, logprobs, "weights", "teacher_logprobs")
    log_p, _, log_q = (x[flat[1] != 0] for x in flat)
    gap = (log_p - log_q).detach()
    if divergence == "reverse":
        return (log_p * gap).mean(), {"divergence": gap.mean().item()}
    return -log_p.mean(), {"divergence": (-gap).mean().item()}


def example_data(loss: str) -> Data:
    """Eight answers of two to four tokens and a teacher's logprobs, for `cookbook doctor`."""
    examples, random = [], torch.Generator().manual_seed(0)
    for i in range(8):
        datum = datum_from_prompt_completion([1, 2 + i], [7, 8, 9, 10][: 2 + i % 3])
        inputs, n = dict(datum.loss_fn_inputs), datum.model_input.length
        shape = {"exact_loss": (n, 11), "top_k_loss": (n, 3)}.get(loss, (n,))
        inputs["teacher_logprobs"] = torch.randn(shape, generator=random).log_softmax(-1)
        if loss == "top_k_loss":
            inputs["target_tokens"] = torch.randint(11, shape, generator=random)
        examples.append(tinker.Datum(datum.model_input, inputs))
    return examples


# ---- data ----------------------------------------------------------------------------------------


def in_context(prompt: Any, context: str) -> Any:
    """What the teacher is asked: `context` around the prompt, or around its last message."""
    text = context.replace("{prompt}", chat.last_text(prompt))
    return text if isinstance(prompt, str) else [*prompt[:-1], chat.with_text(prompt[-1], text)]


def with_tokens(rows: list[dict], tokenizer: Any, context: str, longest: int) -> list[dict]:
    """The rows whose prompt, asked plainly and in context, has at most `longest` tokens."""
    kept_rows = []
    for row in rows:
        with chat.naming(row):  # errors name the row
            extra, prompt = chat.template_arguments(row), row["prompt"]
            plain = chat.render_prompt(tokenizer, prompt, **extra)
            asked = chat.render_prompt(tokenizer, in_context(prompt, context), **extra)
        if max(len(plain), len(asked)) <= longest:
            kept_rows.append({**row, "student": plain, "teacher": asked})  # what each is given
    return kept_rows


def build_data(rows: list[dict], groups: list[list]) -> tuple[Data, Data]:
    """A datum of each answer, in order: after the student's prompt, and after the teacher's."""
    parts = [(row, s.tokens) for row, group in zip(rows, groups, strict=True) for s in group]
    own, asked = (
        [datum_from_prompt_completion(row[by], ids, score_prompt=False) for row, ids in parts]
        for by in ("student", "teacher")
    )
    return own, asked


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    if config.estimate == "exact" and flags and flags.base_url:
        what, fix = "exact needs this machine", "Give --estimate top_k or sampled."
        raise ConfigError("Config.estimate", what, got="a service (--base_url)", fix=fix)
    columns, seed = ("prompt",), config.seed
    train_rows, test_rows = data.train_test(config.dataset, columns, config.test_rows, seed)
    panels = [
        runs.Panel("divergence", "nats per token", ["divergence", "test_kl"], 0.0, "equal"),
        runs.Panel("held-out agreement", "share of prompts", ["test_agreement"], 0.0),
    ]
    progress = ("divergence", "test_agreement")
    with runs.Run.open(
        "distill", config, config.num_steps, flags, progress=progress, best="-test_kl"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        rank = config.lora_rank
        client = clients.start(service, config.model, config.init_from, rank, seed, run.checkpoint)
        if config.teacher:
            same_size = config.estimate == "exact"
            teacher = clients.open_teacher(service, config.teacher, client, same_size=same_size)
        else:
            teacher = clients.frozen_copy(service, client, config.model, run.once)
        tokenizer = run.tokenizer(client)
        num_given = len(train_rows) + len(test_rows)
        longest = (client.get_info().model_data.max_context_length or 10**9) - config.max_tokens - 1
        train_rows = with_tokens(train_rows, tokenizer, config.context, longest)
        test_rows = with_tokens(test_rows, tokenizer, config.context, longest)
        counts = (len(train_rows), len(test_rows), num_given, longest)
        run.report_rows("prompts", *counts, flag="a smaller --max_tokens")
        teacher_sampler = teacher.save_weights_and_get_sampling_client().result()

        def answer(rows: list[dict], by: str, count: int, seed: str = "", temperature: float = 1):
            """`count` answers to each row, written by "student" or "teacher" to its own prompt."""
            sampler = teacher_sampler
            if by == "student":
                sampler = client.save_weights_and_get_sampling_client().result()
            how = {"max_tokens": config.max_tokens, "temperature": temperature, "seed": seed}
            return clients.rollout(sampler, [row[by] for row in rows], count, **how)

        def likeliest(by: str) -> list[str]:
            groups = answer(test_rows, by, 1, temperature=0)
            return clients.texts_of(tokenizer, [group[0] for group in groups])

        expected = run.once("expected", lambda: likeliest("teacher"))

        def evaluate() -> tuple[dict[str, float], list[str]]:
            groups = answer(test_rows, "student", 2, f"{seed}/test")
            own, asked = build_data(test_rows, groups)
            own = clients.add_teacher_logprobs(teacher, own, asked)
            reverse = partial(sampled_loss, divergence="reverse")
            kl = clients.evaluate(reverse, own, clients.score(client, own))["divergence"]
            answers = likeliest("student")
            same = [a == b for a, b in zip(answers, expected, strict=True)]
            return {"test_kl": kl, "test_agreement": sum(same) / len(same)}, answers[:3]

        before, shown_before = run.once("before", evaluate)
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            chosen = data.batch_indices(len(train_rows), config.batch_size, step, seed)
            rows = [train_rows[i] for i in chosen]
            groups = answer(rows, config.answers, config.group_size, f"{seed}/{step}")
            own, asked = build_data(rows, groups)
            loss_fn, form = top_k_loss, "logprobs"
            if config.estimate == "exact":
                tables = clients.vocab_logprobs(teacher, asked)
                loss_fn = partial(exact_loss, divergence=config.divergence, teacher_rows=tables)
                form = "vocab_logprobs"
            elif config.estimate == "top_k":
                own = clients.add_top_logprobs(teacher_sampler, own, asked, config.top_k)
            else:
                own = clients.add_teacher_logprobs(teacher, own, asked)
                loss_fn = partial(sampled_loss, divergence=config.divergence)
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom(own, loss_fn, loss_type_input=form)
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            run.log(step, backward.result().metrics | (stepped.result().metrics or {}))

        after, shown_after = evaluate()
        run.log(config.num_steps, after)
        adapter = client.save_weights_for_sampler("final").result().path
        run.save_before_after("Held-out prompts, before and after", before, after)
        prompts = [chat.last_text(row["prompt"]) for row in test_rows[:3]]
        texts = zip(prompts, shown_before, shown_after, expected[:3], strict=True)
        names = ("prompt", "before", "after", "teacher")
        run.save_samples([dict(zip(names, each, strict=True)) for each in texts])
        run.print_results(adapter, panels)
        return after


if __name__ == "__main__":
    runs.main(Config, train)
