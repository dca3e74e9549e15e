"""Examine a custom loss before a run is spent on it; no model is needed.

    from cookbook_core.doctor import examine
    print(examine(my_loss, data))                           # your own datums
    python -m cookbook_core.doctor my_dpo.py:my_loss        # made-up ones; exit 1 on a defect

The loss is fed plausible made-up logprobs in float64 and asked many times: on the batch as it is,
on one with a token, a length, an order or a reference changed. What each check looks for is the
first line of its function, in `checks`, `batch` and `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.custom_loss import LossFn, check_loss, name_of
from cookbook_core.datums import check_data
from cookbook_core.doctor import batch, checks, reference
from cookbook_core.doctor.case import Case, make_case
from cookbook_core.doctor.examples import example_data
from cookbook_core.doctor.report import Finding, Report, from_error
from cookbook_core.errors import CookbookError, DatumError
from cookbook_core.types import Datum

__all__ = ["Finding", "Report", "examine"]

# A defect of the first ones leaves the others nothing to ask.
FIRST = (checks.lengths, checks.returns, checks.deterministic)
THEN: tuple[Callable[[Case], list[Finding]], ...] = (
    checks.gradient,
    checks.every_datum,
    batch.where_gradient_falls,
    batch.padding,
    batch.order,
    batch.reduction,
    batch.alignment,
    checks.finite,
    reference.sign,
    reference.step_0,
    reference.kl,
)
# What these would say follows from defects found before.
FOLLOWS = {
    "padding": {"off_by_one", "weights"},
    "order": {"every_datum"},
    "reduction": {"every_datum", "order"},
}


def examine(
    loss_fn: LossFn,
    data: Sequence[Datum] | None = None,
    logprobs: Sequence[Any] | None = None,
    *,
    loss_type_input: str | None = None,
    group_size: int = 1,
    seed: int = 0,
) -> Report:
    """Ask a loss everything that can go wrong with it, and report in plain words.

    Args:
        loss_fn: see `custom_loss.LossFn`; bind further arguments with functools.partial.
        data: D datums as they would be trained on, side data such as "ref_logprobs" included.
            None makes up some that have what the loss asks for.
        logprobs: D tensors like target_tokens, nats; None draws plausible ones, near the
            reference's or the sampler's where the datums carry these.
        loss_type_input: "vocab_logprobs" for a loss of the whole vocabulary's.
        group_size: made-up data comes in whole groups of this many.
        seed: of the logprobs.
    Returns:
        Report: `report.ok`, `report.findings`, `str(report)`. A loss that fails, or data that a
        training client would refuse, is a finding and not an exception.
    Raises:
        ConfigError: loss_fn is not a function, loss_type_input is unknown, or a whole vocabulary's
            logprobs of these datums would not fit.
    """
    form = check_loss(loss_fn, loss_type_input)
    made_up = data is None
    if data is None:
        data, form = example_data(loss_fn, loss_type_input, group_size=group_size, seed=seed)
    subject = f"{name_of(loss_fn)} on {len(data)} {'made-up datums' if made_up else 'datums'}"
    needs = () if form == "vocab_logprobs" else ("target_tokens",)
    try:
        check_data(data, vocab_size=2**62, needs=needs)
    except DatumError as error:
        listed = [error, *error.others]
        return Report(subject, tuple(from_error("data", "data", each) for each in listed))
    case = make_case(loss_fn, data, logprobs, form, seed)
    findings = _ask(case, checks.mutates, set())
    for check in FIRST:
        findings += _ask(case, check, set())
        if any(f.status == "defect" and f.check != "mutates" for f in findings):
            break
    else:
        for check in THEN:
            known = {f.check for f in findings if f.status == "defect"}
            if not known & FOLLOWS.get(check.__name__, set()):
                findings += _ask(case, check, known)
        if not case.exact:
            words = "the loss takes float32 logprobs alone, so differences are coarse"
            findings.append(Finding("gradient", "note", words))
    if made_up and any("raised" in f.what for f in findings if f.check == "returns"):
        words = "made-up datums may lack what the loss needs; examine(loss_fn, data) takes yours"
        findings.append(Finding("data", "note", words))
    fields = ", ".join(sorted(key for key in case.reads if key in data[0].loss_fn_inputs))
    return Report(f"{subject}; it reads {fields or 'no loss input'}", tuple(findings))


def _ask(case: Case, check: Callable[[Case], list[Finding]], known: set[str]) -> list[Finding]:
    """Run one check; a loss that fails on the batch it made is a finding of it, unless known."""
    try:
        return check(case)
    except CookbookError as error:
        if "finite" in known and "not finite" in error.what:
            return []
        name = {"where_gradient_falls": "weights"}.get(check.__name__, check.__name__)
        return [from_error(name, case.where, error)]
