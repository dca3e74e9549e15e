"""Parameters of requests: the optimizer step, the adapter, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from cookbook_core.errors import ConfigError, is_finite

LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
SamplingClientKind: TypeAlias = Literal["snapshot"]


@dataclass(frozen=True)
class AdamParams:
    """Parameters of one optimizer step of torch.optim.AdamW; the defaults are the SDK's.

    Raises:
        ConfigError: a value that is negative or not finite, or a beta of 1 or more.
    """

    learning_rate: float = 1e-4
    """Step size."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: float = 1e-12
    """Added to the root of the running mean of the squared gradient."""
    weight_decay: float = 0.0
    """Each step first multiplies the weights by 1 - learning_rate * weight_decay."""
    grad_clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 means no clipping."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, below = getattr(self, f.name), 1.0 if f.name.startswith("beta") else math.inf
            if not is_finite(value) or not 0 <= value < below:
                rule = f"0 <= {f.name} < {below:g}" if below < math.inf else "a finite number >= 0"
                raise ConfigError(
                    f"AdamParams.{f.name}",
                    "out of range",
                    expected=rule,
                    got=repr(value),
                    fix=f"Leave it out for the default, {f.default:g}.",
                )
            object.__setattr__(self, f.name, float(value))


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """Selects AdamW, the only optimizer."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True)
class LoraConfig:
    """Rank, seed and layers of a LoRA adapter; alpha is 32 for every rank."""

    rank: int
    seed: int | None = None
    """Of the initial weights; None draws one."""
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """How to sample completions."""

    max_tokens: int | None = None
    """Most tokens to generate; None generates up to the model's context length."""
    seed: int | None = None
    """Of the random draws; None draws one."""
    stop: str | Sequence[str] | Sequence[int] | None = None
    """Strings or token ids at which to stop; None: the tokenizer's end-of-sequence token; []: only
    at max_tokens."""
    temperature: float = 1
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = -1
    """Sample from the k most likely tokens only; -1 for all."""
    top_p: float = 1
    """Sample from the smallest set of tokens that has at least this probability."""
