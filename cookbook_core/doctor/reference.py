"""Checks of direction and reference: sign, identities at step 0, the KL estimator."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core.doctor.case import Case
from cookbook_core.doctor.report import Finding, defect, not_checked
from cookbook_core.errors import CookbookError

import numpy as np

if TYPE_CHECKING:
    import torch

OUTCOMES = 6  # size of the vocabulary that KL terms are enumerated over


def is_pairwise(case: Case) -> bool:
    """Whether the loss takes its datums in pairs (see `batch.order`)."""
    return case.unit == 2


# ---- direction -----------------------------------------------------------------------------------


def sign(case: Case) -> list[Finding]:
    """Descent makes chosen likelier than rejected, good likelier than bad, targets likelier."""
    if any(lp.dim() != 1 for lp in case.logprobs):
        return [not_checked("sign", "several candidates per position: some rise, others fall")]
    try:
        grads = case.run(case.at_step_0()).grads
    except CookbookError:
        return [not_checked("sign", "the loss fails where the reference equals the policy")]
    sums = [float(g.sum()) for g in grads]
    if is_pairwise(case):
        chosen, rejected = sum(sums[0::2]), sum(sums[1::2])
        if chosen > 0 > rejected:
            what = "descent makes the rejected likelier and the chosen less likely"
            fix = "The order is chosen, rejected, chosen, ...: data[0::2] and data[1::2]."
            got = f"{chosen:+.3g} on chosen, {rejected:+.3g} on rejected"
            rule = "gradient < 0 on chosen, > 0 on rejected"
            return [defect("sign", case.where, what, rule, got, fix)]
        return [Finding("sign", "ok", "descent lifts chosen over rejected")]
    if keys := case.keys("advantages"):
        pull = 0.0
        for datum, g in zip(case.data, grads, strict=True):
            pull += float((g * datum.loss_fn_inputs[keys[0]].to_torch()).sum())
        if pull > 0:
            what = "descent makes tokens with a positive advantage less likely"
            fix = "The loss is minus the objective: -(ratio * advantages)."
            rule = "sum(gradient * advantages) < 0"
            return [defect("sign", case.where, what, rule, f"{pull:+.3g}", fix)]
        return [Finding("sign", "ok", "descent lifts tokens with a positive advantage")]
    if keys := case.keys("desirable"):
        values = [datum.loss_fn_inputs[keys[0]].to_torch().any() for datum in case.data]
        good, bad = (
            sum(s for s, on in zip(sums, values, strict=True) if bool(on) == side)
            for side in (True, False)
        )
        if good > 0 or bad < 0:
            what = "descent makes good answers less likely or bad ones likelier"
            fix = (
                f'"{keys[0]}" is 1 on good answers: beta * (r - z0) there, its negative elsewhere.'
            )
            rule, got = "gradient < 0 on good, > 0 on bad", f"{good:+.3g} and {bad:+.3g}"
            return [defect("sign", case.where, what, rule, got, fix)]
        return [Finding("sign", "ok", "descent lifts good answers and lowers bad ones")]
    return _all_one_way(case, sums)


def _all_one_way(case: Case, sums: list[float]) -> list[Finding]:
    """Detect a missing minus sign: descent lowers every target's logprob without bound.

    sums: total gradient of each datum.
    """
    if max(sums) <= 0:
        return [Finding("sign", "ok", "descent makes the target tokens likelier")]
    if min(sums) < 0:
        reason = "descent lifts some datums and lowers others, and neither pairs nor advantages "
        return [not_checked("sign", reason + "say which of them should rise")]
    far, farther = (case.run(logprobs=[lp * 0 - x for lp in case.logprobs]).loss for x in (30, 60))
    if farther < far - 1e-3 * max(1.0, abs(far)):
        what = "the loss falls without end as every target token gets less likely"
        fix = "A minus sign is missing: the loss is -log p."
        rule, got = "a loss that is bounded below", f"{far:.4g} at -30 nats, {farther:.4g} at -60"
        return [defect("sign", case.where, what, rule, got, fix)]
    return [Finding("sign", "note", "descent makes the target tokens less likely (unlikelihood?)")]


# ---- step 0 --------------------------------------------------------------------------------------


def _without_effect(case: Case) -> bool:
    """Whether other reference logprobs leave loss, metrics and gradient as they are."""
    keys, rng = case.keys("reference"), np.random.default_rng(1)
    other = case.with_side_data(lambda key, _, shape: -rng.random(shape) if key in keys else None)
    result, base = case.run(other), case.base
    pairs = zip(result.grads, base.grads, strict=True)
    values = result.loss == base.loss and result.metrics == base.metrics
    return bool(keys) and values and all(bool((a == b).all()) for a, b in pairs)


def _identity(name: str, case: Case, reference: bool) -> float | None:
    """The value that a metric of this name must have while the policy equals the reference.

    None where the name does not say. reference: whether the loss uses reference logprobs.
    """
    name = name.lower()
    if re.search(r"coef|clip|frac|weight|beta", name):
        return None
    if reference and re.search(r"margin|log_?ratio", name):
        return 0.0
    if re.search(r"(^|_)(approx_?)?kl(_|$)", name):
        return 0.0
    return 1.0 if re.search(r"(^|_)ratio(_|$)", name) else None


def _as_log_ratio(case: Case, keys: Sequence[str]) -> bool:
    """Whether the reference enters only as policy - reference, beside terms of the policy alone.

    Then L(p + t, q + t) - L(p, q) is the same for every reference q, as in DPO with a further
    negative log-likelihood of the chosen. p, t, q: one number per token.

    keys: the inputs with the reference's logprobs.
    """
    import torch

    rng = np.random.default_rng(2)
    t, s = ([torch.tensor(-rng.random(lp.shape)).to(lp) for lp in case.logprobs] for _ in range(2))

    def loss(moves: Sequence[torch.Tensor], gaps: Sequence[torch.Tensor]) -> float:
        policy = [lp + move for lp, move in zip(case.logprobs, moves, strict=True)]
        side = [(lp + gap).numpy() for lp, gap in zip(policy, gaps, strict=True)]
        data = case.with_side_data(lambda key, i, _: side[i] if key in keys else None)
        return case.run(data, policy).loss

    none = [lp * 0 for lp in case.logprobs]
    changes = [loss(t, gaps) - loss(none, gaps) for gaps in (none, s)]
    return case.same(*changes, scale=max(1.0, case.steepest))


def step_0(case: Case) -> list[Finding]:
    """While policy, reference and sampler are equal: margin 0, ratio 1, KL 0."""
    reference = [] if _without_effect(case) else case.keys("reference")
    keys = [*reference, *case.keys("sampling")]
    if is_pairwise(case) and case.keys("reference") and not reference:
        words = (
            f"{case.keys('reference')[0]} is read but without effect (a loss without reference?)"
        )
        return [Finding("step_0", "note", words)]
    if not keys:
        return []
    data, names = case.at_step_0(), " and ".join(f'"{key}"' for key in keys)
    result = case.run(data)
    findings, identities = [], []
    for name, value in result.metrics.items():
        expected = _identity(name, case, bool(reference))
        if expected is None:
            continue
        if case.same(value, expected, 1.0):
            identities.append(f"{name} {expected:g}")
        else:
            where = f'{case.where} metrics["{name}"]'
            what = f"wrong where {names} equal the policy's"
            fix = "Look at the sign of the reference and at what is summed on either side."
            findings.append(defect("step_0", where, what, f"{expected:g}", f"{value:.6g}", fix))
    if is_pairwise(case) and reference:
        order = np.arange(len(data)).reshape(-1, 2)[:, ::-1].reshape(-1)
        swapped = case.run([data[j] for j in order], [case.logprobs[j] for j in order]).loss
        if case.same(swapped, result.loss):
            identities.append("margin 0")
        elif _as_log_ratio(case, reference):
            identities.append("apart from a term of the policy alone margin 0")
        else:
            what = f"swapping the pairs changes the loss where {names} equal the policy's"
            fix = "margin = (chosen - ref_chosen) - (rejected - ref_rejected)."
            rule = f"{result.loss:.6g} either way"
            findings.append(defect("step_0", case.where, what, rule, f"{swapped:.6g}", fix))
    shown = "ln 2" if case.same(result.loss, math.log(2)) else f"{result.loss:.4g}"
    words = f"with the policy's own {names} the loss is {shown}"
    return findings or [Finding("step_0", "ok", ", ".join([words, *dict.fromkeys(identities)]))]


# ---- KL ------------------------------------------------------------------------------------------


def _estimators(d: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Value and slope in log p of each KL estimator at log-ratios d (nats), policy = sampler."""
    k3 = (-d).exp() - 1 + d
    return {
        "k1": (d, d * 0 + 1),
        "k2": (d**2 / 2, d),
        "k1 as a reward penalty": (d, d),
        "ratio-weighted k3": (k3, d),
        "k3": (k3, 1 - (-d).exp()),
    }


def _enumerate(case: Case, logp: torch.Tensor, ref: torch.Tensor) -> tuple[Any, Any]:
    """Compute the loss and its total gradient in log p where every target token is outcome x.

    Policy and sampler have logp[x], the reference ref[x]; advantages and rewards are 0, so that
    only the KL term is left.

    logp, ref and both results are `(OUTCOMES,)`, logprobs in nats.
    """
    import torch

    reference, sampling = case.keys("reference"), case.keys("sampling")
    zero = {*case.keys("advantages"), *case.keys("reward")}
    values, slopes = [], []
    for x in range(len(logp)):

        def side(key: str, i: int, shape: tuple[int, ...], x: int = x) -> Any:
            value = ref[x] if key in reference else logp[x] if key in sampling else None
            value = 0.0 if key in zero else value
            return None if value is None else np.full(shape, float(value))

        at_x = [torch.full_like(lp, float(logp[x])) for lp in case.logprobs]
        result = case.run(case.with_side_data(side), at_x)
        values.append(result.loss)
        slopes.append(sum(float(g.sum()) for g in result.grads))
    return torch.tensor(values).double(), torch.tensor(slopes).double()


def _is_multiple(values: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether `values` is a multiple of `of`, to 1e-5."""
    scale = float((values * of).sum() / (of * of).sum())
    return float((values - scale * of).abs().max()) <= 1e-5 * float(values.abs().max())


def kl(case: Case) -> list[Finding]:
    """Which KL estimator the loss behaves like, and whether its gradient is that of a KL.

    Exact enumeration over a softmax of six outcomes: the expected gradient under the policy
    against that of KL(policy || reference).
    Source: Schulman's k1, k2, k3, joschu.net/blog/kl-approx.html; recipes/grpo.py has the table.
    """
    import torch

    if not case.keys("reference") or is_pairwise(case) or case.keys("desirable"):
        return []  # a preference loss: its gradient is not 0 at the reference
    if not case.exact:
        return [not_checked("kl", "the loss takes float32 logprobs alone")]
    if any(lp.dim() != 1 for lp in case.logprobs):
        return [not_checked("kl", "several candidates per position")]
    rng = np.random.default_rng(1)
    logits = [torch.tensor(rng.normal(size=OUTCOMES)) for _ in range(2)]
    logp, ref = (x.log_softmax(-1) for x in logits)
    d, p = logp - ref, logp.exp()
    values, slopes = _enumerate(case, logp, ref)
    _, at_ref = _enumerate(case, logp, logp)
    others, _ = _enumerate(case, logp, ref - 1.0)
    key = case.keys("reference")[0]
    if not bool(slopes.abs().max() > 1e-9 * (1 + values.abs().max())):
        if torch.allclose(values, others, rtol=1e-9, atol=1e-12):
            words = f"{key} is read but does not enter the loss (kl_coef 0?)"
            return [Finding("kl", "note", words)]
        what = f"{key} moves the loss but never its gradient: the KL term regularises nothing"
        fix = "Keep the logprobs attached: ratio.detach() * (logprobs - ref)**2 / 2."
        return [defect("kl", case.where, what, "gradient of KL(policy || reference)", 0.0, fix)]
    name = next(
        (
            n
            for n, (v, s) in _estimators(d).items()
            if _is_multiple(slopes, s) and _is_multiple(values, v)
        ),
        "",
    )
    expected = p * (slopes - (p * slopes).sum())  # d E[loss] / d logits
    exact = p * (d - (p * d).sum())  # d KL(policy || reference) / d logits
    along = float((expected * exact).sum() / (exact.norm() * max(float(expected.norm()), 1e-300)))
    return _verdict(case, name, slopes, at_ref, float(expected.norm()), along)


def _verdict(
    case: Case,
    name: str,
    slopes: torch.Tensor,
    at_ref: torch.Tensor,
    size: float,
    along: float,
) -> list[Finding]:
    """Judge the enumerated KL term.

    name: the estimator it behaves like, "" for none. slopes: d loss / d log p for each outcome;
    at_ref: the same where the policy is the reference. size: norm of the expected gradient.
    along: its cosine to the gradient of KL(policy || reference).
    """
    largest = float(slopes.abs().max())
    learns = bool(case.keys("advantages") or case.keys("sampling") or case.keys("reward"))
    rule = "the gradient of KL(policy || reference)"
    fix = (
        "Use k2, ratio.detach() * d**2 / 2 with d = logprobs - ref_logprobs; recipes/grpo.py has "
        "it and others that hold."
    )
    if size <= 1e-9 * largest:
        what = "the KL term behaves like k1: its expected gradient is 0, it regularises nothing"
        if learns:
            return [defect("kl", case.where, what, rule, 0, fix)]
        return [Finding("kl", "note", "the reference shifts the loss but not its gradient")]
    if float(at_ref.abs().max()) > 1e-6 * largest:
        words = "the gradient is not 0 at the reference: not a KL term, or not that alone"
        return [Finding("kl", "note", words)]
    if along < 0:
        what = "the KL term pushes the policy away from the reference"
        fix = "Add kl_coef * KL to the loss, with a plus."
        return [defect("kl", case.where, what, rule, f"cosine {along:.3f} with it", fix)]
    if along > 1 - 1e-9:
        words = f"behaves like {name}" if name else "has the gradient of k2"
        return [Finding("kl", "ok", f"{words}: its expected gradient is that of KL(policy || ref)")]
    words = f"behaves like {name}" if name else "is none of the known estimators"
    other = "that of KL(ref || policy), the other direction"
    other = other if name == "k3" else "not that of a known KL"
    words = f"{words}: its expected gradient is {other}"
    return [Finding("kl", "note", f"{words} (cosine {along:.3f} with KL(policy || ref))")]
