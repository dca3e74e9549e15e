"""Weighted terms around a loss: keep what a model had while it learns something else.

    loss_fn = regularised(sft_loss, replay=(1.0, replay), drift=(0.1, drift))
    client.forward_backward_custom(new + keep_apart(old), loss_fn)

A term is a function of (data, logprobs) that returns a 0-d tensor. The result is a loss like any
other: it works in every recipe, over services and in the doctor. A schedule is another number
passed to `regularised` at each step.

An entropy bonus needs the whole vocabulary at each position, so it is no term here:
`builtin_losses.with_entropy_bonus(regularised(...), coef)` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from cookbook_core.alignment import columns
from cookbook_core.custom_loss import RESERVED_METRICS, LossFn, name_of
from cookbook_core.datums import with_inputs
from cookbook_core.errors import (
    ConfigError,
    DatumError,
    LossError,
    NoGradientError,
    check_choice,
    is_finite,
)
from cookbook_core.types import Datum

if TYPE_CHECKING:
    import torch

Term: TypeAlias = Callable[[list[Datum], "list[torch.Tensor]"], "torch.Tensor"]
"""term(data, logprobs) -> 0-d tensor that depends on the logprobs; see `LossFn` for both."""

APART = "kept"
"""The loss input of datums that the loss itself does not get: see `keep_apart`."""


def regularised(loss_fn: LossFn, **terms: tuple[float, Term]) -> LossFn:
    """Add weighted terms to a loss.

        L = loss_fn + sum over terms of weight * term

    Args:
        loss_fn: gets the datums that are not set apart by `keep_apart`, in their order.
        terms: name=(weight, term). weight >= 0, in the loss's unit per unit of the term; term gets
            all datums. `drift` and `replay` are two.
    Returns:
        A loss with the metrics of loss_fn and, where NAME is "base" or a term's name: NAME (value
        before weighting), NAME_grad (length of the weighted gradient in the logprobs), and for
        terms NAME_share (weight * value) and NAME_cos (cosine of its gradient with that of
        loss_fn; -1 undoes it). The gradients stop at the logprobs, so they cost no pass of the
        model; without a gradient, or with vocab_logprobs, _grad and _cos are left out. Terms on
        other tokens than the loss's have cosine 0 by construction: a conflict in the weights does
        not show there.
    Raises:
        ConfigError: at once; no term, a weight that is negative or not a number, a term that is not
            a function, or a name that metrics use already. From the loss, NoGradientError: loss_fn
            or a term is detached from the logprobs. LossError: a term returned no 0-d tensor.

    >>> import torch
    >>> from cookbook_core import datum_from_prompt_completion
    >>> data = [datum_from_prompt_completion([1], [2], ref_logprobs=-1.0)]
    >>> loss_fn = regularised(lambda data, lps: (-lps[0].sum(), {}), drift=(0.5, drift))
    >>> loss_fn(data, [torch.tensor([-3.0])])  # 3 + 0.5 * (-3 + 1)^2 / 2
    (tensor(4.), {'base': 3.0, 'drift': 2.0, 'drift_share': 1.0})
    """
    _check_terms(terms)

    def total_loss(data: list[Datum], logprobs: list[Any]) -> Any:
        # set(): the doctor takes a look-up in the inputs for a need of the loss
        own = [i for i, datum in enumerate(data) if APART not in set(datum.loss_fn_inputs)]
        loss, metrics = loss_fn([data[i] for i in own], [logprobs[i] for i in own])
        leaves = [lp for lp in logprobs if getattr(lp, "requires_grad", False)]
        base = _Part("base", loss, leaves, name_of(loss_fn))
        parts, total = [base], loss
        for name, (weight, term) in terms.items():
            value = term(data, logprobs)
            part = _Part(name, value, leaves, name_of(term), weight)
            parts.append(part)
            total = total + weight * value
        return total, {**metrics, **{k: v for p in parts for k, v in p.metrics(base).items()}}

    total_loss.__name__ = f"regularised {name_of(loss_fn)}"
    return total_loss


def _check_terms(terms: dict[str, Any]) -> None:
    """Raise ConfigError unless every term is (weight >= 0, function) under a free name."""
    if not terms:
        fix = "Pass name=(weight, term), such as drift=(0.1, drift), or use the loss as it is."
        raise ConfigError("regularised", "no term", fix=fix)
    for name, pair in terms.items():
        where = f"regularised({name}=...)"
        if name in (*RESERVED_METRICS, "base"):
            raise ConfigError(where, "this name is used by another metric", fix="Rename the term.")
        if not isinstance(pair, tuple) or len(pair) != 2:
            rule, got = "(weight, term)", repr(pair)
            raise ConfigError(where, "not a pair", expected=rule, got=got, fix=f"Write {rule}.")
        weight, term = pair
        if not is_finite(weight) or weight < 0:
            fix = "Turn the term's sign, or leave the term out."
            raise ConfigError(
                where, "weight out of range", expected="a finite number >= 0", got=weight, fix=fix
            )
        if not callable(term):
            fix = "Pass a function, such as regularise.drift or regularise.replay; for the entropy "
            fix += "use builtin_losses.with_entropy_bonus()."
            rule = "term(data, logprobs) -> 0-d tensor"
            raise ConfigError(where, "unknown term", expected=rule, got=repr(term), fix=fix)


class _Part:
    """The loss itself or one term: its value, and its weighted gradient in the logprobs."""

    def __init__(
        self, name: str, value: Any, leaves: list[Any], function: str, weight: float = 1.0
    ) -> None:
        import torch

        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            fix = "Reduce it: .sum() or .mean(). A term returns its value alone, without metrics."
            raise LossError(
                f"{function}()", "not a scalar", expected="a 0-d tensor", got=got, fix=fix
            )
        if leaves and not value.requires_grad:
            raise NoGradientError(
                f"{function}()",
                "detached from the logprobs",
                expected="a value computed from logprobs",
                got="requires_grad=False",
                fix="Look for .item(), .detach(), torch.tensor(...) or numpy on the way.",
            )
        self.name, self.value, self.weight, self.grad = name, value, weight, None
        if leaves:
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            pairs = zip(found, leaves, strict=True)
            flat = [(torch.zeros_like(x) if g is None else g).reshape(-1) for g, x in pairs]
            self.grad = weight * torch.cat(flat)

    def metrics(self, base: _Part) -> dict[str, float]:
        value = self.value.item()
        made = {self.name: value}
        if self is not base:
            made[f"{self.name}_share"] = self.weight * value
        if self.grad is not None:
            length = self.grad.norm().item()
            made[f"{self.name}_grad"] = length
            if self is not base and base.grad is not None:
                lengths = length * base.grad.norm().item()
                dot = float(self.grad @ base.grad)
                made[f"{self.name}_cos"] = dot / lengths if lengths else 0.0
        return made


# ---- terms ---------------------------------------------------------------------------------------


def keep_apart(data: Sequence[Datum]) -> list[Datum]:
    """Copy the datums with a mark, so that terms get them and the loss itself does not."""
    return [with_inputs(datum, **{APART: 1.0}) for datum in data]


def replay(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """The mean of -log p over the weighted tokens of the datums kept apart, nats per token.

    On answers that the model itself gave before, sampled at temperature 1, its gradient is that of
    KL(model before || model now): it holds the model where it was on such prompts.

    Raises:
        DatumError: no datum is kept apart, or weights are missing.
    """
    lp, weights = _tokens(data, logprobs, APART, "keep_apart(data)")
    return -lp[weights != 0].mean()


def drift(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """The mean of (log p - log p_ref)^2 / 2 over the weighted tokens that have ref_logprobs.

    This is k2, nats^2 per token; on tokens that the policy sampled, its gradient is that of
    KL(p || p_ref). Datums without ref_logprobs are not held: give them to the datums kept apart. On
    the very tokens that the loss wants to change it works against the loss.

    Source: Schulman's k2, joschu.net/blog/kl-approx.html.

    Raises:
        DatumError: no datum has ref_logprobs, or weights are missing.
    """
    key = "ref_logprobs"
    lp, weights, ref = _tokens(data, logprobs, key, "add_ref_logprobs(reference, data)", key)
    return ((lp - ref)[weights != 0] ** 2).mean() / 2


def _tokens(
    data: list[Datum], logprobs: list[torch.Tensor], mark: str, how: str, *keys: str
) -> list[torch.Tensor]:
    """Logprobs, weights and further inputs of all tokens of the datums that have `mark`."""
    marked = [i for i, datum in enumerate(data) if mark in datum.loss_fn_inputs]
    if not marked:
        what, rule = f'no datum has "{mark}"', "at least one in each batch"
        fix = f"Add datums made by {how} to the batch."
        raise DatumError("data", what, expected=rule, got=0, fix=fix)
    return columns([data[i] for i in marked], [logprobs[i] for i in marked], "weights", *keys)


# ---- KL to a reference ---------------------------------------------------------------------------


def kl_term(
    estimator: str, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, ratio: torch.Tensor
) -> torch.Tensor:
    """The KL term of each sampled token, for a loss of tokens that a policy sampled itself.

    KL is a trap. With d = log p - log p_ref, what an estimator puts into the loss has the expected
    gradient

        k2                    ratio (constant) * d^2 / 2         of KL(p || p_ref)
        k3_ratio              ratio * (exp(-d) - 1 + d)          of KL(p || p_ref)
        k1_reward             ratio * d (constant)               of KL(p || p_ref); a reward of -d
        k3                    exp(-d) - 1 + d                    of KL(p_ref || p): the other one
        k1_no_regularisation  d                                  zero: published, does nothing

    Source: Schulman's k1, k2, k3, joschu.net/blog/kl-approx.html. Which of them regularises is
    worked out by enumeration in tests/recipes/test_grpo.py.

    Args:
        estimator: one of these names.
        logprobs: `(N,)` log p, nats; gradient flows here.
        ref_logprobs: `(N,)`, nats.
        ratio: `(N,)`, p / p_sampled, with its gradient.
    Returns:
        `(N,)` nats (k2: nats^2 / 2).
    Raises:
        ConfigError: an unknown estimator.
    """
    import torch

    d = logprobs - ref_logprobs
    k3 = torch.exp(-d.clamp(min=-20.0)) - 1 + d
    terms = {
        "k2": ratio.detach() * d**2 / 2,
        "k3_ratio": ratio * k3,
        "k1_reward": ratio * d.detach(),
        "k3": k3,
        "k1_no_regularisation": d,
    }
    check_choice(ConfigError, "kl_estimator", "unknown", estimator, terms)
    return terms[estimator]
