"""What one call of a loss shows: what it returns, its gradient, its inputs afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cookbook_core.custom_loss import evaluate, merge_metrics
from cookbook_core.doctor.case import Case, copies, role_of
from cookbook_core.doctor.report import Finding, defect, from_error
from cookbook_core.doctor.watch import watch_class
from cookbook_core.errors import CookbookError

PER_TOKEN = ("weights", "reference", "sampling", "logprobs", "advantages")


def several(indices: Sequence[int]) -> str:
    """Datums by index, the first five of them."""
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return ", ".join(f"data[{i}]" for i in indices[:5]) + more


def lengths(case: Case) -> list[Finding]:
    """The data as given: every per-token input has one entry per logprob."""
    found = []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        targets = datum.loss_fn_inputs.get("target_tokens")
        if case.form == "logprobs" and targets and targets.shape != list(lp.shape):
            what, got = "not one for each target token", tuple(lp.shape)
            found.append(defect("alignment", f"logprobs[{i}]", what, tuple(targets.shape), got))
            continue
        for key, value in datum.loss_fn_inputs.items():
            # a single number or an array of one stands for the whole sequence
            if role_of(key) in PER_TOKEN and value.shape[:1] not in ([], [1], [len(lp)]):
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                mend = "Build datums with datum_from_prompt_completion(..., name=values)."
                what = "not one entry per logprob"
                found.append(defect("alignment", where, what, len(lp), value.shape[0], mend))
    return found[:5]


def returns(case: Case) -> list[Finding]:
    """A finite 0-d loss that hangs on the logprobs, and metrics that are numbers."""
    try:
        result = case.base
        merge_metrics(result, {})
    except CookbookError as error:
        kinds = {"finite": "not finite", "gradient": "detached|no gradient can be|uses no datum"}
        named = (k for k, words in kinds.items() if re.search(words, error.what))
        return [from_error(next(named, "returns"), case.where, error)]
    words = f"a 0-d loss ({result.loss:.4g}) and {len(result.metrics)} metric(s)"
    lost = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    more = [Finding("returns", "note", f"not finite: metric {', '.join(lost)}")] if lost else []
    return [Finding("returns", "ok", words), *more]


def mutates(case: Case) -> list[Finding]:
    """Data, logprobs and both lists are after a call what they were before."""
    import torch

    data, logprobs = copies(case.data, set()), [lp.clone() for lp in case.logprobs]
    given = (list(data), list(logprobs))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            case.loss_fn(*given)
    except Exception:
        return []  # `returns` says it
    changed = []
    for name, after, before in (("data", given[0], data), ("logprobs", given[1], logprobs)):
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
    what, mend = "the loss changes its input", "Work on copies: the caller uses these again."
    where = ", ".join(changed[:3]) + more
    return [defect("mutates", where, what, "inputs as they were", "changed ones", mend)]


def deterministic(case: Case) -> list[Finding]:
    """Three calls on the same input, the random generators running on, give the same loss."""
    import torch

    seen = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(3):
            logprobs = [lp.clone() for lp in case.logprobs]
            seen.append(evaluate(case.loss_fn, copies(case.data, set()), logprobs).loss)
    if len(set(seen)) == 1:
        return [Finding("deterministic", "ok", "the same input gives the same loss")]
    mend = "Look for random numbers (dropout) and for state kept between calls. "
    mend += "Other defects show once this is mended."
    got = ", ".join(f"{x:.6g}" for x in seen)
    what = "the same input gives another loss each time"
    return [defect("deterministic", case.where, what, "one value", got, mend)]


# ---- gradient ------------------------------------------------------------------------------------


def _difference(case: Case, changes: list[Any], eps: float, frozen: bool) -> float:
    """(L(lp + eps * change) - L(lp - eps * change)) / 2 eps; frozen holds stopped gradients."""
    values = []
    for sign in (eps, -eps):
        logprobs = [lp + sign * c for lp, c in zip(case.logprobs, changes, strict=True)]
        watch = watch_class()(case.tape) if frozen else None
        values.append(case.run(logprobs=logprobs, watch=watch).loss)
    return (values[0] - values[1]) / (2 * eps)


def _directions(case: Case) -> list[tuple[str, list[Any]]]:
    """Where to differentiate: two coordinates of five datums each, and everywhere at random."""
    import torch

    rng, count = np.random.default_rng(0), len(case.data)
    zeros = [torch.zeros_like(lp) for lp in case.logprobs]
    found = []
    for i in sorted({int(x) for x in np.linspace(0, count - 1, min(5, count))}):
        flat = case.base.grads[i].abs().reshape(-1)
        for place in sorted({int(flat.argmax()), int(rng.integers(len(flat)))}):
            change = [z.clone() for z in zeros]
            change[i].reshape(-1)[place] = 1.0
            at = [int(j) for j in np.unravel_index(place, tuple(zeros[i].shape))]
            found.append((f"logprobs[{i}]{at}", change))
    noise = [torch.tensor(rng.normal(size=tuple(z.shape))).to(z) for z in zeros]
    return [*found, ("logprobs in a random direction", noise)]


def _disagrees(case: Case, change: list[Any], exact: float, scale: float) -> float | None:
    """The slope by finite differences where it is not `exact`, else None.

    A loss that rounds to float32 or less inside gives noise at small steps: then a coarse step
    decides, less sharply.
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

    `.detach()` and no_grad blocks stop a gradient on purpose (importance weights, baselines):
    what they gave is held constant. What leaves the graph otherwise, by `.item()` say, moves with
    the logprobs and shows as a difference.
    """
    if case.steepest == 0:
        return [defect("gradient", case.where, "the gradient is 0 everywhere", "a slope", 0.0)]
    stopped = False
    for place, change in _directions(case):
        along = [g * c for g, c in zip(case.base.grads, change, strict=True)]
        exact = sum(float(a.sum()) for a in along)
        scale = max(case.steepest, sum(float(a.abs().sum()) for a in along))
        got = _disagrees(case, change, exact, scale)
        if got is not None:
            what = "autograd and finite differences disagree"
            mend = "Keep to tensor operations on the way to the loss; .detach() what is meant so. "
            lost = f"Values leave the graph here: {'; '.join(case.escapes[:4])}."
            mend += lost if case.escapes else "Check the backward of custom autograd functions."
            where, rule = f"{case.where} slope at {place}", f"{got:.6g} by differences"
            return [defect("gradient", where, what, rule, f"{exact:.6g}", mend)]
        if case.tape and not stopped and case.exact:
            moving = _difference(case, change, 1e-5, frozen=False)
            stopped = abs(moving - exact) > 1e-4 * scale + 1e-7 * (1 + abs(case.base.loss))
    found = [Finding("gradient", "ok", "agrees with finite differences")]
    if stopped:
        words = ".detach() or no_grad holds a part of the loss constant that moves with the "
        words += "logprobs: right for importance weights and baselines, and for little else"
        found.append(Finding("gradient", "note", words))
    return found


def every_datum(case: Case) -> list[Finding]:
    """Each datum that has something to learn gets gradient."""
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
    found = []
    if unused:
        what, mend = "not used by the loss", "Use every datum, or leave these out of the batch."
        found.append(defect("every_datum", several(unused), what, "a gradient", 0.0, mend))
    if lost:
        what = "the loss moves with it, but no gradient gets there"
        mend = "; ".join(case.escapes[:4]) or ".detach() or no_grad"
        mend = f"It leaves the graph: look at {mend}."
        found.append(defect("every_datum", several(lost), what, "a gradient", 0.0, mend))
    more = f" ({idle} without weight or advantage apart)" if idle else ""
    words = f"all {len(case.data)} datums get gradient{more}"
    return found or [Finding("every_datum", "ok", words)]


def finite(case: Case) -> list[Finding]:
    """Loss and gradient stay finite in float32 where tokens are certain, or very unlikely."""
    import torch

    side = {*case.keys("reference"), *case.keys("sampling")}
    names, flat = " and ".join(sorted(side)), set(case.keys("advantages"))
    known = [lp.float() for lp in case.logprobs]
    log, ratio = "Clamp before log() or a division.", "Clamp the log-ratio before exp()."
    spots: list[tuple[str, Any, Any, str]] = [
        ("where every token is certain (logprob 0)", None, [lp * 0 for lp in known], log)
    ]
    for odd in (0, 1):
        rare = [torch.full_like(lp, -300.0) if i % 2 == odd else lp for i, lp in enumerate(known)]
        mend = f"Use logsigmoid and logsumexp. {ratio}"
        spots.append(("where tokens are very unlikely (-300 nats each)", None, rare, mend))
    if side:
        spots.append((f"where {names} are -300", case.filled(side, -300.0), known, ratio))
        mend = "Mind sqrt, norms and division where they are equal."
        spots.append((f"where {names} equal the policy's", case.at_step_0(), None, mend))
    if flat:
        mend = "Add a small number to the standard deviation."
        spots.append(("where all advantages are 0", case.filled(flat, 0.0), known, mend))
    for spot, data, logprobs, mend in spots:
        try:
            case.run(data, logprobs)
        except CookbookError as error:
            if "not finite" in error.what:
                one = from_error("finite", case.where, error)
                what = f"{one.what} {spot}"
                return [defect("finite", one.where, what, one.expected, one.got, mend)]
    also = f", and where {names} equal the policy's" if side else ""
    return [Finding("finite", "ok", f"also for certain and very unlikely tokens{also}")]
