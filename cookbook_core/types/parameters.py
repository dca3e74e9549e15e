"""Parameters of requests: the optimizer, the adapter, how to sample."""

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
    """One optimizer step: torch.optim.AdamW with these values (defaults are the SDK's).

    Raises:
        ConfigError: a value AdamW cannot use: negative, not finite, or a beta of 1 or more.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 means no clipping."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, below = getattr(self, f.name), 1.0 if f.name.startswith("beta") else math.inf
            if not is_finite(value) or not 0 <= value < below:
                rule = f"0 <= {f.name} < {below:g}" if below < math.inf else "a finite number >= 0"
                raise ConfigError(
                    f"AdamParams.{f.name}", "out of range", expected=rule, got=repr(value)
                )
            object.__setattr__(self, f.name, float(value))


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """Chooses AdamW, the one optimizer there is here."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA adapter covers; alpha is 32 whatever the rank."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """How to generate.

    stop: None stops at the tokenizer's end-of-sequence token; strings or token ids stop at those
    instead; [] never stops before max_tokens.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    """Keep the k most likely tokens; -1 for all."""
    top_p: float = 1
    """Keep the smallest set of tokens with at least this much probability."""
