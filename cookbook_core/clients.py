"""What every recipe does with clients: start one, freeze a copy of it, score, sample.

These functions call only what the `tinker` SDK has, so clients of a service work too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core import chat, custom_loss
from cookbook_core.custom_loss import LossFn, logprobs_from_output
from cookbook_core.datums import with_inputs
from cookbook_core.errors import ConfigError, LossError, RequestError
from cookbook_core.runs.run_folder import find_checkpoint, has_begun
from cookbook_core.storage.paths import usable_path
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


def final_adapter(init_from: str) -> str:
    """Find, and print, the final adapter of a run folder; return any other path unchanged.

    Raises:
        ConfigError: the run has no final adapter; its checkpoints are listed.
    """
    if not has_begun(usable_path("Config.init_from", init_from, ConfigError)):
        return init_from
    try:
        folder, _ = find_checkpoint(init_from)
    except ConfigError as error:
        fix = f"{error.fix} Give the folder of a checkpoint that is in {init_from}/checkpoints."
        raise error.replace(where="Config.init_from", fix=fix.strip()) from error
    print(f"init_from {init_from}: starting from {folder}")
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


def rollout(
    sampler: SamplingClient,
    prompts: Sequence[Sequence[int]],
    num_samples: int = 1,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int | str = 0,
) -> list[list[SampledSequence]]:
    """Sample completions of each prompt, decoded as one unit, until the answer's end token.

    Args:
        sampler: the weights to sample from.
        prompts: P lists of token ids, such as `chat.render_prompt` returns.
        num_samples: completions per prompt.
        max_tokens: longest completion, tokens.
        temperature: 0 takes the likeliest token each time.
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
    inputs = [ModelInput.from_ints(prompt) for prompt in prompts]
    futures = sampler.sample_batch(inputs, num_samples, params)
    return [list(future.result().sequences) for future in futures]


def texts_of(tokenizer: Any, sequences: Sequence[SampledSequence]) -> list[str]:
    """Decode sequences without end tokens, for rewards and for people: never train on the text."""
    return [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in sequences]


def grade(
    reward_fn: Callable[[Any, list[str]], Sequence[float]],
    row: Mapping[str, Any],
    completions: list[str],
) -> list[float]:
    """Call `reward_fn(row, completions)` and check that it gives one number per completion.

    Returns:
        Rewards, in the order of the completions.
    Raises:
        LossError: it raised, or returned another count or a number that is not finite; the error
            names the prompt.
    """
    where = f"reward for the prompt {chat.last_text(row['prompt'])!r}"
    try:
        rewards = [float(value) for value in reward_fn(row, completions)]
    except Exception as error:
        raise LossError.caused_by(where, error) from error
    if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
        rule = f"{len(completions)} finite numbers, one per completion"
        fix = "Return them in the order of the completions; a failed one can be 0."
        raise LossError(where, "wrong return value", expected=rule, got=rewards, fix=fix)
    return rewards
