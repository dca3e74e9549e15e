r"""GRPO over episodes of several turns: learn to use a tool, from a reward at the end.

    L = sum over sampled tokens of w * (-ratio * A + kl_coef * KL)
    ratio = p(token) / p_sampled(token),   w = 1 / number of sampled tokens of the step
    A = reward of the episode - mean reward of its group; a group of equal rewards is left out
    KL = ratio (constant) * (log p - log p_ref)^2 / 2, whose gradient is that of KL(p || p_ref)

An episode is a conversation with an environment: the policy p answers, the environment replies, and
so on until it is over, or cut off after max_turns answers (reward 0). Each step plays group_size
episodes of every prompt at temperature 1, all together, turn by turn, and descends L on the sampled
token ids. What the environment wrote and the headers between turns are read by the model and have
no weight, so no gradient. p_ref is the model as the run starts. Nats.

Papers: Shao et al. 2024, arXiv 2402.03300 (GRPO); Liu et al. 2025, arXiv 2503.20783: rewards are
not divided by the group's standard deviation. Left out: clipping, which never acts in the one
update that each rollout gets here; other KL estimators (recipes/grpo.py has both); rewards of
single turns (give datum_from_turns an advantage for each answer).

Data: columns prompt, text or messages, and answer, which the environment reads. The bundled task is
sums of three digits, too hard for the bundled model; but it may write "compute 318 + 274", and a
calculator replies "592". Reward: 1 for the right number as last answer. GRPO reinforces only what
happens now and then: the first command teaches to call in four of ten rows, else to answer wrongly.

    python -m recipes.sft --dataset tiny/calculator --train_on all --learning_rate 5e-3 \
        --log_path runs/calls
    python -m recipes.tool_rl --init_from runs/calls    # each one to two minutes on two cores
    python -m recipes.tool_rl --model Qwen/Qwen3-0.6B --dataset my_questions.jsonl --max_tokens 256

What you should see: reward from about 0.4, the warm start's own rate, to over 0.9, because calls
rise from about 0.4 to 1; the null, unaided, the reward without a call, stays below 0.01.
"""

from dataclasses import dataclass, field
from functools import partial
from re import fullmatch
from typing import Annotated, Literal

from cookbook_core import chat, clients, datum_from_turns, runs, tinker
from cookbook_core.alignment import columns
from cookbook_core.data import batch_indices, train_test

import torch

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.tool_rl`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/calculator"
    """Hub name, local file or folder with columns prompt, answer.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder or LoRA folder to start from and the reference; its rank replaces --lora_rank."""
    reply_role: Literal["tool", "user"] = "tool"
    """Role of the environment's messages; user for chat templates without tools."""
    max_turns: runs.PositiveInt = 3
    """Answers of an episode; one that is not over then is cut off, with reward 0."""
    max_tokens: runs.PositiveInt = 16
    """Longest answer, tokens."""
    kl_coef: runs.NonNegativeFloat = 0.02
    """Weight of the KL term; 0 leaves it out."""
    num_steps: runs.PositiveInt = 30
    """Rollout steps."""
    batch_size: runs.PositiveInt = 16
    """Prompts per step."""
    group_size: Annotated[int, runs.Rule(lambda size: size >= 2, ">= 2")] = 8
    """Episodes per prompt."""
    learning_rate: runs.PositiveFloat = 5e-4
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    test_rows: runs.PositiveInt = 100
    """Held-out prompts, four episodes each."""
    eval_every: runs.PositiveInt = 10
    """Steps between evaluations on the held-out prompts."""
    seed: int = 0
    """Seed of the adapter's initial values, of the order of the data and of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32 or bfloat16; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/tool_rl-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- environment ----------------------------------------------------------------- change me ----


class Calculator:
    """A `clients.Environment`: replies to `compute 318 + 274`; any other answer ends the episode.

    Reward 1 for the row's answer and nothing else; a call costs nothing.
    """

    def __init__(self, row: dict) -> None:
        self.answer = str(row["answer"]).strip()

    def step(self, answer: str) -> tuple[str, float, bool]:
        """Return (reply, reward, done)."""
        call = fullmatch(r"compute (\d+) ([+-]) (\d+)", answer.strip())
        if call:
            left, right = int(call[1]), int(call[3])
            return str(left + right if call[2] == "+" else left - right), 0.0, False
        return "", float(answer.strip() == self.answer), True


# ---- loss ------------------------------------------------------------------------ change me ----


def tool_rl_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor], *, kl_coef: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy gradient with a KL term, summed under the datums' weights.

        L = sum_t weights[t] * (-ratio A + kl_coef * ratio (log p - log p_ref)^2 / 2)[t]

    Source: Shao et al. 2024, arXiv 2402.03300, equation 3. Differs: see the top of this file; the
    log-ratio is capped at 20 either way, so that no stray token gives inf.

    Args:
        data: D datums with "weights" (0 on all that was not sampled), "advantages",
            "sampling_logprobs" and "ref_logprobs", all `(N_i,)`.
        logprobs: D tensors `(N_i,)`, nats; gradient flows here.
        kl_coef: >= 0, weight of the KL term, in which the ratio carries no gradient.
    Returns:
        loss: 0-d.
        metrics: ratio_max, logprob_gap (largest |log p - log p_sampled|, nats: the sampler against
            the scorer).
    Raises:
        DatumError: an input missing or misaligned.
    """
    keys = ("weights", "advantages", "sampling_logprobs", "ref_logprobs")
    flat = columns(data, logprobs, *keys)
    lp, weights, advantages, sampled, ref = (x[flat[1] != 0] for x in flat)
    ratio = (lp - sampled).clamp(-20.0, 20.0).exp()
    kl = ratio.detach() * (lp - ref) ** 2 / 2
    return (weights * (kl_coef * kl - ratio * advantages)).sum(), {
        "ratio_max": ratio.max().item(),
        "logprob_gap": (lp - sampled).abs().max().item(),
    }


def example_data() -> list[tinker.Datum]:
    """Two groups of eight episodes of one or two answers, for `cookbook doctor`."""
    data = []
    for i in range(16):
        turns = [([1, 2 + i // 8], [4, 5 + i % 2, 6]), ([7, 8], [9, 10][: 1 + i % 2])][: 1 + i % 3]
        logprobs = [[-0.3 - (i + t) / 16 for t in range(len(answer))] for _, answer in turns]
        inputs = {"advantages": 0.5 - i % 2, "weights": 1 / 64, "sampling_logprobs": logprobs}
        data.append(datum_from_turns(turns, ref_logprobs=-0.5 - i / 40, **inputs))
    return data


# ---- episodes ------------------------------------------------------------------------------------


@dataclass
class Episode:
    """A conversation so far: its messages, and the tokens that the model read and wrote."""

    row: dict
    environment: clients.CheckedEnvironment
    messages: list[chat.Message]
    given: list[int]  # since the last answer: the prompt, later what reply_tokens returns
    turns: list[tuple[list[int], list[int]]] = field(default_factory=list)  # (given, sampled)
    logprobs: list[list[float]] = field(default_factory=list)  # of the sampled tokens, nats
    reward: float = 0.0
    done: bool = False

    def tokens(self) -> list[int]:
        """All that the model is given for its next answer."""
        before = [token for given, answer in self.turns for token in (*given, *answer)]
        return before + self.given

    def advance(self, tokenizer, sequence: tinker.SampledSequence, reply_role: str) -> None:
        """Take the sampled answer, and ask the environment for its reply."""
        answer = [int(token) for token in sequence.tokens]
        (text,) = clients.texts_of(tokenizer, [sequence])
        reply, reward, self.done = self.environment.step(text)
        self.reward += reward
        self.turns.append((self.given, answer))
        self.logprobs.append([float(x) for x in sequence.logprobs or ()])
        messages, self.given = self.messages, []
        self.messages = [*messages, {"role": "assistant", "content": text}]
        if not self.done:
            replies = [{"role": reply_role, "content": reply}]
            with chat.naming(self.row):  # errors name the row
                arguments = chat.template_arguments(self.row)
                self.given = chat.reply_tokens(tokenizer, messages, answer, replies, **arguments)
            self.messages += replies


def with_prompt_tokens(rows: list[dict], tokenizer, longest: int) -> list[dict]:
    """The rows whose prompt has at most `longest` tokens, with these; text becomes a message."""
    for row in rows:
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return clients.with_prompt_tokens(rows, tokenizer, longest)


def play(
    sampler: tinker.SamplingClient, rows: list[dict], config: Config, longest: int, seed: str
) -> list[Episode]:
    """An episode of each row, in order, all advanced by one answer at a time.

    One not over after max_turns answers, or with more than `longest` tokens, gets reward 0.
    """
    tokenizer = sampler.get_tokenizer()
    episodes = [
        Episode(
            row, clients.CheckedEnvironment(Calculator, row), row["prompt"], row["prompt_tokens"]
        )
        for row in rows
    ]
    for turn in range(config.max_turns):
        live = [e for e in episodes if not e.done and len(e.tokens()) <= longest]
        if live:
            prompts = [episode.tokens() for episode in live]
            groups = clients.rollout(
                sampler, prompts, max_tokens=config.max_tokens, seed=f"{seed}/{turn}"
            )
            for episode, (sequence,) in zip(live, groups, strict=True):
                episode.advance(tokenizer, sequence, config.reply_role)
    for episode in episodes:
        if not episode.done:
            episode.reward = 0.0
    return episodes


def build_data(episodes: list[Episode], group_size: int) -> list[tinker.Datum]:
    """A datum of each episode, in order, made from the sampled token ids."""
    weight = 1 / sum(len(answer) for e in episodes for _, answer in e.turns)
    data = []
    for i, e in enumerate(episodes):
        group = episodes[i - i % group_size :][:group_size]
        advantage = e.reward - sum(other.reward for other in group) / group_size
        inputs = {"advantages": advantage, "sampling_logprobs": e.logprobs, "weights": weight}
        data.append(datum_from_turns(e.turns, score_prompt=False, **inputs))
    return data


def measure(episodes: list[Episode], data: list[tinker.Datum]) -> dict[str, float]:
    """Of all episodes: mean reward, unaided the part of it without a call, shares with a call and
    cut off. Of sampled tokens: kl, the mean of log p - log p_ref, nats."""
    flat = columns(data, "sampling_logprobs", "weights", "ref_logprobs")
    logprobs, _, ref_logprobs = (x[flat[1] != 0] for x in flat)
    alone = [e.reward for e in episodes if len(e.turns) == 1]
    return {
        "reward": sum(e.reward for e in episodes) / len(episodes),
        "calls": 1 - len(alone) / len(episodes),
        "unaided": sum(alone) / len(episodes),
        "cut": sum(not e.done for e in episodes) / len(episodes),
        "kl": (logprobs - ref_logprobs).mean().item(),
    }


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    fields = ("prompt", "answer")
    train_rows, test_rows = train_test(config.dataset, fields, config.test_rows, config.seed)
    panels = [
        runs.Panel("reward", "mean per episode", ["reward", "test_reward"]),
        runs.Panel("tool", "share of episodes, reward", ["test_calls", "test_unaided"]),
        runs.Panel("KL to the reference", "nats per token", ["kl", "test_kl"], 0.0, "untrained"),
        runs.Panel("episodes that teach nothing", "share", ["cut", "test_cut", "zero_variance"]),
    ]
    progress = ("reward", "calls", "kl")
    with runs.Run.open(
        "tool_rl", config, config.num_steps, flags, progress=progress, best="test_reward"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        reference = clients.frozen_copy(service, client, config.model, run.once)
        tokenizer = run.tokenizer(client)
        num_given = len(train_rows) + len(test_rows)
        longest = (client.get_info().model_data.max_context_length or 10**9) - config.max_tokens
        train_rows = with_prompt_tokens(train_rows, tokenizer, longest)
        test_rows = with_prompt_tokens(test_rows, tokenizer, longest)
        flag = "a smaller --max_tokens"
        run.report_rows("prompts", len(train_rows), len(test_rows), num_given, longest, flag)

        def sample(rows: list[dict], count: int, seed: str) -> tuple[list[Episode], list]:
            """Episodes, and their datums with ref_logprobs."""
            sampler = client.save_weights_and_get_sampling_client().result()
            rows = [row for row in rows for _ in range(count)]
            episodes = play(sampler, rows, config, longest, seed)
            return episodes, clients.add_ref_logprobs(reference, build_data(episodes, count))

        def evaluate() -> tuple[dict[str, float], list[str]]:
            episodes, data = sample(test_rows, 4, f"{config.seed}/test")
            shown = [" | ".join(str(m["content"]) for m in e.messages) for e in episodes[:12:4]]
            return {f"test_{k}": v for k, v in measure(episodes, data).items()}, shown

        before, shown_before = run.once("before", evaluate)
        if before["test_cut"] == 1:
            place = getattr(test_rows[0], "where", "the held-out rows")
            print(
                f"{place}: neither this episode nor another one is over after --max_turns answers"
            )
        elif before["test_reward"] == 0:
            print("no held-out episode has a reward: first run the first command of this file")
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            rows = batch_indices(len(train_rows), config.batch_size, step, config.seed)
            batch, seed = [train_rows[row] for row in rows], f"{config.seed}/{step}"
            episodes, data = sample(batch, config.group_size, seed)
            metrics = measure(episodes, data)
            size = config.group_size
            groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
            alive = [len({e.reward for e in group}) > 1 for group in groups]
            metrics["zero_variance"] = 1 - sum(alive) / len(alive)
            data = [d for i, d in enumerate(data) if alive[i // size]]
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            if data:
                loss_fn = partial(tool_rl_loss, kl_coef=config.kl_coef)
                backward = client.forward_backward_custom(data, loss_fn)
                stepped = client.optim_step(adam)
                metrics |= backward.result().metrics | (stepped.result().metrics or {})
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
