"""Checks of a loss on changed batches: masks, padding, order, reduction, alignment."""

from __future__ import annotations

import math
import re

from cookbook_core.datums import with_inputs
from cookbook_core.doctor.case import Case, per_token, role_of, take_rows
from cookbook_core.doctor.checks import PER_TOKEN, several
from cookbook_core.doctor.report import Finding, defect, not_checked
from cookbook_core.errors import CookbookError
from cookbook_core.types import TensorData

import numpy as np

# ---- where gradient falls ------------------------------------------------------------------------


def _shifted(on: np.ndarray, hit: np.ndarray) -> str:
    """Say which way `hit` is `on` moved by one position, wrapped or cut at the end; else ""."""
    for by, words in ((-1, "early"), (1, "late")):
        rolled = np.roll(on, by)
        cut = rolled.copy()
        cut[-1 if by < 0 else 0] = False
        if hit.any() and (np.array_equal(hit, rolled) or np.array_equal(hit, cut)):
            return f"gradient falls one token too {words}"
    return ""


def where_gradient_falls(case: Case) -> list[Finding]:
    """Gradient on all weighted tokens, none on tokens of weight 0, and no shift by one."""
    totals = np.zeros(6, dtype=int)
    shifts: dict[str, list[int]] = {}  # what is off by one -> datum indices
    misplaced: dict[str, list[int]] = {}
    positions: dict[int, tuple[list[int], list[int]]] = {}
    scattered = False
    for i, g in enumerate(case.base.grads):
        on = case.weighted(i)
        if on is None or not on.any():
            continue
        hit = (g.abs() > 1e-9 * case.steepest).reshape(len(g), -1).any(dim=1).numpy()
        prompt = np.arange(len(on)) < on.argmax()
        rest = ~on & ~prompt
        parts = (on & hit, on, prompt & hit, prompt, rest & hit, rest)
        totals += [int(part.sum()) for part in parts]
        weighted, touched = on.nonzero()[0].tolist(), hit.nonzero()[0].tolist()
        positions[i] = weighted, touched
        missing = [t for t in weighted if t not in touched]
        ends = {weighted[0]: "first", weighted[-1]: "last"}
        if missing and not (hit & ~on).any():
            if len(weighted) > 2 and len(missing) == 1 and missing[0] in ends:
                what = f"the {ends[missing[0]]} token of the response gets no gradient"
                shifts.setdefault(what, []).append(i)
            else:
                scattered = True
        elif (hit & ~on).any():
            kind = "prompt tokens" if (prompt & hit).any() else "tokens of weight 0"
            what = _shifted(on, hit)
            (shifts if what else misplaced).setdefault(what or f"gradient on {kind}", []).append(i)
    if not totals[1]:
        reason = "no datum has weights that say which tokens should get gradient"
        return [not_checked("weights", reason)]
    shift_fix = "weights[t] and logprobs[t] both belong to target_tokens[t]: index both alike. "
    shift_fix += "A pair that differs in that token alone would teach nothing."
    mask_fix = "Multiply by weights, or use weighted_sums(data, logprobs)."
    off = {} if scattered else shifts
    findings = [
        defect(
            check,
            several(at),
            what,
            f"positions {positions[at[0]][0]} in the first",
            positions[at[0]][1],
            fix,
        )
        for check, kinds, fix in (
            ("off_by_one", off, shift_fix),
            ("weights", misplaced, mask_fix),
        )
        for what, at in kinds.items()
    ]
    a, b, c, d, e, f = totals.tolist()
    words = f"gradient on {a} of {b} weighted tokens, {c} of {d} prompt tokens"
    words += f", {e} of {f} other tokens of weight 0" if f else ""
    return findings or [Finding("weights", "ok" if a == b else "note", words)]


def padding(case: Case) -> list[Finding]:
    """Further tokens of weight 0 before a datum change neither loss nor gradient."""
    import torch

    data, logprobs = [], []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        if case.weighted(i) is None:
            return [not_checked("padding", f"data[{i}] has no weights")]
        more = 1 + i % 3
        data.append(take_rows(datum, np.concatenate([np.full(more, -1), np.arange(len(lp))])))
        logprobs.append(torch.cat([lp[:1].expand(more, *lp.shape[1:]) * 0 - 1.5, lp]))
    result = case.run(data, logprobs)
    moved = max(
        float((new[-len(old) :] - old).abs().max())
        for new, old in zip(result.grads, case.base.grads, strict=True)
    )
    if (
        case.same(result.loss, case.base.loss, case.steepest)
        and moved <= 100 * case.tolerance * case.steepest
    ):
        return [Finding("padding", "ok", "further tokens of weight 0 change nothing")]
    what = "1 to 3 more tokens of weight 0 before each datum change loss or gradient"
    fix = "Divide by the sum of the weights, not by the number of positions, padded or not."
    rule, got = f"{case.base.loss:.6g}", f"{result.loss:.6g}"
    return [defect("padding", case.where, what, rule, got, fix)]


# ---- order and size of the batch -----------------------------------------------------------------


def order(case: Case) -> list[Finding]:
    """Find the smallest unit (datum, pair, group) whose order in the batch does not matter."""
    count = len(case.data)
    for unit in [u for u in range(1, count + 1) if count % u == 0]:
        try:
            losses = _losses_in_other_orders(case, unit)
        except CookbookError:
            continue
        if all(case.same(loss, losses[0]) for loss in losses):
            case.unit = unit
            words = {1: "datums", 2: "whole pairs"}.get(unit, f"whole groups of {unit}")
            return [Finding("order", "ok", f"the order of {words} does not matter")]
    what = "the loss depends on the order of the datums, however they are grouped"
    fix = "Side data goes on its own datum, with_inputs(datum, name=values): not into a list "
    fix += "beside the datums. A datum may use its own pair or group, not a neighbour by index."
    rule = f"{case.base.loss:.6g} in any order"
    return [defect("order", case.where, what, rule, "another value", fix)]


def _losses_in_other_orders(case: Case, unit: int) -> list[float]:
    """The loss of at least four groups of `unit` datums, in four orders.

    A loss that looks at a neighbour (`n.roll(1)`) does not see a rotation, and one that looks at
    both does not see the reverse either. Every order of two or three groups is one of these; of
    four groups, swapping two neighbours is neither.
    """
    data, logprobs = list(case.data), list(case.logprobs)
    for more in range(1, math.ceil(4 * unit / len(case.data))):
        for i, lp in enumerate(case.logprobs):
            rows = _with_longer_end(case, i, more)
            data.append(take_rows(case.data[i], rows))
            logprobs.append(lp[rows.tolist()] * (1 + more / 10))
    groups, rng = np.arange(len(data)).reshape(-1, unit), np.random.default_rng(0)
    swapped = [1, 0, *range(2, len(groups))]
    orders = (groups, groups[swapped], groups[::-1], rng.permutation(groups))
    return [
        case.run([data[j] for j in picked], [logprobs[j] for j in picked]).loss
        for picked in (order.reshape(-1).tolist() for order in orders)
    ]


def _with_longer_end(case: Case, i: int, more: int) -> np.ndarray:
    """Rows of datum i that repeat its last weighted token `more` times."""
    rows, on = np.arange(len(case.logprobs[i])), case.weighted(i)
    last = rows[-1] if on is None or not on.any() else on.nonzero()[0][-1]
    return np.insert(rows, last, [last] * more)


def _declared(case: Case) -> str:
    """Read from the docstring what the loss does over the batch: "mean", "sum", else ""."""
    text = getattr(case.loss_fn, "func", case.loss_fn).__doc__ or ""
    section = re.search(r"^\s*loss:(.*?)(?:^\s*metrics:|\Z)", text, re.DOTALL | re.MULTILINE)
    text = " ".join((section.group(1) if section else text.split("\n\n")[0]).split()).lower()
    units = r"pairs|sequences|datums|rows|groups|examples|completions|(?:the )?batch|tokens of the"
    words = re.findall(rf"\b(mean|average|sum)\s+over\s+(?:\w+\s+){{0,3}}?(?:{units})\b", text)
    return words[0].replace("average", "mean") if words else ""


def reduction(case: Case) -> list[Finding]:
    """Loss and gradient scale with the batch as the docstring says, and how with the length."""
    count, fix = len(case.data), "Side data goes on its own datum; accept a batch of any size."
    try:
        result = case.run(2 * case.data, 2 * case.logprobs)
    except CookbookError as error:
        what = f"fails on a batch of another size: {error.what}"
        got = f"an error on {2 * count}"
        return [defect("reduction", case.where, what[:200], f"a loss of {count} datums", got, fix)]
    size = sum(float(g.abs().sum()) for g in case.base.grads)
    halves = (result.grads[:count], result.grads[count:])
    scale, second = (sum(float(g.abs().sum()) for g in half) / size for half in halves)
    if abs(scale - second) > 100 * case.tolerance:
        what = "two copies of a batch get different gradients"
        got = f"{scale:.3g} and {second:.3g} times that of one copy"
        return [defect("reduction", case.where, what, "equal gradients", got, fix)]
    kinds = {1.0: "sum", 0.5: "mean"}
    kind = next((k for s, k in kinds.items() if abs(scale - s) < 1e-3), "")
    declared = _declared(case)
    if declared and kind and declared != kind:
        what = f"the docstring says {declared}, but it is a {kind} over the batch"
        rule = f"a batch given twice to scale each gradient by {1 if declared == 'sum' else 0.5}"
        fix = "Divide by the number of datums or pairs, or change the docstring."
        return [defect("reduction", case.where, what, rule, f"{scale:.3g}", fix)]
    words = f"a {kind} over the batch" if kind else "neither a sum nor a mean over the batch"
    words += f": given twice, {_times(result.loss, case.base.loss)} the loss and "
    words += f"{scale:.3g} times each token's gradient"
    return [Finding("reduction", "ok" if kind else "note", words), *_longer(case, size)]


def _times(new: float, old: float) -> str:
    return f"{new / old:.3g} times" if abs(old) > 1e-9 else f"{new:.3g} against {old:.3g} as"


def _longer(case: Case, size: float) -> list[Finding]:
    """Say how a completion of twice the length counts: every weighted token twice in a row.

    size: sum of |gradient| over the batch as it is.
    """
    data, logprobs = [], []
    for i, (datum, lp) in enumerate(zip(case.data, case.logprobs, strict=True)):
        on = case.weighted(i)
        if on is None:
            return [not_checked("reduction", f"length: data[{i}] has no weights")]
        rows = np.repeat(np.arange(len(on)), np.where(on, 2, 1))
        data.append(take_rows(datum, rows))
        logprobs.append(lp[rows.tolist()])
    result = case.run(data, logprobs)
    share = sum(float(g.abs().sum()) for g in result.grads) / size
    kind = "longer completions count for more or less, neither as a sum nor as a mean of tokens"
    if case.same(result.loss, case.base.loss):
        kind = "completions count alike whatever their length"
    elif case.same(result.loss, 2 * case.base.loss) or share > 1.8:
        kind = "a sum over tokens, so longer completions count for more"
    words = f"{kind}: at twice the length {_times(result.loss, case.base.loss)} the loss"
    return [Finding("reduction", "ok", f"{words} and {share:.3g} times the gradient in all")]


def alignment(case: Case) -> list[Finding]:
    """Per-token side data that is one entry too short or too long raises an error."""
    i = max(range(len(case.data)), key=lambda j: case.data[j].model_input.length)
    datum, findings, rejected = case.data[i], [], []
    n = datum.model_input.length
    # the training client itself validates weights and targets
    keys = case.reads & set(per_token(datum)) - {"weights"}
    keys = sorted(key for key in keys if role_of(key) in PER_TOKEN)
    if keys and n <= 2:  # one entry fewer would be one number for the whole sequence
        return [not_checked("alignment", "all datums have at most 2 tokens")]
    for key in keys:
        value = datum.loss_fn_inputs[key]
        for size in (n - 1, n + 1):
            wrong = TensorData(np.resize(value.to_numpy(), (size, *value.shape[1:])), value.dtype)
            data = [*case.data[:i], with_inputs(datum, **{key: wrong}), *case.data[i + 1 :]]
            try:
                case.run(data)
            except CookbookError:
                rejected.append(key)
                continue
            where = f'data[{i}].loss_fn_inputs["{key}"]'
            what = f"{size} entries beside {n} logprobs raise no error"
            fix = f'Call check_alignment(data, logprobs, "{key}") first; zip with strict=True.'
            findings.append(defect("alignment", where, what, "an error", "a loss", fix))
            break
    words = f"{', '.join(dict.fromkeys(rejected))} of another length than the logprobs: refused"
    return findings or ([Finding("alignment", "ok", words)] if rejected else [])
