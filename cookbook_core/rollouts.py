"""Completions of many prompts at once, rewards that are numbers, and an exact entropy bonus."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core import chat
from cookbook_core.custom_loss import LossFn
from cookbook_core.errors import LossError, message
from cookbook_core.tinker.sampling import SamplingClient
from cookbook_core.tinker.types import Datum, ModelInput, SampledSequence, SamplingParams

if TYPE_CHECKING:
    import torch


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
        raise LossError(f"{where}: raised {type(error).__name__}: {error}") from error
    if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
        rule = f"{len(completions)} finite numbers, one per completion"
        raise LossError(message(where, "not usable", rule, rewards))
    return rewards


def with_entropy_bonus(loss_fn: LossFn, entropy_coef: float) -> LossFn:
    """`loss_fn` minus entropy_coef * sum_t weights[t] * H[t], for "vocab_logprobs".

    H[t] is the exact entropy (nats) of the model's distribution at position t, computed where
    "weights" is not 0; `loss_fn` gets the logprobs of target_tokens there, and 0 elsewhere. Pass
    what comes back with `loss_type_input="vocab_logprobs"`; it adds the metric "entropy", the mean
    of H over those positions.
    """

    def loss_of_vocab(data: list[Datum], vocab_logprobs: list[Any]) -> Any:
        import torch

        logprobs: list[torch.Tensor] = []
        entropies: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for datum, rows in zip(data, vocab_logprobs, strict=True):
            w = datum.loss_fn_inputs["weights"].to_torch()
            on = w.nonzero()[:, 0]
            chosen = rows[on]  # (C, V): the prompt's rows are never computed
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()[on]
            picked = chosen.gather(1, targets[:, None])[:, 0]
            logprobs.append(picked.new_zeros(len(w)).index_put((on,), picked))
            entropies.append(-(chosen.exp() * chosen).sum(dim=1))
            weights.append(w[on])
        loss, metrics = loss_fn(data, logprobs)
        entropy = torch.cat(entropies)
        bonus = entropy_coef * (torch.cat(weights).to(entropy) * entropy).sum()
        return loss - bonus, {**metrics, "entropy": entropy.mean()}

    return loss_of_vocab
