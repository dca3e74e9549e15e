"""The checks that hold for any loss: one function each, from a `Case` to findings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from cookbook_core.custom_loss import evaluate
from cookbook_core.datums import with_inputs
from cookbook_core.doctor.case import Case, copies, per_token, role_of, take_rows, watch_class
from cookbook_core.doctor.report import Finding, defect, from_error
from cookbook_core.errors import CookbookError
from cookbook_core.tinker.types import TensorData

PER_TOKEN_ROLES = ("weights", "reference", "sampling", "advantages")


def mean_abs(tensor: Any) -> float:
    """Mean of the absolute values, as a float."""
    return float(tensor.abs().mean())


def lengths(case: Case) -> list[Finding]:
    """The data as given: every per-token input has one entry per logprob."""
    found = []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        for key, value in datum.loss_fn_inputs.items():
            # a single number or an array of one stands for the whole sequence
            if role_of(key) in PER_TOKEN_ROLES and value.shape[:1] not in ([], [1], [len(lp)]):
                where = f'data[{i}].loss_fn_inputs["{key}"]'
                mend = "Build datums with datum_from_prompt_completion(..., name=values)."
                what = "not one entry per logprob"
                found.append(defect("alignment", where, what, len(lp), value.shape[0], mend))
    return found


def returns(case: Case) -> list[Finding]:
    """A 0-d loss that hangs on the logprobs, and metrics that are numbers; all of it finite."""
    try:
        result = case.base
    except CookbookError as error:
        text = str(error)
        kinds = {
            "mutates": r"in-place|in place operation",
            "finite": r"not finite",
            "gradient": r"detached|no gradient can be taken|uses no datum",
        }
        check = next((k for k, pattern in kinds.items() if re.search(pattern, text)), "returns")
        return [from_error(check, case.where, error)]
    n = len(result.metrics)
    return [Finding("returns", "ok", f"a 0-d loss ({result.loss:.4g}) and {n} metrics")]


def mutates(case: Case) -> list[Finding]:
    """Data, logprobs and both lists are after a call what they were before."""
    import torch

    data, logprobs = copies(case.data, set()), [lp.clone() for lp in case.logprobs]
    given_data, given_logprobs = list(data), list(logprobs)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            case.loss_fn(given_data, given_logprobs)
    except Exception:
        return []  # `returns` has said it
    mend = "Work on copies: the caller uses these again."
    found = []
    pairs = (("data", given_data, data), ("logprobs", given_logprobs, logprobs))
    for name, after, before in pairs:
        if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
            what = "the loss changes this list"
            found.append(defect("mutates", name, what, f"{len(before)} as given", len(after), mend))
    for i, (datum, original) in enumerate(zip(data, case.data, strict=True)):
        if not torch.equal(logprobs[i], case.logprobs[i]):
            what = "the loss changes this tensor in place"
            found.append(defect("mutates", f"logprobs[{i}]", what, "no change", "a change", mend))
        for key, value in original.loss_fn_inputs.items():
            if not np.array_equal(value.to_numpy(), datum.loss_fn_inputs[key].to_numpy()):
                where, what = f'data[{i}].loss_fn_inputs["{key}"]', "the loss changes it in place"
                found.append(defect("mutates", where, what, "no change", "a change", mend))
    return found[:5] or [Finding("mutates", "ok", "data and logprobs are left as they were")]


def deterministic(case: Case) -> list[Finding]:
    """Three calls on the same input, the random generators running on, give the same loss."""
    import torch

    seen = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(3):
            loss_fn, data = case.loss_fn, copies(case.data, set())
            seen.append(evaluate(loss_fn, data, [lp.clone() for lp in case.logprobs]).loss)
    if len(set(seen)) == 1:
        return [Finding("deterministic", "ok", "the same input gives the same loss")]
    mend = (
        "Look for dropout or random numbers, and for state kept between calls. "
        "What else is wrong shows once this is mended."
    )
    got = ", ".join(f"{x:.6g}" for x in seen)
    what = "the same input gives another loss each time"
    return [defect("deterministic", case.where, what, "one value", got, mend)]


# ---- gradient ------------------------------------------------------------------------------------


def _difference(case: Case, changes: list[Any], eps: float, frozen: bool) -> float:
    """(L(lp + eps * change) - L(lp - eps * change)) / 2 eps, with stopped gradients held still."""
    values = []
    for sign in (eps, -eps):
        logprobs = [lp + sign * c for lp, c in zip(case.logprobs, changes, strict=True)]
        watch = watch_class()(case.tape) if frozen else None
        values.append(case.run(logprobs=logprobs, watch=watch).loss)
    return (values[0] - values[1]) / (2 * eps)


def _directions(case: Case) -> list[tuple[str, list[Any]]]:
    """Where to differentiate: up to three coordinates of ten datums each, and all at random."""
    import torch

    rng = np.random.default_rng(0)
    zeros = [torch.zeros_like(lp) for lp in case.logprobs]
    found = []
    for i in np.linspace(0, len(case.data) - 1, min(10, len(case.data))).astype(int).tolist():
        flat = case.base.grads[i].abs().reshape(-1)
        places = {int(flat.argmax()), int(rng.integers(len(flat))), int(rng.integers(len(flat)))}
        for place in sorted(places):
            at = [int(j) for j in np.unravel_index(place, tuple(case.logprobs[i].shape))]
            change = [z.clone() for z in zeros]
            change[i][tuple(at)] = 1.0
            found.append((f"logprobs[{i}]{at}", change))
    noise = [torch.tensor(rng.normal(size=tuple(z.shape))).to(z) for z in zeros]
    return [*found, ("a random direction", noise)]


def gradient(case: Case) -> list[Finding]:
    """Autograd agrees with central finite differences.

    `.detach()` and no_grad blocks stop a gradient on purpose (importance weights, baselines):
    what they gave is held constant. What leaves the graph otherwise, by `.item()` say, moves with
    the logprobs and shows as a difference.
    """
    grads, stopped = case.base.grads, False
    slopes = [mean_abs(g) for g in grads]
    largest = max(float(g.abs().max()) for g in grads)
    steps = ((1e-5, 1e-5), (1e-2, 0.02)) if case.exact else ((1e-2, 0.03), (3e-2, 0.03))
    for place, change in _directions(case):
        exact = sum(float((g * c).sum()) for g, c in zip(grads, change, strict=True))
        size = sum(float((g * c).abs().sum()) for g, c in zip(grads, change, strict=True))
        got = 0.0
        for eps, share in steps:  # the coarse step forgives a loss that rounds to float32 inside
            got = _difference(case, change, eps, frozen=True)
            noise = (1e-8 if case.exact else 1e-4) * (1 + abs(case.base.loss))
            if abs(got - exact) <= share * max(largest, size) + noise:
                break
        else:
            where = f"{case.where} d loss / d {place}"
            lost = f" It leaves the graph here: {'; '.join(case.escapes[:4])}."
            mend = "Keep to tensor operations on the way to the loss; .detach() what is meant so."
            mend += lost if case.escapes else " Check the backward of custom autograd functions."
            what = "autograd and finite differences disagree"
            return [defect("gradient", where, what, f"{got:.6g} by differences", exact, mend)]
        if not stopped and case.tape:
            moving = _difference(case, change, steps[0][0], frozen=False)
            stopped = abs(moving - exact) > 10 * steps[0][1] * max(largest, size) + 1e-7
    found = [Finding("gradient", "ok", "agrees with finite differences")]
    if stopped:
        what = ".detach() or no_grad holds part of the loss constant; meant for importance weights"
        found.append(Finding("gradient", "note", f"{what} and baselines, and for nothing else"))
    if max(slopes) == 0:
        found = [defect("gradient", case.where, "the gradient is 0 everywhere", "a slope", 0.0)]
    return found


def every_datum(case: Case) -> list[Finding]:
    """Each datum that has something to learn gets gradient."""
    import torch

    found, quiet = [], 0
    for i, g in enumerate(case.base.grads):
        on = case.weighted(i)
        if bool((g != 0).any()):
            continue
        if on is not None and not on.any():
            quiet += 1
            continue
        rng = torch.Generator().manual_seed(0)
        change = [torch.zeros_like(lp) for lp in case.logprobs]
        change[i] = torch.randn(change[i].shape, generator=rng, dtype=change[i].dtype)
        moves = abs(_difference(case, change, 1e-4, frozen=False)) > 1e-7
        what = "the loss moves with it, but no gradient gets there" if moves else "is not used"
        mend = f"It leaves the graph: {'; '.join(case.escapes[:4])}." if case.escapes else ""
        mend = mend or "Look for .detach() or no_grad."
        mend = mend if moves else "Use every datum, or leave this one out of the batch."
        found.append(
            defect("every_datum", f"data[{i}]", what, "gradient", "0 at every token", mend)
        )
    more = f" ({quiet} without weight or advantage apart)" if quiet else ""
    used = f"all {len(case.data)} datums get gradient{more}"
    return found[:5] or [Finding("every_datum", "ok", used)]


# ---- where gradient falls ------------------------------------------------------------------------


def _hits(case: Case, i: int) -> np.ndarray:
    """Positions of datum i that get gradient."""
    g = case.base.grads[i].abs()
    found = g > 1e-9 * max(float(x.abs().max()) for x in case.base.grads)
    return found.reshape(len(found), -1).any(dim=1).numpy()


def _shifted(on: np.ndarray, hit: np.ndarray) -> int:
    """By how many positions hit is on moved (wrapping round or falling off the end), 0 if not."""
    for by in (-1, 1):
        rolled = np.roll(on, by)
        cut = rolled.copy()
        cut[-1 if by < 0 else 0] = False
        if not np.array_equal(hit, on) and (
            np.array_equal(hit, rolled) or np.array_equal(hit, cut)
        ):
            return by if hit.any() else 0
    return 0


def where_gradient_falls(case: Case) -> list[Finding]:
    """Gradient on weighted tokens, none on the prompt or other tokens of weight 0, no shift."""
    where = case.where
    totals = np.zeros(6, dtype=int)
    off, spilt = [], []
    mend_shift = "weights[t] and logprobs[t] both belong to target_tokens[t]: index both alike."
    for i in range(len(case.data)):
        on = case.weighted(i)
        if on is None or not on.any():
            continue
        hit, first = _hits(case, i), int(on.argmax())
        prompt = np.arange(len(on)) < first
        rest = ~on & ~prompt
        totals += [*(int(x.sum()) for x in (on & hit, on, prompt & hit, prompt, rest & hit, rest))]
        where, weighted = f"data[{i}]", on.nonzero()[0].tolist()
        touched = hit.nonzero()[0].tolist()
        missing = sorted(set(weighted) - set(touched))
        if by := _shifted(on, hit):
            what = f"gradient falls one token too {'early' if by < 0 else 'late'}"
            off.append(defect("off_by_one", where, what, weighted, touched, mend_shift))
        elif len(weighted) > 2 and missing in ([weighted[0]], [weighted[-1]]):
            which = "first" if missing == [weighted[0]] else "last"
            what = f"the {which} token of the response gets no gradient"
            more = " A pair that differs in that token alone would teach nothing."
            off.append(defect("off_by_one", where, what, weighted, touched, mend_shift + more))
        elif (hit & ~on).any():
            what = f"gradient on {'prompt tokens' if (prompt & hit).any() else 'weight-0 tokens'}"
            mend = "Multiply by weights, or use weighted_sums(data, logprobs)."
            spilt.append(defect("weights", where, what, weighted, touched, mend))
    if not totals[1]:
        return [Finding("weights", "note", "no datum has weights: nothing says where to look")]
    a, b, c, d, e, f = totals.tolist()
    words = f"gradient on {a} of {b} weighted tokens, {c} of {d} prompt tokens"
    words += f", {e} of {f} other tokens of weight 0" if f else ""
    status = "ok" if a == b or off or spilt else "note"
    return [*(off[:2] or spilt[:2]), Finding("weights", status, words)]


def padding(case: Case) -> list[Finding]:
    """More tokens of weight 0 in front change nothing."""
    import torch

    data, logprobs, kept = [], [], []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        if case.weighted(i) is None or "weights" not in datum.loss_fn_inputs:
            return []
        more = 1 + i % 3
        rows = np.concatenate([np.full(more, -1), np.arange(len(lp))])
        data.append(take_rows(datum, rows))
        logprobs.append(torch.cat([torch.full_like(lp[:1], -1.5).expand(more, *lp.shape[1:]), lp]))
        kept.append(more)
    result = case.run(data, logprobs)
    moved = max(
        mean_abs(new[k:] - old)
        for new, old, k in zip(result.grads, case.base.grads, kept, strict=True)
    )
    slope = max(mean_abs(g) for g in case.base.grads)
    if case.same(result.loss, case.base.loss, slope) and moved <= 100 * case.tolerance * slope:
        return [Finding("padding", "ok", "further tokens of weight 0 change nothing")]
    what = "1 to 3 more tokens of weight 0 before each datum change the loss"
    mend = "Divide by the sum of the weights, not by the number of positions, padded or not."
    got = f"{result.loss:.6g}"
    return [defect("padding", case.where, what, f"{case.base.loss:.6g}", got, mend)]


# ---- the batch as a whole ------------------------------------------------------------------------


def order(case: Case) -> list[Finding]:
    """The smallest unit (datum, pair, group) whose order in the batch does not matter."""
    count = len(case.data)
    rng = np.random.default_rng(0)
    for unit in [u for u in range(1, count // 2 + 1) if count % u == 0]:
        rows = np.arange(count).reshape(-1, unit)
        for mixed in (rows[::-1], rng.permutation(rows), rng.permutation(rows)):
            picked = mixed.reshape(-1)
            try:
                loss = case.run(
                    [case.data[j] for j in picked], [case.logprobs[j] for j in picked]
                ).loss
            except CookbookError:
                break
            if not case.same(loss, case.base.loss):
                break
        else:
            case.unit = unit
            names = {1: "datums", 2: "whole pairs"}
            words = names.get(unit, f"whole groups of {unit}")
            return [Finding("order", "ok", f"the order of {words} does not matter")]
    if count < 4:
        case.unit = count
        words = f"{count} datums are too few to tell what belongs together; taken as one unit"
        return [Finding("order", "note", words)]
    what = "the loss depends on the order of the datums, however they are grouped"
    mend = (
        "Side data goes on its own datum (with_inputs), not into a list beside them or "
        "behind an index."
    )
    return [defect("order", case.where, what, f"{case.base.loss:.6g}", "another loss", mend)]


def _declared(case: Case) -> str:
    """What the docstring says the loss does over the batch: "mean", "sum" or ""."""
    inner = getattr(case.loss_fn, "func", case.loss_fn)
    text = getattr(inner, "__doc__", None) or ""
    told = re.search(r"^\s*loss:(.*?)(?:^\s*metrics:|\Z)", text, re.DOTALL | re.MULTILINE)
    text = " ".join((told.group(1) if told else text.split("\n\n")[0]).split())
    units = r"pairs|sequences|datums|rows|groups|examples|completions|(?:the )?batch|tokens of the"
    said = re.findall(rf"\b(mean|average|sum)\s+over\s+(?:\w+\s+){{0,3}}?(?:{units})\b", text, re.I)
    return ("sum" if said[0].lower() == "sum" else "mean") if said else ""


def reduction(case: Case) -> list[Finding]:
    """How loss and gradient scale with the batch and with the length of completions."""
    result = case.run([*case.data, *case.data], [*case.logprobs, *case.logprobs])
    count = len(case.data)
    size = sum(mean_abs(g) for g in case.base.grads)
    first, second = (
        sum(mean_abs(g) for g in grads) / size
        for grads in (result.grads[:count], result.grads[count:])
    )
    if abs(first - second) > 100 * case.tolerance:
        what = "two copies of the batch get different gradients"
        mend = "Use every datum of whatever batch comes; side data goes on its own datum."
        got = f"{first:.3g} and {second:.3g} times the single one"
        return [defect("reduction", case.where, what, "equal ones", got, mend)]
    scale = {1.0: "sum", 0.5: "mean"}
    kind = next((k for s, k in scale.items() if abs(first - s) < 1e-3), "neither")
    words = (
        f"behaves like a {kind} over the batch: " if kind != "neither" else "neither sum nor mean: "
    )
    words += f"twice the batch gives {_times(result.loss, case.base.loss)} the loss"
    words += f" and {first:.3g} times each token's gradient"
    status, said = ("note" if kind == "neither" else "ok"), _declared(case)
    found = [Finding("reduction", status, words)]
    if said and said != kind:
        what = f"the docstring says {said}, but doubling the batch multiplies each gradient"
        mend = "Divide by the number of datums or pairs." if said == "mean" else "Do not divide."
        expected = f"by {1 if said == 'sum' else 0.5} ({said})"
        found = [defect("reduction", case.where, what, expected, f"by {first:.3g}", mend)]
    return [*found, *_longer(case)]


def _times(new: float, old: float) -> str:
    return f"{new / old:.3g} times" if abs(old) > 1e-9 else f"{new:.3g} against {old:.3g} as"


def _longer(case: Case) -> list[Finding]:
    """Every weighted token twice in a row: what a completion of twice the length does."""
    data, logprobs = [], []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        on = case.weighted(i)
        if on is None:
            return []
        rows = np.repeat(np.arange(len(on)), np.where(on, 2, 1))
        data.append(take_rows(datum, rows))
        logprobs.append(lp[rows.tolist()])
    result = case.run(data, logprobs)
    share = sum(mean_abs(g) * g.numel() for g in result.grads)
    share /= sum(mean_abs(g) * g.numel() for g in case.base.grads)
    kind = "neither sum nor mean over tokens"
    if case.same(result.loss, case.base.loss):
        kind = "completions count alike whatever their length"
    elif case.same(result.loss, 2 * case.base.loss) or share > 1.8:
        kind = "sums over tokens, so longer completions count for more"
    words = f"{kind}: twice the length gives {_times(result.loss, case.base.loss)} the loss"
    return [Finding("reduction", "ok", f"{words} and {share:.3g} times the gradient in all")]


def alignment(case: Case) -> list[Finding]:
    """Per-token side data one entry short or long is refused, not cut to fit."""
    found, keys = [], []
    i = max(range(len(case.data)), key=lambda j: case.data[j].model_input.length)
    datum = case.data[i]
    n = datum.model_input.length
    for key in per_token(datum):
        if key not in case.reads or key in ("target_tokens", "weights") or n < 3:
            continue  # the client itself refuses weights that do not fit
        keys.append(key)
        array = datum.loss_fn_inputs[key].to_numpy()
        for wrong in (array[:-1], np.concatenate([array, array[-1:]])):
            data = list(case.data)
            data[i] = with_inputs(
                datum, **{key: TensorData(wrong, datum.loss_fn_inputs[key].dtype)}
            )
            try:
                case.run(data)
            except CookbookError:
                continue
            where = f'data[{i}].loss_fn_inputs["{key}"]'
            what = f"{len(wrong)} entries beside {n} logprobs are taken without a word"
            mend = f'Call check_alignment(data, logprobs, "{key}") first; zip with strict=True.'
            found.append(defect("alignment", where, what, "an error", "a loss", mend))
            break
    words = f"{', '.join(keys)} of another length than the logprobs: refused"
    return found or ([Finding("alignment", "ok", words)] if keys else [])


def finite(case: Case) -> list[Finding]:
    """Loss and gradient stay finite in float32 where tokens are certain, or very unlikely."""
    import torch

    side = {*case.keys("reference"), *case.keys("sampling")}
    known = [lp.float() for lp in case.logprobs]
    sure = [torch.zeros_like(lp) for lp in known]
    rare = [
        [torch.full_like(lp, -300.0) if i % 2 == odd else lp for i, lp in enumerate(known)]
        for odd in (0, 1)
    ]

    def filled(value: float, names: set[str]) -> Any:
        return case.with_side_data(
            lambda key, i: (
                np.full(case.data[i].loss_fn_inputs[key].shape, value) if key in names else None
            )
        )

    spots: list[tuple[str, Any, Any, str]] = [
        ("where every token is certain (logprob 0)", case.data, sure, "Clamp before log() or /."),
        ("where every other datum is very unlikely (-300 nats a token)", case.data, rare[0], ""),
        ("where every other datum is very unlikely (-300 nats a token)", case.data, rare[1], ""),
    ]
    if side:
        names, mend = (
            " and ".join(sorted(side)),
            "Mind sqrt, abs and division where they are equal.",
        )
        spots.append((f"where {names} equal the logprobs", case.at_step_0(), case.logprobs, mend))
        spots.append((f"where {names} are -300", filled(-300.0, side), known, ""))
    if flat := set(case.keys("advantages")):
        mend = "Add a small number to the standard deviation."
        spots.append(("where all advantages are 0", filled(0.0, flat), known, mend))
    found: list[Finding] = []
    for spot, data, logprobs, mend in spots:
        try:
            case.run(data, logprobs)
        except CookbookError as error:
            if "not finite" in str(error):
                one = from_error("finite", case.where, error)
                what = f"{one.what} {spot}"
                mend = mend or "Use logsigmoid and logsumexp; clamp the log-ratio before exp()."
                found.append(defect("finite", one.where, what, one.expected, one.got, mend))
    where = "certain and very unlikely tokens, and at the reference" if side else "extreme logprobs"
    return found[:1] or [Finding("finite", "ok", f"also for {where}")]
