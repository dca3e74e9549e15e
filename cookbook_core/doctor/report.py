"""The doctor's findings, and the report that lists them."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from cookbook_core.errors import CookbookError

Status = Literal["ok", "note", "defect"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    check: the check's name, such as "padding".
    status: "defect" spoils a run, "note" may be intended, "ok" is as it should be.
    what: one sentence; where, expected, got, fix: as in `errors.CookbookError`, "" where empty.
    error: the error that the finding reports, None where a check compared values.
    """

    check: str
    status: Status
    what: str
    where: str = ""
    expected: str = ""
    got: str = ""
    fix: str = ""
    error: CookbookError | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        slots = {"expected": self.expected or None, "fix": self.fix}
        slots |= {"got": self.got} if self.got else {}
        text = str(CookbookError(self.where, self.what, **slots))
        if self.status != "defect":
            text = text.removesuffix(".")
        head = f"{self.status:<7} {self.check:<14}"
        return textwrap.fill(text, 100, initial_indent=head, subsequent_indent=" " * len(head))


def defect(
    check: str, where: str, what: str, expected: object, got: object, fix: str = ""
) -> Finding:
    """Make a finding of status defect."""
    return Finding(check, "defect", what, where, str(expected), str(got), fix)


def not_checked(check: str, reason: str) -> Finding:
    """Make a note that a check could not be made."""
    return Finding(check, "note", f"not checked: {reason}")


def from_error(check: str, where: str, error: CookbookError) -> Finding:
    """Report an error as a defect, at `where` unless the error has its own `where`."""
    slots = error.slots() | {"where": error.where or where}
    return Finding(check, "defect", error=error, **slots)


@dataclass(frozen=True)
class Report:
    """All findings about one loss on one batch; `print(report)` shows them."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no defect (notes do not count)."""
        return not self.defects

    @property
    def defects(self) -> tuple[Finding, ...]:
        """The findings that spoil a run."""
        return tuple(f for f in self.findings if f.status == "defect")

    def __str__(self) -> str:
        counts = Counter(f.status for f in self.findings)
        plural = {1: ""}
        verdict = ", ".join(
            f"{counts[s] or 'no'} {s}{plural.get(counts[s], 's')}" for s in ("defect", "note")
        )
        return "\n".join([self.subject, *map(str, self.findings), verdict])
