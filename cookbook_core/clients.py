"""What every recipe does with clients: start one, freeze a copy of it, score and sample under it.

Only names of the `tinker` SDK are used, so a client of a hosted service will do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core import chat
from cookbook_core.custom_loss import logprobs_from_output
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
    """The client a run trains: a fresh LoRA adapter, or what `init_from` holds.

    That is a LoRA's folder, or a run's folder for its final adapter; its rank and alpha hold, and
    lora_rank and seed are not used. The unembedding is left alone. Where there is a `checkpoint`,
    of a run that goes on, it is that, optimizer and all, and the rest is not used.
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
    """The final adapter of a run folder, said in a line; anything else is given back as it is.

    Raises:
        ConfigError: the run has no final adapter; its checkpoints are named.
    """
    if not has_begun(usable_path("Config.init_from", init_from, ConfigError)):
        return init_from
    try:
        folder, _ = find_checkpoint(init_from)
    except ConfigError as error:
        mend = f"Give the folder of a checkpoint that is in {init_from}/checkpoints."
        raise error.replace(where="Config.init_from", fix=mend) from error
    print(f"init_from {init_from}: starting from {folder}")
    return str(folder)


def frozen_copy(
    service: ServiceClient,
    client: TrainingClient,
    model: str,
    once: Callable[..., Any] | None = None,
) -> TrainingClient:
    """A second client with the first one's weights as they were when the run began.

    Nobody trains it, so it stays what it is: the reference of DPO and of KL terms. Scoring goes
    through the same path, so at the start both give the same bits.

    Args:
        service: where both live.
        client: with weights as the run begins; not looked at in a run that goes on.
        model: the base model.
        once: `Run.once`, with which weights saved under the name "reference" in a new run are read
            from there in one that goes on; None saves them now.
    """

    def save() -> str:
        return client.save_state("reference", overwrite=True).result().path

    path = save() if once is None else once("reference", save)
    return service.create_training_client_from_state(path, model).result()


def score(client: TrainingClient, data: Sequence[Datum]) -> list[torch.Tensor]:
    """Logprobs of the datums' target_tokens under a client's present weights, no gradient.

    Returns:
        D tensors, nats, each of the shape of its target_tokens.
    """
    return logprobs_from_output(client.forward(list(data), "cross_entropy").result(), data)


def add_ref_logprobs(reference: TrainingClient, data: Sequence[Datum]) -> list[Datum]:
    """The same datums, each carrying the reference's logprobs of its own tokens."""
    ref_logprobs = score(reference, data)
    return [with_inputs(d, ref_logprobs=lp) for d, lp in zip(data, ref_logprobs, strict=True)]


def offers_sampling(service: ServiceClient, model: str) -> bool:
    """Whether there is sampling from the model; where there is not, why is printed.

    A service may train only (TuFT without vLLM). A recipe that samples just to show or to measure
    asks this first, and goes on without. The base model is asked for, as a training client whose
    request fails may be of no use afterwards.
    """
    try:
        service.create_sampling_client(base_model=model).result()
    except RequestError as error:
        print(f"No sampling here, so what needs it is left out: {error}")
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
    """Sample completions of each prompt, all decoded together, until the answer's end token.

    Args:
        sampler: the weights to sample from.
        prompts: token ids, such as `chat.render_prompt` gives.
        num_samples: completions per prompt.
        max_tokens: of each completion.
        temperature: 0 takes the likeliest token each time.
        seed: fixes every completion; text such as f"{seed}/{step}" gives each step its own.
    Returns:
        For each prompt, num_samples sequences: token ids (train on these) and their logprobs.
    Raises:
        DatumError, ConfigError: a prompt or parameter the sampler refuses.
    """
    seeds, stop = random.Random(str(seed)), chat.stop_tokens(sampler.get_tokenizer())
    futures = []
    for prompt in prompts:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seeds.getrandbits(60), stop=stop
        )
        futures.append(sampler.sample(ModelInput.from_ints(prompt), num_samples, params))
    return [future.result().sequences for future in futures]


def texts_of(tokenizer: Any, sequences: Sequence[SampledSequence]) -> list[str]:
    """What was written, without end tokens: for rewards and for people, never to train on."""
    return [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in sequences]


def grade(
    reward_fn: Callable[[Any, list[str]], Sequence[float]],
    row: Mapping[str, Any],
    completions: list[str],
) -> list[float]:
    """`reward_fn(row, completions)`, one number per completion of the row's prompt, checked.

    Raises:
        LossError: it raised, returned another count, or a number that is not finite; the message
            names the prompt.
    """
    where = f"reward for the prompt {chat.last_text(row['prompt'])!r}"
    try:
        rewards = [float(value) for value in reward_fn(row, completions)]
    except Exception as error:
        raise LossError.caused_by(where, error) from error
    if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
        rule = f"{len(completions)} finite numbers, one per completion"
        raise LossError(where, "not usable", expected=rule, got=rewards)
    return rewards
