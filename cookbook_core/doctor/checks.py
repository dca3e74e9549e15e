"""Checks of a loss on the batch as given: return value, gradient, side effects, extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cookbook_core.custom_loss import evaluate, merge_metrics
from cookbook_core.doctor.case import Case, copies, role_of
from cookbook_core.doctor.report import Finding, defect, from_error, not_checked
from cookbook_core.doctor.watch import watch_class
from cookbook_core.errors import CookbookError, NoGradientError, NotFiniteError

import numpy as np

PER_TOKEN = ("weights", "reference", "sampling", "logprobs", "advantages")
"""Roles of inputs that have one entry per target token."""


def several(indices: Sequence[int]) -> str:
    """List datums by index, at most five of them."""
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return ", ".join(f"data[{i}]" for i in indices[:5]) + more


def lengths(case: Case) -> list[Finding]:
    """Every per-token input has one entry per logprob."""
    findings = []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        targets = datum.loss_fn_inputs.get("target_tokens")
        if case.loss_type_input == "logprobs" and targets and targets.shape != list(lp.shape):
            what, got = "not one logprob per target token", tuple(lp.shape)
            findings.append(defect("alignment", f"logprobs[{i}]", what, tuple(targets.shape), got))
            continue
        for key, value in datum.loss_fn_inputs.items():
            # a 0-d array or an array of one entry belongs to the whole sequence
            if role_of(key) in PER_TOKEN and value.shape[:1] not in ([], [1], [len(lp)]):
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                fix = "Build datums with datum_from_prompt_completion(..., name=values)."
                what = "not one entry per logprob"
                findings.append(defect("alignment", where, what, len(lp), value.shape[0], fix))
    return findings[:5]


def returns(case: Case) -> list[Finding]:
    """The loss is a finite scalar that depends on the logprobs; metrics are numbers."""
    try:
        result = case.base
        merge_metrics(result, {})
    except NotFiniteError as error:
        return [from_error("finite", case.where, error)]
    except NoGradientError as error:
        return [from_error("gradient", case.where, error)]
    except CookbookError as error:
        return [from_error("returns", case.where, error)]
    words = f"a 0-d loss ({result.loss:.4g}) and {len(result.metrics)} metric(s)"
    bad = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    more = [Finding("returns", "note", f"not finite: metric {', '.join(bad)}")] if bad else []
    return [Finding("returns", "ok", words), *more]


def mutates(case: Case) -> list[Finding]:
    """A call leaves the datums, the logprobs and both lists unchanged."""
    import torch

    data, logprobs = copies(case.data, set()), [lp.clone() for lp in case.logprobs]
    arguments = (list(data), list(logprobs))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            case.loss_fn(*arguments)
    except Exception:
        return []  # `returns` reports it
    changed = []
    for name, after, before in (("data", arguments[0], data), ("logprobs", arguments[1], logprobs)):
        if [id(x) for x in after] != [id(x) for x in before]:
            changed.append(f"the list {name}")
    for i, (datum, original) in enumerate(zip(data, case.data, strict=True)):
        if not torch.equal(logprobs[i], case.logprobs[i]):
            changed.append(f"logprobs[{i}]")
        for key, value in original.loss_fn_inputs.items():
            now = datum.loss_fn_inputs[key].to_numpy()
            if not np.array_equal(value.to_numpy(), now, equal_nan=True):
                changed.append(f'data[{i}].loss_fn_inputs["{key}"]')
    if not changed:
        return [Finding("mutates", "ok", "data and logprobs are left as they were")]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    what, fix = "the loss changes its input", "Change a copy (.clone()): the caller reuses these."
    where = ", ".join(changed[:3]) + more
    return [Finding("mutates", "defect", what, where, "unchanged inputs", "changed ones", fix)]


def deterministic(case: Case) -> list[Finding]:
    """Three calls on the same input give the same loss, without a new random seed between them."""
    import torch

    losses = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(3):
            logprobs = [lp.clone() for lp in case.logprobs]
            losses.append(evaluate(case.loss_fn, copies(case.data, set()), logprobs).loss)
    if len(set(losses)) == 1:
        return [Finding("deterministic", "ok", "the same input gives the same loss")]
    fix = "Look for random numbers (dropout) and for state kept between calls."
    got = ", ".join(f"{x:.6g}" for x in losses)
    what = "the same input gives another loss each time"
    return [defect("deterministic", case.where, what, "one value", got, fix)]


# ---- gradient ------------------------------------------------------------------------------------


def _difference(case: Case, changes: list[Any], eps: float, frozen: bool) -> float:
    """The slope (L(lp + eps * change) - L(lp - eps * change)) / 2 eps.

    frozen: keep what `.detach()` and no_grad gave on the unchanged batch constant.
    """
    values = []
    for sign in (eps, -eps):
        logprobs = [lp + sign * c for lp, c in zip(case.logprobs, changes, strict=True)]
        watch = watch_class()(case.tape) if frozen else None
        values.append(case.run(logprobs=logprobs, watch=watch).loss)
    return (values[0] - values[1]) / (2 * eps)


def _directions(case: Case) -> list[tuple[str, list[Any]]]:
    """Choose directions: for five datums the entry with the steepest gradient and a random one.

    Returns:
        (name, one tensor per datum in the shape of its logprobs) pairs.
    """
    import torch

    rng, count = np.random.default_rng(0), len(case.data)
    zeros = [torch.zeros_like(lp) for lp in case.logprobs]
    directions = []
    for i in sorted({int(x) for x in np.linspace(0, count - 1, min(5, count))}):
        flat = case.base.grads[i].abs().reshape(-1)
        for place in sorted({int(flat.argmax()), int(rng.integers(len(flat)))}):
            change = [z.clone() for z in zeros]
            change[i].reshape(-1)[place] = 1.0
            at = [int(j) for j in np.unravel_index(place, tuple(zeros[i].shape))]
            directions.append((f"logprobs[{i}]{at}", change))
    noise = [torch.tensor(rng.normal(size=tuple(z.shape))).to(z) for z in zeros]
    return [*directions, ("logprobs in a random direction", noise)]


def _disagrees(case: Case, change: list[Any], exact: float, scale: float) -> float | None:
    """Return the slope by finite differences where it differs from `exact`, else None.

    A loss that rounds to float32 or less inside is noisy at small steps: then a coarse step with a
    wider tolerance decides.
    """
    step, coarse = (1e-5, 1e-2) if case.exact else (1e-2, 3e-2)
    noise = (1e-8 if case.exact else 1e-4) * (1 + abs(case.base.loss))
    got = _difference(case, change, step, frozen=True)
    off = abs(got - exact)
    if off <= (1e-5 if case.exact else 0.03) * scale + noise:
        return None
    if abs(_difference(case, change, 2 * step, frozen=True) - got) < 0.1 * off:
        return got
    got = _difference(case, change, coarse, frozen=True)
    return None if abs(got - exact) <= 0.03 * scale + noise else got


def gradient(case: Case) -> list[Finding]:
    """Autograd agrees with central finite differences.

    `.detach()` and no_grad blocks stop a gradient on purpose (importance weights, baselines): their
    values are kept constant in the differences. A value that leaves the graph in another way, such
    as `.item()`, changes with the logprobs and shows as a difference.
    """
    if case.steepest == 0:
        fix = "Look for a clamp or min() that is active everywhere."
        what = "the gradient is 0 everywhere"
        return [defect("gradient", case.where, what, "a gradient", 0.0, fix)]
    stopped = False
    for place, change in _directions(case):
        along = [g * c for g, c in zip(case.base.grads, change, strict=True)]
        exact = sum(float(a.sum()) for a in along)
        scale = max(case.steepest, sum(float(a.abs().sum()) for a in along))
        got = _disagrees(case, change, exact, scale)
        if got is not None:
            what = "autograd and finite differences disagree"
            fix = "Use tensor operations from logprobs to loss; .detach() what should be constant. "
            lost = f"Values leave the graph here: {'; '.join(case.escapes[:4])}."
            fix += lost if case.escapes else "Check the backward of custom autograd functions."
            where, rule = f"{case.where} slope at {place}", f"{got:.6g} by differences"
            return [defect("gradient", where, what, rule, f"{exact:.6g}", fix)]
        if case.tape and not stopped and case.exact:
            moving = _difference(case, change, 1e-5, frozen=False)
            stopped = abs(moving - exact) > 1e-4 * scale + 1e-7 * (1 + abs(case.base.loss))
    findings = [Finding("gradient", "ok", "agrees with finite differences")]
    if stopped:
        words = ".detach() or no_grad keeps a part of the loss constant that depends on the "
        words += "logprobs: right for importance weights and baselines, rarely elsewhere"
        findings.append(Finding("gradient", "note", words))
    return findings


def every_datum(case: Case) -> list[Finding]:
    """Every datum with a non-zero weight or advantage gets gradient."""
    import torch

    unused, lost, idle = [], [], 0
    for i, g in enumerate(case.base.grads):
        on = case.weighted(i)
        if bool((g != 0).any()):
            continue
        if on is not None and not on.any():
            idle += 1
            continue
        change = [torch.zeros_like(lp) for lp in case.logprobs]
        change[i] = torch.linspace(0.5, 1.5, g.numel()).reshape(g.shape).to(g)
        moves = abs(_difference(case, change, 1e-3, frozen=False)) > 1e-7
        (lost if moves else unused).append(i)
    findings = []
    if unused:
        what, fix = "not used by the loss", "Use every datum, or leave these out of the batch."
        findings.append(defect("every_datum", several(unused), what, "a gradient", 0.0, fix))
    if lost:
        what = "the loss moves with it, but no gradient gets there"
        fix = "; ".join(case.escapes[:4]) or ".detach() or no_grad"
        fix = f"Keep its values in the graph: look at {fix}."
        findings.append(defect("every_datum", several(lost), what, "a gradient", 0.0, fix))
    more = f" ({idle} without weight or advantage apart)" if idle else ""
    words = f"all {len(case.data)} datums get gradient{more}"
    return findings or [Finding("every_datum", "ok", words)]


def finite(case: Case) -> list[Finding]:
    """Loss and gradient stay finite in float32 where tokens are certain, or very unlikely."""
    import torch

    side = {*case.keys("reference"), *case.keys("sampling")}
    names, flat = " and ".join(sorted(side)), set(case.keys("advantages"))
    single = [lp.float() for lp in case.logprobs]
    log, ratio = "Clamp before log() or a division.", "Clamp the log-ratio before exp()."
    spots: list[tuple[str, Any, Any, str]] = [
        ("where every token is certain (logprob 0)", None, [lp * 0 for lp in single], log)
    ]
    for odd in (0, 1):
        rare = [torch.full_like(lp, -300.0) if i % 2 == odd else lp for i, lp in enumerate(single)]
        fix = f"Use logsigmoid and logsumexp. {ratio}"
        spots.append(("where tokens are very unlikely (-300 nats each)", None, rare, fix))
    if side:
        spots.append((f"where {names} are -300", case.filled(side, -300.0), single, ratio))
        fix = "Look at sqrt, norms and divisions: their slope at a difference of 0 is infinite."
        spots.append((f"where {names} equal the policy's", case.at_step_0(), None, fix))
    if flat:
        fix = "Add a small number to the standard deviation."
        spots.append(("where all advantages are 0", case.filled(flat, 0.0), single, fix))
    failed = []
    for spot, data, logprobs, fix in spots:
        try:
            case.run(data, logprobs)
        except NotFiniteError as error:
            what = f"{error.what} {spot}"
            return [from_error("finite", case.where, error.replace(what=what, fix=fix))]
        except CookbookError as error:
            failed.append(not_checked("finite", f"{spot}, the loss fails: {error.what}"))
    also = f", and where {names} equal the policy's" if side else ""
    words = f"also for certain and very unlikely tokens{also}"
    return failed or [Finding("finite", "ok", words)]
