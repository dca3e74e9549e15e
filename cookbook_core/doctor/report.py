"""What the doctor found: findings, and the report they make up."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from cookbook_core.errors import CookbookError

Status = Literal["ok", "note", "defect"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    status: "defect" spoils a run, "note" is worth knowing and may be meant, "ok" is as it should.
    where: datum index and field, such as `data[3].loss_fn_inputs["ref_logprobs"]`.
    """

    check: str
    status: Status
    what: str
    where: str = ""
    expected: str = ""
    got: str = ""
    mend: str = ""

    def __str__(self) -> str:
        text = self.what
        if self.expected:
            slots = {"expected": self.expected, "got": self.got, "fix": self.mend}
            text = str(CookbookError(self.where, self.what, **slots))
        elif self.where or self.mend:
            text = f"{self.where}: {self.what}. {self.mend}".rstrip().removeprefix(": ")
        head = f"{self.status:<7} {self.check:<14}"
        return textwrap.fill(text, 100, initial_indent=head, subsequent_indent=" " * len(head))


def defect(
    check: str, where: str, what: str, expected: object, got: object, mend: str = ""
) -> Finding:
    """Make a finding that spoils a run; the words go into `errors.message`'s shape."""
    return Finding(check, "defect", what, where, str(expected), str(got), mend)


def from_error(check: str, where: str, error: Exception | str) -> Finding:
    """Read an error of this package, which says where, expected and got, as a defect."""
    if isinstance(error, CookbookError):
        fix = "" if error.fix.startswith("Nothing was accumulated") else error.fix
        return Finding(check, "defect", error.what, error.where, error.expected, error.got, fix)
    return Finding(check, "defect", str(error).rstrip("."), where)


@dataclass(frozen=True)
class Report:
    """All findings about one loss on one batch; `str(report)` is what to read."""

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
