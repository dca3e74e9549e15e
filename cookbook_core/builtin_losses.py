"""The losses `forward_backward` knows by name, as ordinary functions of logprobs.

They reach the model through the same driver as a user's own loss: the backend knows none of them.
All sum over the tokens of all datums, so gradients add up over calls.

Source of every formula: Thinking Machines' "Loss Functions" page for the `tinker` API. Differs:
log-ratios are capped at 20 (a ratio of 4.9e8) before exp, so one stray token cannot give inf.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook_core.alignment import align_weights, input_tensor, weighted_sum
from cookbook_core.errors import ConfigError, DatumError, check_choice, is_finite
from cookbook_core.types import Datum

if TYPE_CHECKING:
    import torch

    from cookbook_core.custom_loss import LossFn

MAX_LOG_RATIO = 20.0

Returned = tuple["torch.Tensor", dict[str, float]]


def cross_entropy(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
    """L = -sum_i sum_t weights[i][t] * logprobs[i][t], nats; weights default to 1.

    `(N, K)` targets with `(N, K)` weights give the cross-entropy against soft labels.
    """
    import torch

    terms = [
        weighted_sum(lp, datum.loss_fn_inputs.get("weights", torch.ones_like(lp)))
        for datum, lp in zip(data, logprobs, strict=True)
    ]
    return -torch.stack(terms).sum(), {}


def importance_sampling(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
    """L = -sum ratio * A, with ratio = exp(logprobs - sampling logprobs), A the advantages."""
    return _sum_over_tokens(data, logprobs, lambda lp, log_ratio, a: -_ratio(log_ratio) * a)


def ppo(
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Returned:
    """L = -sum min(ratio * A, clip(ratio, low, high) * A). Schulman et al. 2017, 1707.06347."""
    import torch

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        del lp
        ratio = _ratio(log_ratio)
        clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
        return -torch.minimum(ratio * a, clipped * a)

    return _sum_over_tokens(data, logprobs, term)


def cispo(
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Returned:
    """L = -sum stopgrad(clip(ratio, low, high)) * logprobs * A. MiniMax 2025, 2506.13585."""

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        ratio = _ratio(log_ratio.detach()).clamp(clip_low_threshold, clip_high_threshold)
        return -ratio * lp * a

    return _sum_over_tokens(data, logprobs, term)


def dro(data: Sequence[Datum], logprobs: Sequence[torch.Tensor], *, beta: float = 0.05) -> Returned:
    """L = -sum (logprobs * A - beta/2 * (logprobs - sampling logprobs)^2).

    Richemond et al. 2024, 2405.19107. beta in reward units per nat.
    """

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -(lp * a - 0.5 * beta * log_ratio.square())

    return _sum_over_tokens(data, logprobs, term)


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _sum_over_tokens(
    data: Sequence[Datum], logprobs: Sequence[torch.Tensor], term: Any
) -> Returned:
    """Sum `term(logprobs, log_ratio, advantages)` over every token with a non-zero weight.

    What stands at a token without weight, NaN included, touches neither value nor gradient.

    Raises:
        DatumError: an input that has not the shape of the logprobs.
    """
    import torch

    total = []
    for i, (datum, lp) in enumerate(zip(data, logprobs, strict=True)):
        inputs = [input_tensor(datum, key, lp) for key in ("logprobs", "advantages")]
        for key, value in zip(("logprobs", "advantages"), inputs, strict=True):
            if value.shape != lp.shape:
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                what = "shape does not match target_tokens"
                raise DatumError(where, what, expected=tuple(lp.shape), got=tuple(value.shape))
        weights = datum.loss_fn_inputs.get("weights", torch.ones_like(lp))
        _, w = align_weights(lp, weights)
        idle = (w == 0).reshape(w.shape + (1,) * (lp.dim() - w.dim()))
        lp, sampled, advantages = (x.masked_fill(idle, 0.0) for x in (lp, *inputs))
        total.append(weighted_sum(term(lp, lp - sampled, advantages), w))
    return torch.stack(total).sum(), {}


BUILTIN_LOSSES: dict[str, Any] = {
    f.__name__: f for f in (cross_entropy, importance_sampling, ppo, cispo, dro)
}
_NEEDS_RL = ("target_tokens", "logprobs", "advantages")


def needed_inputs(name: str) -> tuple[str, ...]:
    """The loss_fn_inputs the built-in loss `name` cannot do without."""
    return ("target_tokens",) if name == "cross_entropy" else _NEEDS_RL


@dataclass(frozen=True)
class BuiltinLoss:
    """A built-in loss with its options bound. A service may be sent its name instead."""

    name: str
    config: Mapping[str, float] = field(default_factory=dict)

    @property
    def func(self) -> Any:
        """The plain function."""
        return BUILTIN_LOSSES[self.name]

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
        """The loss, and no metrics."""
        return self.func(data, logprobs, **self.config)


def builtin_loss(name: str, config: Mapping[str, float | str] | None = None) -> BuiltinLoss:
    """Look up a built-in loss and bind its configuration.

    Raises:
        ConfigError: unknown loss, or an option the loss does not have (nearest match suggested).
    """
    check_choice(ConfigError, "loss_fn", "unknown loss", name, BUILTIN_LOSSES)
    if not isinstance(config, Mapping | None):
        raise ConfigError(
            "loss_fn_config", "wrong type", expected="a dict or None", got=repr(config)
        )
    loss = BUILTIN_LOSSES[name]
    options = [
        p.name
        for p in inspect.signature(loss).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for key, value in (config or {}).items():
        where = f'loss_fn_config["{key}"]'
        what = f"unknown option of {name}" if options else f"{name} has no options"
        check_choice(ConfigError, where, what, key, options)
        if not is_finite(value):
            raise ConfigError(where, "not a number", expected="a finite number", got=repr(value))
    return BuiltinLoss(name, {key: float(value) for key, value in (config or {}).items()})


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
