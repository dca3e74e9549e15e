"""What every recipe does with clients: start one, freeze a copy of it, score, sample, reward.

These functions call only what the `tinker` SDK has, so clients of a service work too. Recipes reach
rewards and environments from here as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook_core import chat, custom_loss
from cookbook_core.alignment import input_tensors
from cookbook_core.custom_loss import LossFn, logprobs_from_output
from cookbook_core.data.files import Row
from cookbook_core.datums import (
    TEMPERATURE,
    as_sequence,
    datum_from_prompt_completion,
    with_inputs,
)
from cookbook_core.environments import CheckedEnvironment as CheckedEnvironment
from cookbook_core.environments import Environment as Environment
from cookbook_core.errors import ConfigError, DatumError, RequestError
from cookbook_core.rewards import Completion
from cookbook_core.rewards import grade as grade
from cookbook_core.rewards import weights_by_name as weights_by_name
from cookbook_core.runs.run_folder import find_checkpoint, has_begun
from cookbook_core.storage.paths import is_on_service, usable_path
from cookbook_core.tinker import (
    Datum,
    ModelInput,
    SampledSequence,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)

if TYPE_CHECKING:
    import torch


def start(
    service: ServiceClient,
    model: str,
    init_from: str,
    lora_rank: int,
    seed: int,
    checkpoint: str | None = None,
) -> TrainingClient:
    """Create the client that a run trains; the unembedding gets no LoRA.

    Args:
        service: where to train.
        model: the base model.
        init_from: a LoRA folder, or a run folder for its final adapter, to start from. "" starts a
            fresh adapter.
        lora_rank: of a fresh adapter; not used with init_from or checkpoint.
        seed: of a fresh adapter's initial values.
        checkpoint: of a resumed run: restores weights and optimizer; init_from is not used then.
    Raises:
        ConfigError: init_from is a run without a final adapter. CheckpointError: not a checkpoint,
            or one that does not fit the model.
    """
    if checkpoint:
        restored = service.create_training_client_from_state_with_optimizer(checkpoint, model)
        return restored.result()
    if init_from:
        init_from = final_adapter(init_from)
        return service.create_training_client_from_state(init_from, model).result()
    created = service.create_lora_training_client(model, lora_rank, seed, train_unembed=False)
    return created.result()


def final_adapter(init_from: str, flag: str = "init_from") -> str:
    """Find, and print, the final adapter of a run folder; return any other path unchanged.

    Args:
        init_from: the path.
        flag: the Config field that has it.
    Raises:
        ConfigError: the run has no final adapter; its checkpoints are listed.
    """
    if not has_begun(usable_path(f"Config.{flag}", init_from, ConfigError)):
        return init_from
    try:
        folder, _ = find_checkpoint(init_from)
    except ConfigError as error:
        fix = f"{error.fix} Give the folder of a checkpoint that is in {init_from}/checkpoints."
        raise error.replace(where=f"Config.{flag}", fix=fix.strip()) from error
    print(f"{flag} {init_from}: starting from {folder}")
    return str(folder)


def frozen_copy(
    service: ServiceClient,
    client: TrainingClient,
    model: str,
    once: Callable[..., Any] | None = None,
) -> TrainingClient:
    """Create a second client with the weights that the first one had when the run started.

    It is never trained: the reference of DPO and of KL terms. It scores through the same path as
    the first, so at the start both give the same bits.

    Args:
        service: where both are created.
        client: with the run's initial weights; not used in a resumed run.
        model: the base model.
        once: `Run.once`: a new run saves the weights under the name "reference", and a resumed one
            loads them from there. None saves them now.
    """

    def save() -> str:
        return client.save_state("reference", overwrite=True).result().path

    path = save() if once is None else once("reference", save)
    return service.create_training_client_from_state(path, model).result()


def open_teacher(
    service: ServiceClient, teacher: str, student: TrainingClient, *, same_size: bool
) -> TrainingClient:
    """Create a client of a teacher, which is never trained.

    Args:
        service: where to create it.
        teacher: a run folder for its final adapter, a LoRA folder, a path on the service, or a
            model: a folder, a name on the Hub or one of the service's.
        student: the client that learns from it.
        same_size: require output layers of one size, for logprobs of the whole vocabulary.
    Raises:
        ConfigError: teacher and student have different vocabularies; or a run without a final
            adapter. CheckpointError, ModelError: it cannot be opened.
    """
    path = final_adapter(teacher, "teacher")
    if is_on_service(path) or Path(path, "adapter_config.json").is_file():
        opened = service.create_training_client_from_state(path).result()
    else:  # untrained, a LoRA adapter changes nothing
        created = service.create_lora_training_client(path, 1, 0, train_unembed=False)
        opened = created.result()
    _check_same_vocabulary(teacher, opened, student, same_size)
    return opened


def _check_same_vocabulary(
    name: str, teacher: TrainingClient, student: TrainingClient, same_size: bool
) -> None:
    """Raise a ConfigError unless every token has the same id for both."""
    theirs, ours = (client.get_tokenizer().get_vocab() for client in (teacher, student))
    where, what = "Config.teacher", f"{name} and the student have different vocabularies"
    if theirs != ours:
        differing = sorted(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
        first = differing[0]
        raise ConfigError(
            where,
            what,
            expected="the same id for every token",
            got=f"{len(theirs)} and {len(ours)} tokens, {len(differing)} of them different; "
            f"{first!r} is {theirs.get(first)} and {ours.get(first)}",
            fix="Give a teacher with the student's tokenizer.",
        )
    sizes = [c.get_info().model_data.vocab_size for c in (teacher, student)]
    if same_size and sizes[0] != sizes[1]:
        raise ConfigError(
            where,
            what,
            expected=f"{sizes[1]} logits, as the student has",
            got=f"{sizes[0]}; the tokens themselves are the same",
            fix="Compare the likeliest tokens alone (--estimate top_k).",
        )


def vocab_logprobs(client: TrainingClient, data: Sequence[Datum]) -> list[Any]:
    """Logprobs of every token, under the client's weights as they are now, without gradient.

    Only on this machine. Rows are computed when they are used: pass the tables to
    `alignment.map_rows`, as its others, and few rows are in memory at a time.

    Args:
        client: with a frozen unembedding, such as a recipe's.
        data: D datums; only rows at which "weights" is not 0 are taken.
    Returns:
        D tables `(C_i, V)`, nats, C_i the number of those rows.
    Raises:
        RequestError: from a service.
    """
    import torch

    tables: list[Any] = []

    def keep(data: list[Datum], rows: list[Any]) -> Any:
        on = input_tensors(data, "weights")
        tables.extend(table.subset(w.nonzero()[:, 0]) for table, w in zip(rows, on, strict=True))
        return torch.zeros(()), {}

    client.forward(list(data), keep, loss_type_input="vocab_logprobs").result()
    return tables


def add_teacher_logprobs(
    teacher: TrainingClient, data: Sequence[Datum], asked: Sequence[Datum]
) -> list[Datum]:
    """Copy the datums, each with the teacher's logprobs of its answer in "teacher_logprobs" `(N,)`.

    Args:
        teacher: scores `asked`.
        data: D datums of a prompt and, at its end, an answer of weight 1.
        asked: D datums of the same answers after the prompts that the teacher gets.
    """
    found = score(teacher, asked)
    return [
        _with_answer(d, teacher_logprobs=lp[len(lp) - _answer_length(d) :])
        for d, lp in zip(data, found, strict=True)
    ]


def add_top_logprobs(
    sampler: SamplingClient, data: Sequence[Datum], asked: Sequence[Datum], k: int
) -> list[Datum]:
    """Copy the datums, each with a teacher's k likeliest tokens at every token of its answer.

    Args:
        sampler: of the teacher.
        data: D datums of a prompt and, at its end, an answer of weight 1.
        asked: D datums of the same answers after the prompts that the teacher gets.
        k: tokens per position.
    Returns:
        D datums with target_tokens `(N, k)` and "teacher_logprobs" `(N, k)`, nats, both 0 on the
        prompt.
    """
    import torch

    prompts, added = [], []
    for datum in asked:  # the whole sequence is a prompt, whose tokens are scored
        last = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])
        prompts.append(datum.model_input.append_int(last))
    params = [SamplingParams(max_tokens=1, temperature=0)] * len(prompts)
    futures = sampler.sample_batch(prompts, 1, params, topk_prompt_logprobs=k)
    for datum, future in zip(data, futures, strict=True):
        lists = (future.result().topk_prompt_logprobs or [])[-_answer_length(datum) :]
        ids = torch.tensor([[token for token, _ in top or ()] for top in lists])
        logprobs = torch.tensor([[logprob for _, logprob in top or ()] for top in lists])
        added.append(_with_answer(datum, target_tokens=ids, teacher_logprobs=logprobs))
    return added


def _answer_length(datum: Datum) -> int:
    return int((datum.loss_fn_inputs["weights"].to_numpy() != 0).sum())


def _with_answer(datum: Datum, **rows: torch.Tensor) -> Datum:
    """The datum with inputs `(N, ...)`: rows `(C, ...)` of the answer, which ends it, after 0s."""
    missing = datum.model_input.length - _answer_length(datum)
    inputs = {k: x.new_zeros(missing + len(x), *x.shape[1:]) for k, x in rows.items()}
    for key, x in rows.items():
        inputs[key][missing:] = x
    return with_inputs(datum, **inputs)


def score(client: TrainingClient | SamplingClient, data: Sequence[Datum]) -> list[torch.Tensor]:
    """Compute logprobs of the datums' target_tokens under the client's weights, without gradient.

    Args:
        client: of weights in training, of a snapshot, or of a bare base model; the same weights
            give the same bits. All datums are scored in one pass, except by sampling clients of a
            service.
        data: D datums.
    Returns:
        D tensors, nats, each of the shape of its target_tokens.
    """
    return logprobs_from_output(client.forward(list(data), "cross_entropy").result(), data)


def evaluate(
    loss_fn: LossFn, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Compute a loss on held-out datums, with the checks and error messages of a training step.

    Args:
        loss_fn: see `custom_loss.LossFn`.
        data: D datums.
        logprobs: D tensors, nats, as `score` returns them.
    Returns:
        "loss", which may be NaN or infinite here, and the loss's own metrics.
    Raises:
        LossError: the loss raised, or returned another structure; its own lines come first.
    """
    result = custom_loss.evaluate(loss_fn, data, logprobs, finite=False)
    return {"loss": result.loss, **result.metrics}


def add_ref_logprobs(reference: TrainingClient, data: Sequence[Datum]) -> list[Datum]:
    """Copy the datums, each with the reference's logprobs of its own tokens in "ref_logprobs"."""
    ref_logprobs = score(reference, data)
    return [with_inputs(d, ref_logprobs=lp) for d, lp in zip(data, ref_logprobs, strict=True)]


def offers_sampling(service: ServiceClient, model: str) -> bool:
    """Whether the service can sample from the model; prints why not.

    A service may only train (TuFT without vLLM). A recipe that samples just to show or measure
    calls this first and leaves samples out if it is False. It tries the base model, because a
    training client may be unusable after a failed request.
    """
    try:
        service.create_sampling_client(base_model=model).result()
    except RequestError as error:
        print(f"This service cannot sample, so samples are left out: {error}")
        return False
    return True


def with_prompt_tokens(rows: Sequence[Row], tokenizer: Any, longest: int) -> list[Row]:
    """The rows whose prompt has at most `longest` tokens, each with these as "prompt_tokens"."""
    kept_rows = []
    for row in rows:
        with chat.naming(row):  # errors name the row
            tokens = chat.render_prompt(tokenizer, row["prompt"], **chat.template_arguments(row))
        if len(tokens) <= longest:
            kept_rows.append(row | {"prompt_tokens": tokens})
    return kept_rows


def rollout(
    sampler: SamplingClient,
    prompts: Sequence[Sequence[int] | ModelInput],
    num_samples: int = 1,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int | str = 0,
) -> list[list[SampledSequence]]:
    """Sample completions of each prompt, decoded as one unit, until the answer's end token.

    Args:
        sampler: the weights to sample from.
        prompts: P lists of token ids or ModelInputs, as `chat.render_prompt` returns.
        num_samples: completions per prompt.
        max_tokens: longest completion, tokens.
        temperature: 0 takes the likeliest token each time. Others than 1 change what the logprobs
            are of: build datums with `sampled_datum`, which are scored at the same temperature.
        seed: fixes every completion; text such as f"{seed}/{step}" gives each step its own.
    Returns:
        P lists of num_samples sequences: token ids (train on these) and their logprobs, nats.
    Raises:
        DatumError, ConfigError: a prompt or parameter that the sampler refuses.
    """
    seeds, stop = random.Random(str(seed)), chat.stop_tokens(sampler.get_tokenizer())
    params = [
        SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seeds.getrandbits(60), stop=stop
        )
        for _ in prompts
    ]
    inputs = [as_sequence(prompt) for prompt in prompts]
    futures = sampler.sample_batch(inputs, num_samples, params)
    return [list(future.result().sequences) for future in futures]


def sampled_datum(
    prompt_tokens: Sequence[int] | ModelInput, sequence: SampledSequence, **per_token: Any
) -> Datum:
    """Build a datum of a sampled completion, to be scored at the temperature it was sampled at.

    Args:
        prompt_tokens: the prompt it answers.
        sequence: of `rollout` or of a sampler.
        per_token: as for `datum_from_prompt_completion`.
    Returns:
        Datum with "weights" (1 on the completion), "sampling_logprobs" and "score_mask" `(N,)`, and
        "temperature" `()` where that is not 1: its logprobs are then those of softmax(logits /
        temperature), so that log p - sampling_logprobs is 0 before an update. A datum built in
        another way is scored at 1, whatever its tokens were sampled at.
    Raises:
        DatumError: no token was sampled, or no logprobs came with them.
    """
    if sequence.logprobs is None:
        where, fix = "sequence.logprobs", "Sample from a client that returns them."
        raise DatumError(where, "missing", expected="one per token", fix=fix)
    per_token = {"sampling_logprobs": sequence.logprobs, **per_token}
    datum = datum_from_prompt_completion(
        prompt_tokens, sequence.tokens, score_prompt=False, **per_token
    )
    if sequence.temperature == 1:
        return datum
    return with_inputs(datum, **{TEMPERATURE: sequence.temperature})


def texts_of(tokenizer: Any, sequences: Sequence[SampledSequence]) -> list[str]:
    """Decode sequences without end tokens, for rewards and for people: never train on the text.

    Returns:
        Texts, each a `rewards.Completion` with the sequence's `tokens` and `stop_reason`.
    """
    return [
        Completion.of(tokenizer.decode(s.tokens, skip_special_tokens=True), s) for s in sequences
    ]
