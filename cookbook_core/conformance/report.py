"""The outcome of a check, and its row in the table."""

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
    """The result of one check.

    Attributes:
        figure: the measured value with its unit, or the error.
    """

    result: Result
    figure: str


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        harm: what a failure does to a training run.
    """

    name: str
    outcome: Outcome
    harm: str


def passes(good: bool, figure: str) -> Outcome:
    """A pass if `good`, else a fail."""
    return Outcome("pass" if good else "fail", figure)


def row_text(row: Row, names: int) -> str:
    """Name (padded to `names` characters), result and figure; below a failure, its harm."""
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
    """Counts of checks that passed, failed, were not offered and could not be read."""
    counts = Counter(row.outcome.result for row in rows)
    return ", ".join(f"{counts[result]} {result}" for result in ORDER if counts[result])
