"""The losses that `forward_backward` knows by name, as ordinary functions of logprobs.

They reach the model through the same driver as a user's own loss; the backend knows none of them.
All sum over the tokens of all datums, so gradients add up over calls. With i over datums and t
over positions (and candidates, where target_tokens is `(N, K)`):

    p[i][t]      logprobs, nats: log p of the target token under the current policy
    q[i][t]      sampling_logprobs, nats: the same under the policy that sampled it
    A[i][t]      advantages, reward units
    w[i][t]      weights, 1 where a datum has none; a position of weight 0 touches neither the
                 value nor the gradient, whatever stands there, NaN included
    ratio        exp(min(p - q, 20)): capped at 4.9e8, so one stray token cannot give inf

On a datum q is "sampling_logprobs" or, as the SDK names it, "logprobs". Options have the SDK's
names in `loss_fn_config`: "clip_low_threshold" and "clip_high_threshold" are clip_low, clip_high.

Source of the set and of its defaults: Thinking Machines' "Loss Functions" page for the `tinker`
API. Differs: the cap of the ratio, and weights in the four policy losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook_core.alignment import (
    align_weights,
    check_alignment,
    input_tensor,
    input_tensors,
    map_rows,
    weighted_sum,
)
from cookbook_core.datums import input_key, missing_input
from cookbook_core.errors import ConfigError, DatumError, check_choice, is_finite, raise_all
from cookbook_core.types import Datum

if TYPE_CHECKING:
    from cookbook_core.custom_loss import LossFn

    import torch

MAX_LOG_RATIO = 20.0

Returned = tuple["torch.Tensor", dict[str, float]]


def cross_entropy(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
    """Negative weighted log-likelihood of the target tokens; with `(N, K)`, against soft labels.

        L = -sum_i sum_t w[i][t] * p[i][t]

    Source: the log-likelihood itself. Differs: nothing.

    Args:
        data: D datums; "weights" `(N_i,)` or, beside `(N_i, K)` targets, `(N_i, K)`.
        logprobs: D tensors in the shape of target_tokens, nats; gradient flows here.
    Returns:
        loss: 0-d, nats; sum over tokens and datums.
        metrics: none.
    Raises:
        DatumError: no datum, or weights that do not have the length of the logprobs.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1, 2], [3])]
    >>> cross_entropy(data, [torch.tensor([-9.0, -0.5])])
    (tensor(0.5000), {})
    """
    import torch

    check_alignment(data, logprobs)
    terms = [
        weighted_sum(lp, _weights(datum, lp), where=f'data[{i}].loss_fn_inputs["weights"]')
        for i, (datum, lp) in enumerate(zip(data, logprobs, strict=True))
    ]
    return -torch.stack(terms).sum(), {}


def importance_sampling(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
    """Policy gradient, corrected for tokens that another policy sampled.

        L = -sum_i sum_t w[i][t] * ratio[i][t] * A[i][t]

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 6. Differs: a sum instead of a mean,
    and the cap of the ratio.

    Args:
        data: D datums; "sampling_logprobs" and "advantages" in the shape of target_tokens.
        logprobs: D tensors, each `(N_i,)` or `(N_i, K)`, nats; gradient flows here.
    Returns:
        loss: 0-d, reward units; sum over tokens and datums.
        metrics: none.
    Raises:
        DatumError: an input is missing, or has another shape than target_tokens.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1], [2], sampling_logprobs=-1.0, advantages=3.0)]
    >>> importance_sampling(data, [torch.tensor([-0.5])])  # -exp(0.5) * 3
    (tensor(-4.9462), {})
    """
    return _sum_over_tokens(data, logprobs, lambda lp, log_ratio, a: -_ratio(log_ratio) * a)


def ppo(
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    clip_low: float = 0.8,
    clip_high: float = 1.2,
) -> Returned:
    """PPO's clipped policy gradient: no gradient once a token's ratio has moved far enough.

        L = -sum_i sum_t w[i][t] * min(ratio * A, clip(ratio, clip_low, clip_high) * A)[i][t]

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7. Differs: a sum instead of a mean,
    and the cap of the ratio.

    Args:
        data: D datums; "sampling_logprobs" and "advantages" in the shape of target_tokens.
        logprobs: D tensors, each `(N_i,)` or `(N_i, K)`, nats; gradient flows here.
        clip_low: lower bound of the ratio, absolute (0.8, not 0.2).
        clip_high: upper bound of the ratio, absolute.
    Returns:
        loss: 0-d, reward units; sum over tokens and datums.
        metrics: none.
    Raises:
        DatumError: an input is missing, or has another shape than target_tokens.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1], [2], sampling_logprobs=-1.0, advantages=3.0)]
    >>> ppo(data, [torch.tensor([-0.5])])  # -1.2 * 3, since exp(0.5) > 1.2
    (tensor(-3.6000), {})
    """
    import torch

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        del lp
        ratio = _ratio(log_ratio)
        return -torch.minimum(ratio * a, ratio.clamp(clip_low, clip_high) * a)

    return _sum_over_tokens(data, logprobs, term)


def cispo(
    data: Sequence[Datum],
    logprobs: Sequence[torch.Tensor],
    *,
    clip_low: float = 0.8,
    clip_high: float = 1.2,
) -> Returned:
    """CISPO: the clipped ratio as a constant weight, so that every token keeps a gradient.

        L = -sum_i sum_t w[i][t] * stopgrad(clip(ratio, clip_low, clip_high))[i][t] * p * A[i][t]

    Source: MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, equations 4 and 5. Differs: a sum instead
    of a mean over tokens, absolute bounds, and a lower bound by default, which the paper leaves
    open (clip_low=0).

    Args:
        data: D datums; "sampling_logprobs" and "advantages" in the shape of target_tokens.
        logprobs: D tensors, each `(N_i,)` or `(N_i, K)`, nats; gradient flows here.
        clip_low: lower bound of the ratio, absolute (0.8, not 0.2).
        clip_high: upper bound of the ratio, absolute.
    Returns:
        loss: 0-d, reward units times nats; sum over tokens and datums.
        metrics: none.
    Raises:
        DatumError: an input is missing, or has another shape than target_tokens.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1], [2], sampling_logprobs=-1.0, advantages=3.0)]
    >>> cispo(data, [torch.tensor([-0.5])])  # -1.2 * -0.5 * 3
    (tensor(1.8000), {})
    """

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -_ratio(log_ratio.detach()).clamp(clip_low, clip_high) * lp * a

    return _sum_over_tokens(data, logprobs, term)


def dro(data: Sequence[Datum], logprobs: Sequence[torch.Tensor], *, beta: float = 0.05) -> Returned:
    """DRO: policy gradient with a quadratic penalty on the distance to the sampling policy.

        L = -sum_i sum_t w[i][t] * (p * A - beta / 2 * (p - q)^2)[i][t]

    Source: Richemond et al. 2024, arXiv 2405.19107 (the policy's loss of DRO-V). Differs: token by
    token as in the `tinker` API, a sum instead of a mean, and advantages in the place of reward
    minus a learnt value.

    Args:
        data: D datums; "sampling_logprobs" and "advantages" in the shape of target_tokens.
        logprobs: D tensors, each `(N_i,)` or `(N_i, K)`, nats; gradient flows here.
        beta: >= 0, reward units per nat. Larger stays closer to the sampling policy.
    Returns:
        loss: 0-d, reward units times nats; sum over tokens and datums.
        metrics: none.
    Raises:
        DatumError: an input is missing, or has another shape than target_tokens.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1], [2], sampling_logprobs=-1.0, advantages=3.0)]
    >>> dro(data, [torch.tensor([-0.5])], beta=2.0)  # -(-0.5 * 3 - 0.5^2)
    (tensor(1.7500), {})
    """

    def term(lp: torch.Tensor, log_ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -(lp * a - 0.5 * beta * log_ratio.square())

    return _sum_over_tokens(data, logprobs, term)


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _weights(datum: Datum, like: torch.Tensor) -> Any:
    """The datum's weights, 1 for each position of `like` where it has none."""
    weights = datum.loss_fn_inputs.get("weights")
    return like.new_ones(like.shape) if weights is None else weights


def _sum_over_tokens(
    data: Sequence[Datum], logprobs: Sequence[torch.Tensor], term: Any
) -> Returned:
    """Sum w * term(p, p - q, A) over every token with a non-zero weight.

    Raises:
        DatumError: an input is missing, or has another shape than the logprobs.
    """
    import torch

    check_alignment(data, logprobs)
    pairs = list(zip(data, logprobs, strict=True))
    raise_all([one for i, pair in enumerate(pairs) for one in _input_problems(f"data[{i}]", *pair)])
    sums = []
    for i, (datum, lp) in enumerate(pairs):
        where = f'data[{i}].loss_fn_inputs["weights"]'
        _, w = align_weights(lp, _weights(datum, lp), where=where)
        idle = (w == 0).reshape(w.shape + (1,) * (lp.dim() - w.dim()))
        inputs = (lp, *(input_tensor(datum, key, lp) for key in _policy_inputs(datum)))
        lp, sampled, advantages = (x.masked_fill(idle, 0.0) for x in inputs)
        sums.append(weighted_sum(term(lp, lp - sampled, advantages), w))
    return torch.stack(sums).sum(), {}


def _policy_inputs(datum: Datum) -> tuple[str, str]:
    return input_key(datum, "logprobs"), "advantages"


def _input_problems(where: str, datum: Datum, lp: torch.Tensor) -> list[DatumError]:
    """Errors of the inputs that a policy loss needs: one for each missing or misshapen one."""
    problems = []
    for key in _policy_inputs(datum):
        value = datum.loss_fn_inputs.get(key)
        if value is None:
            problems.append(missing_input(where, datum, key))
        elif list(value.shape) != list(lp.shape):
            problems.append(
                DatumError(
                    f'{where}.loss_fn_inputs["{key}"]',
                    "shape does not match target_tokens",
                    expected=tuple(lp.shape),
                    got=tuple(value.shape),
                    fix="Give every target token its own value.",
                )
            )
    return problems


BUILTIN_LOSSES: dict[str, Any] = {
    f.__name__: f for f in (cross_entropy, importance_sampling, ppo, cispo, dro)
}
_SDK_OPTIONS = {"clip_low": "clip_low_threshold", "clip_high": "clip_high_threshold"}


def needed_inputs(name: str) -> tuple[str, ...]:
    """The loss_fn_inputs that the built-in loss `name` needs, under the SDK's names."""
    if name == "cross_entropy":
        return ("target_tokens",)
    return ("target_tokens", "logprobs", "advantages")


def _options(name: str) -> dict[str, str]:
    """The options of a built-in loss: the SDK's names, each with the name of our argument."""
    arguments = inspect.signature(BUILTIN_LOSSES[name]).parameters.values()
    names = [p.name for p in arguments if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {_SDK_OPTIONS.get(own, own): own for own in names}


@dataclass(frozen=True)
class BuiltinLoss:
    """A built-in loss with its options bound; a service can run it by name instead.

    config: options under the SDK's names, as `loss_fn_config` has them.
    """

    name: str
    config: Mapping[str, float] = field(default_factory=dict)

    @property
    def func(self) -> Any:
        """The plain function."""
        return BUILTIN_LOSSES[self.name]

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Returned:
        """The loss, and no metrics."""
        arguments = _options(self.name)
        return self.func(data, logprobs, **{arguments[k]: v for k, v in self.config.items()})


def builtin_loss(name: str, config: Mapping[str, float | str] | None = None) -> BuiltinLoss:
    """Look up a built-in loss and bind its options.

    Args:
        name: a key of BUILTIN_LOSSES.
        config: options under the SDK's names, such as {"clip_low_threshold": 0.8}.
    Raises:
        ConfigError: an unknown loss or option (names the nearest match), or a value that is not a
            finite number.
    """
    check_choice(ConfigError, "loss_fn", "unknown loss", name, BUILTIN_LOSSES)
    if not isinstance(config, Mapping | None):
        raise ConfigError(
            "loss_fn_config",
            "wrong type",
            expected="a dict or None",
            got=repr(config),
            fix='Pass options by name, such as {"clip_low_threshold": 0.8}.',
        )
    options = _options(name)
    for key, value in (config or {}).items():
        where = f'loss_fn_config["{key}"]'
        what = f"unknown option of {name}" if options else f"{name} has no options"
        check_choice(ConfigError, where, what, key, options)
        if not is_finite(value):
            raise ConfigError(where, "not a number", expected="a finite number", got=repr(value))
    return BuiltinLoss(name, {key: float(value) for key, value in (config or {}).items()})


def with_entropy_bonus(loss_fn: LossFn, entropy_coef: float) -> LossFn:
    """Add an exact entropy bonus to a loss, for `loss_type_input="vocab_logprobs"`.

        L = loss_fn - entropy_coef * sum_i sum_t w[i][t] * H[i][t]
        H[i][t] = -sum_v exp(l[v]) * l[v], nats, with l the V logprobs at position t of datum i

    Source: the entropy bonus of Mnih et al. 2016, arXiv 1602.01783, section 4. Differs: summed
    under the datums' weights.

    Args:
        loss_fn: gets the logprobs of target_tokens `(N_i,)` where weights are not 0, and 0.0
            elsewhere.
        entropy_coef: the loss's unit per nat; > 0 spreads the distribution.
    Returns:
        A loss of vocab_logprobs that reports the metric "entropy": the mean of H, nats, over
        positions whose weight is not 0. No other row of the vocabulary is computed, and only a few
        are in memory at a time.
    Raises:
        DatumError: from the loss, where a datum has no weights or target_tokens.
    """

    def logprob_and_entropy(rows: torch.Tensor, target: torch.Tensor) -> Any:
        return rows.gather(1, target[:, None])[:, 0], -(rows.exp() * rows).sum(dim=1)

    def loss_with_entropy(data: list[Datum], vocab_logprobs: list[Any]) -> Any:
        import torch

        logprobs: list[torch.Tensor] = []
        entropies: list[torch.Tensor] = []
        targets, weights = (input_tensors(data, key) for key in ("target_tokens", "weights"))
        for target, w, rows in zip(targets, weights, vocab_logprobs, strict=True):
            on = w.nonzero()[:, 0]  # the prompt's rows are never computed
            picked, entropy = map_rows(logprob_and_entropy, rows, target[on], rows=on)
            logprobs.append(picked.new_zeros(len(w)).index_put((on,), picked))
            entropies.append(entropy)
        loss, metrics = loss_fn(data, logprobs)
        entropy, w = torch.cat(entropies), torch.cat([w[w != 0] for w in weights])
        bonus = entropy_coef * (w.to(entropy) * entropy).sum()
        return loss - bonus, {**metrics, "entropy": entropy.mean()}

    return loss_with_entropy
