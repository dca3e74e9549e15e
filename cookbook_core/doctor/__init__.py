"""Examine a custom loss before a run is spent on it; no model is needed.

    from cookbook_core.doctor import examine
    print(examine(my_loss, data))                 # your own datums
    cookbook doctor my_dpo.py:my_loss             # example datums; exit code 1 on a defect

The loss is called many times on plausible logprobs in float64: on the batch as it is, and on
batches in which one thing is changed: a token, a length, the order, a reference. What each check
looks for is the first line of its function, in `checks`, `batch` and `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.custom_loss import LossFn, check_loss, name_of
from cookbook_core.datum_checks import check_data
from cookbook_core.doctor import batch, checks, reference
from cookbook_core.doctor.case import Case, make_case
from cookbook_core.doctor.examples import example_data, wants_vocab
from cookbook_core.doctor.report import Finding, Report, from_error, not_checked
from cookbook_core.errors import (
    CookbookError,
    DatumError,
    LossError,
    NoGradientError,
    NotFiniteError,
)
from cookbook_core.types import Datum

__all__ = ["Finding", "Report", "examine"]

# The other checks need a loss without a defect in these.
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
# Skip the check on the left if one on the right failed: it would repeat the same defect.
REPEATS = {
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
    """Check a loss for everything that is known to go wrong in losses.

    Args:
        loss_fn: see `custom_loss.LossFn`; bind further arguments with functools.partial.
        data: D datums as they would be trained on, side data such as "ref_logprobs" included.
            None builds example datums with the inputs that the loss reads.
        logprobs: D tensors in the shape of target_tokens, nats; None draws plausible ones, near
            the reference's or the sampler's where the datums carry these.
        loss_type_input: "vocab_logprobs" for a loss over the whole vocabulary, None to read
            it from the name of the loss's second parameter.
        group_size: example datums come in whole groups of this many.
        seed: seed of the logprobs.
    Returns:
        Report: `report.ok`, `report.findings`, `str(report)`. A loss that fails, and data that a
        training client would reject, are findings, not exceptions.
    Raises:
        ConfigError: loss_fn is not a function, loss_type_input is unknown, or the whole
            vocabulary's logprobs of these datums would take too much memory.
    """
    loss_type = check_loss(loss_fn, loss_type_input)
    given = data is not None
    if wants_vocab(loss_fn, loss_type_input):
        loss_type = "vocab_logprobs"
    if data is None:
        data, loss_type = example_data(loss_fn, loss_type_input, group_size=group_size, seed=seed)
    subject = f"{name_of(loss_fn)} on {len(data)} {'datums' if given else 'example datums'}"
    needs = () if loss_type == "vocab_logprobs" else ("target_tokens",)
    try:
        check_data(data, vocab_size=2**62, needs=needs)
    except DatumError as error:
        errors = [error, *error.others]
        return Report(subject, tuple(from_error("data", "data", each) for each in errors))
    case = make_case(loss_fn, data, logprobs, loss_type, seed)
    findings = _all_checks(case)
    if not given and any(_misses_input(f.error) for f in findings if f.check == "returns"):
        words = "example datums may lack what the loss needs; examine(loss_fn, data) takes yours"
        findings.append(Finding("data", "note", words))
    fields = ", ".join(sorted(key for key in case.reads if key in data[0].loss_fn_inputs))
    return Report(f"{subject}; it reads {fields or 'no loss input'}", tuple(findings))


def _all_checks(case: Case) -> list[Finding]:
    """Run the checks in order; list those skipped because an earlier one failed."""
    findings = _run_check(case, checks.mutates, set())
    for check in FIRST:
        results = _run_check(case, check, set())
        findings += results
        if any(f.status == "defect" for f in results):
            needed = "the other checks need a loss that passes this one"
            return [*findings, not_checked(results[0].check, needed)]
    for check in THEN:
        defects = {f.check for f in findings if f.status == "defect"}
        if repeated := sorted(defects & REPEATS.get(check.__name__, set())):
            findings.append(not_checked(check.__name__, f"fix {' and '.join(repeated)} first"))
        else:
            findings += _run_check(case, check, defects)
    if not case.exact:
        words = "the loss takes float32 logprobs alone, so differences are coarse"
        findings.append(Finding("gradient", "note", words))
    return findings


def _run_check(
    case: Case, check: Callable[[Case], list[Finding]], defects: set[str]
) -> list[Finding]:
    """Run one check; a loss that fails on the check's batch is a defect.

    defects: checks that have found one; "finite" among them covers further values that are not.
    """
    name = {"where_gradient_falls": "weights"}.get(check.__name__, check.__name__)
    try:
        return check(case)
    except NotFiniteError as error:
        if "finite" in defects:
            return [not_checked(name, "fix finite first")]
        return [from_error(name, case.where, error)]
    except CookbookError as error:
        return [from_error(name, case.where, error)]


def _misses_input(error: CookbookError | None) -> bool:
    """Whether the loss raised an exception, or a helper that it calls found an input missing."""
    if isinstance(error, LossError):
        return error.__cause__ is not None and not isinstance(error, NoGradientError)
    return error is not None
