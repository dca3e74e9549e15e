r"""Bradley-Terry: a reward model out of preference pairs, read from two words of the model itself.

    L = -mean over pairs of log sigmoid(r(chosen) - r(rejected))
    r(answer) = log p(" yes" | ...) - log p(" no" | ...)

After each answer comes the question whether it was a good one. The reward r (nats) is how much
likelier the model finds the verdict " yes" than " no" as its next token. There is no new head: the
scorer is a LoRA adapter like any other, and starts from what the base model knows of both words.

Paper: Bradley and Terry 1952; as a reward model Ouyang et al. 2022, arXiv 2203.02155, equation 1.
Left out: margins between ratings, and the centring term that keeps the mean reward near 0.

Data: columns prompt, chosen, rejected, the same pairs as for recipes/dpo.py; each plain text, or
lists of messages as TRL has them, chosen and rejected with the one answer; or chosen and rejected
as whole conversations, whose shared turns at the start are the prompt.

    python -m recipes.bradley_terry             # bundled tiny model, under a minute on two cores
    python -m recipes.bradley_terry --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl \
        --verdicts Yes No

What you should see: held-out accuracy from about 0.5 to above 0.85; Bradley and Terry's loss from
about ln 2 = 0.693 downwards: one that stays there means that nothing was learnt. The run prints the
command that puts the scorer to use as the reward of recipes/grpo.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cookbook_core import chat, clients, errors, runs, tinker, token_set
from cookbook_core.data import batch_indices, train_test

import torch
import torch.nn.functional as F

# ---- config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of `python -m recipes.bradley_terry`."""

    model: str = "tiny"
    """Hugging Face causal LM: hub name or local folder; "tiny" is the bundled one."""
    dataset: str = "tiny/dpo"
    """Hub name, local file or folder with columns prompt, chosen, rejected, or the last two.
    NAME@TRAIN/TEST names other splits, "NAME@train[:5000]" a slice."""
    init_from: str = ""
    """Run folder (for its final adapter) or LoRA folder to start from, with its own rank and alpha
    instead of --lora_rank. Empty starts a fresh adapter."""
    question: str = "Was that a good answer?"
    """Question put to the model after each answer."""
    verdicts: tuple[str, str] = (" yes", " no")
    """The two replies compared, the good one first; each must be one token, space included."""
    num_steps: runs.PositiveInt = 40
    """Optimizer steps."""
    batch_size: runs.PositiveInt = 16
    """Pairs per step."""
    learning_rate: runs.PositiveFloat = 1e-3
    """Adam's step size at the first step; falls linearly to 0."""
    lora_rank: runs.PositiveInt = 32
    """Rank of the adapter (alpha is 32)."""
    max_length: runs.PositiveInt = 512
    """Longest prompt + answer + question, tokens; a pair with a longer one is dropped and
    counted."""
    test_rows: runs.PositiveInt = 100
    """Held-out pairs."""
    eval_every: runs.PositiveInt = 5
    """Steps between evaluations on the held-out pairs."""
    seed: int = 0
    """Seed of the adapter's initial values and of the order of the data."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    dtype: str = "auto"
    """Type of the base model: float32, bfloat16 or nf4; auto is bfloat16 on cuda, else float32."""
    log_path: str = ""
    """Run folder; empty takes the next free runs/bradley_terry-N."""

    def __post_init__(self) -> None:
        runs.check_fields(self)


# ---- loss ------------------------------------------------------------------------ change me ----


def bradley_terry_loss(
    data: list[tinker.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Bradley-Terry's loss over pairs, which lie interleaved: chosen, rejected, chosen, ...

        L = -mean_p log sigmoid(r[2p] - r[2p + 1]),   r[i] = logprobs[i][-1, 0] - logprobs[i][-1, 1]

    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 1. Differs: r is read from the model's
    own words rather than from a new linear head.

    Args:
        data: D = 2P datums.
        logprobs: D tensors `(N_i, 2)`, nats: log p of both verdicts at every position, of which the
            last is used; gradient flows there.
    Returns:
        loss: 0-d, nats; mean over pairs.
        metrics: accuracy in [0, 1] (a tie counts one half), reward_margin, chosen_reward and
            rejected_reward (nats).
    Raises:
        DatumError: odd number of datums.
    """
    if len(data) % 2:
        where, rule = f"data[{len(data) - 1}]", "chosen, rejected, chosen, rejected, ..."
        fix = "Keep both members of each pair in the batch."
        got = f"{len(data)} datums"
        raise errors.DatumError(where, "has no partner", expected=rule, got=got, fix=fix)
    reward = torch.stack([lp[-1, 0] - lp[-1, 1] for lp in logprobs])  # (D,)
    chosen, rejected = reward[0::2], reward[1::2]
    loss = -F.logsigmoid(chosen - rejected).mean()
    wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return loss, {
        "accuracy": wins.mean().item(),
        "reward_margin": (chosen - rejected).mean().item(),
        "chosen_reward": chosen.mean().item(),
        "rejected_reward": rejected.mean().item(),
    }


# ---- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """How an answer is put to the model: the tokenizer, the question and the two verdicts."""

    tokenizer: object
    question: str
    verdicts: tuple[str, str]

    def datum(self, row: dict, answer) -> tinker.Datum:
        """Build the datum whose last position predicts the verdict on an answer to a row."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            conversation = f"{prompt}{chat.last_text(answer)}\n\n{self.question}"
        else:
            chat.check_messages(prompt, "prompt")
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            chat.check_messages(answer, "answer")
            question = {"role": "user", "content": self.question}
            conversation = [*chat.join_answer(prompt, answer[-1]), question]
        arguments = chat.template_arguments(row)
        tokens = chat.render_prompt(self.tokenizer, conversation, **arguments)
        verdicts = token_set.single_tokens(self.tokenizer, self.verdicts)
        return token_set.datum_from_token_set(tokens, verdicts)


def build_pairs(
    rows: list[dict], judge: Judge, max_length: int
) -> tuple[list[tinker.Datum], list[dict]]:
    """Rows -> interleaved datums (chosen, rejected, ...), and the rows kept. Drop a pair if either
    member exceeds max_length tokens."""
    data, kept_rows = [], []
    for raw_row in rows:
        with chat.naming(raw_row):  # errors name the row
            row = chat.split_pair(raw_row)
            pair = [judge.datum(row, row[side]) for side in ("chosen", "rejected")]
        if max(datum.model_input.length for datum in pair) <= max_length:
            kept_rows.append(row)
            data += pair
    return data, kept_rows


# ---- the scorer ----------------------------------------------------------------------------------


def score_texts(
    client: tinker.TrainingClient, judge: Judge, row: dict, answers: Sequence
) -> list[float]:
    """Rewards (nats) of answers to a row's prompt under a client's present weights.

    A reward does not depend on the batch it is computed in, except for the last bits of float
    arithmetic.
    """
    data = [judge.datum(row, answer) for answer in answers]
    return [float(lp[-1, 0] - lp[-1, 1]) for lp in clients.score(client, data)]


def load_scorer(
    service: tinker.ServiceClient, path: str, model: str
) -> tuple[tinker.TrainingClient, Judge]:
    """Load a scorer that this recipe saved at `path`, on base model `model`, for `score_texts`.

    Raises:
        CheckpointError: no checkpoint, or one that this recipe did not save.
    """
    saved = service.get_checkpoint_metadata(path)
    if missing := {"question", "verdict_good", "verdict_bad"} - saved.keys():
        what, got = "not a scorer of recipes/bradley_terry.py", f"no {', '.join(sorted(missing))}"
        rule, fix = "its question and verdicts in the metadata", "Give the scorer it printed."
        raise errors.CheckpointError(path, what, expected=rule, got=got, fix=fix)
    client = service.create_training_client_from_state(path, model).result()
    verdicts = (saved["verdict_good"], saved["verdict_bad"])
    return client, Judge(client.get_tokenizer(), saved["question"], verdicts)


# ---- train ---------------------------------------------------------------------------------------


def train(config: Config, flags: runs.RunFlags | None = None) -> dict[str, float]:
    """Train from the start, or resume; return the held-out metrics at the end."""
    train_rows, test_rows = train_test(config.dataset, chat.PAIRS, config.test_rows, config.seed)
    panels = [
        runs.Panel("loss", "loss", ["loss", "test_loss"]),
        runs.Panel("held-out accuracy", "share of pairs", ["test_accuracy"], 0.5, "chance"),
        runs.Panel(
            "held-out rewards", "nats", ["test_chosen_reward", "test_rejected_reward"], 0.0, "even"
        ),
    ]
    progress = ("loss", "accuracy")
    with runs.Run.open(
        "bradley_terry", config, config.num_steps, flags, progress=progress, best="test_accuracy"
    ) as run:
        service = run.service_client(config.device, config.dtype)
        client = clients.start(
            service, config.model, config.init_from, config.lora_rank, config.seed, run.checkpoint
        )
        judge = Judge(run.tokenizer(client), config.question, config.verdicts)
        num_given = len(train_rows) + len(test_rows)
        data, train_rows = build_pairs(train_rows, judge, config.max_length)
        test_data, test_rows = build_pairs(test_rows, judge, config.max_length)
        run.report_rows("pairs", len(train_rows), len(test_rows), num_given, config.max_length)

        def evaluate() -> tuple[dict[str, float], list[torch.Tensor]]:
            logprobs = clients.score(client, test_data)
            metrics = clients.evaluate(bradley_terry_loss, test_data, logprobs)
            return {f"test_{k}": v for k, v in metrics.items()}, logprobs

        before = run.once("before", lambda: evaluate()[0])
        for step in run.steps(client):
            if step % config.eval_every == 0:
                run.log(step, evaluate()[0] if step else before)
            rows = batch_indices(len(data) // 2, config.batch_size, step, config.seed)
            batch = [data[2 * row + side] for row in rows for side in (0, 1)]
            adam = tinker.AdamParams(config.learning_rate * (1 - step / config.num_steps))
            backward = client.forward_backward_custom(batch, bradley_terry_loss)
            stepped = client.optim_step(adam)  # submitted before waiting: no gap between the two
            metrics = backward.result().metrics | (stepped.result().metrics or {})
            run.log(step, metrics)

        after, logprobs = evaluate()
        run.log(config.num_steps, after)

        good, bad = config.verdicts
        metadata = {"question": config.question, "verdict_good": good, "verdict_bad": bad}
        saved = client.save_weights_for_sampler("final", user_metadata=metadata).result().path
        run.save_before_after("Held-out pairs, before and after", before, after)
        reward = [float(lp[-1, 0] - lp[-1, 1]) for lp in logprobs[:6]]
        run.save_samples(
            [
                {
                    "prompt": chat.last_text(row["prompt"]),
                    "chosen": chat.last_text(row["chosen"]),
                    "its reward": f"{reward[2 * i]:+.2f} nats",
                    "rejected": chat.last_text(row["rejected"]),
                    "reward of that": f"{reward[2 * i + 1]:+.2f} nats",
                }
                for i, row in enumerate(test_rows[:3])
            ]
        )
        print(f"scorer: {saved}\nplot: {run.plot(panels)}")
        print(
            f"as a reward: python -m recipes.grpo --dataset {config.dataset} --max_tokens 24 "
            f"--rewards {saved}"
        )
        return after


if __name__ == "__main__":
    runs.main(Config, train)
