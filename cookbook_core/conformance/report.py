"""What a check found, and how the table shows it."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["pass", "fail", "not offered", "cannot be read"]
ORDER: tuple[Result, ...] = ("pass", "fail", "not offered", "cannot be read")


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    figure: what was measured, with its unit, or the error.
    """

    result: Result
    figure: str


@dataclass(frozen=True)
class Row:
    """A line of the table. harm: what a failure does to a training run."""

    name: str
    outcome: Outcome
    harm: str


def passes(good: bool, figure: str) -> Outcome:
    """A pass where `good`, else a fail."""
    return Outcome("pass" if good else "fail", figure)


def row_text(row: Row, names: int) -> str:
    """Name (in `names` characters), result, figure; under what did not pass, what that does."""
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    head = f"{row.name:{names}}  {row.outcome.result:14}  "
    lines = textwrap.wrap(
        row.outcome.figure, width, initial_indent=head, subsequent_indent=" " * len(head)
    )
    if row.outcome.result in ("fail", "cannot be read"):
        head = " " * (names + 2) + "-> "
        lines += textwrap.wrap(
            row.harm, width, initial_indent=head, subsequent_indent=" " * len(head)
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """How many passed, failed, were not offered and could not be read."""
    counts = Counter(row.outcome.result for row in rows)
    return ", ".join(f"{counts[result]} {result}" for result in ORDER if counts[result])
