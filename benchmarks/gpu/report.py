"""What was measured: numbers, checks and notes by section, in gpu.json and gpu.md.

Both files are rewritten after every number, so a run that is killed leaves all it had measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OPERATORS = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}


class NotHere(Exception):
    """This version of the package does not have what is to be switched or measured."""


class Report:
    """The results of one run.

    Args:
        folder: where gpu.json and gpu.md go.
        minutes: of the whole run; sections that need more than is left are skipped.
        sections: names of all sections, in order.
    Attributes:
        card: name of the device, beside every number.
        machine: versions and the like.
        smoke: goals are listed and not judged.
        heard: warnings of the package, added to the notes of the section that ends next.
    """

    def __init__(self, folder: Path, minutes: float, sections: list[str]) -> None:
        self.folder, self.deadline = folder, time.monotonic() + 60 * minutes
        self.card, self.heard = "", list[str]()
        self.machine: dict[str, Any] = {}
        self.sections: dict[str, dict[str, Any]] = {
            name: {"status": "not reached", "numbers": [], "checks": [], "notes": []}
            for name in sections
        }
        self.now = sections[0]
        self.smoke = False
        self._section_ends = math.inf
        folder.mkdir(parents=True, exist_ok=True)

    # ---- what sections call ----------------------------------------------------------------------

    def number(
        self,
        name: str,
        value: float,
        unit: str,
        goal: tuple[str, float] | None = None,
        spread: Sequence[float] = (),
    ) -> float:
        """Keep a measured number; a missed goal, (">=" or "<=", bound), fails nothing."""
        row: dict[str, Any] = {"name": name, "value": _finite(value), "unit": unit}
        row["card"] = self.card
        if goal is not None:
            row["goal"] = f"{goal[0]} {goal[1]:g}"
            row["met"] = None if self.smoke else bool(OPERATORS[goal[0]](value, goal[1]))
        if spread:
            row["smallest"], row["largest"] = min(spread), max(spread)
            row["repeats"] = len(spread)
        return self._keep("numbers", row, value)

    def median(
        self, name: str, values: Sequence[float], unit: str, goal: tuple[str, float] | None = None
    ) -> float:
        """Keep the median of repeated measurements, with the smallest and the largest."""
        return self.number(name, statistics.median(values), unit, goal, values)

    def check(self, name: str, ok: Any, got: Any = "", bound: Any = "") -> bool:
        """Keep a check; one that failed makes the exit status 1."""
        row = {"name": name, "ok": bool(ok), "got": _plain(got), "bound": _plain(bound)}
        return self._keep("checks", row, bool(ok))

    def at_most(self, name: str, got: float, bound: float) -> bool:
        """Check that a number is within its bound; NaN is not."""
        return self.check(name, got <= bound, got, f"<= {bound:g}")

    def note(self, text: str) -> None:
        self._keep("notes", text, None)

    def skip(self, what: str, why: str) -> None:
        self.note(f"{what}: skipped: {why}")

    @contextlib.contextmanager
    def attempt(self, what: str, *, must: bool = True) -> Iterator[None]:
        """Inside, an exception ends the block alone; with `must` it is a failed check."""
        try:
            yield
        except NotHere as missing:
            self.skip(what, f"not in this version: {missing}")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            if must:
                self.check(what, False, text, "no exception")
            self.note(f"{what}: " + "".join(traceback.format_exception(error))[-2000:])

    def left(self) -> float:
        """Seconds until the deadline or, within a section, until its end."""
        return min(self.deadline, self._section_ends) - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left; notes what is left out if not."""
        if self.left() < seconds:
            self.skip(what, f"needs {seconds:.0f} s, {max(self.left(), 0):.0f} s left")
            return False
        return True

    # ---- what the main program calls -------------------------------------------------------------

    def begin(self, section: str, cap: float) -> None:
        self.now, self._began = section, time.monotonic()
        self._section_ends = self._began + cap
        self.sections[section]["status"] = "running"
        self.write()

    def end(self, status: str, error: BaseException | None = None) -> None:
        here, self._section_ends = self.sections[self.now], math.inf
        heard, self.heard = self.heard, []
        here["notes"] += [f"{text} ({n} times)" for text, n in Counter(heard).items()]
        here["status"], here["seconds"] = status, round(time.monotonic() - self._began, 1)
        if error is not None:
            here["error"] = "".join(traceback.format_exception(error))[-6000:]
        self.write()

    def failed_checks(self) -> list[str]:
        return [
            f"{name}: {c['name']}: {c['got']} {c['bound']}"
            for name, section in self.sections.items()
            for c in section["checks"]
            if not c["ok"]
        ]

    def write(self) -> None:
        """Replace gpu.json and gpu.md; either is whole at any moment."""
        whole = {
            "card": self.card,
            "machine": self.machine,
            "failed_checks": self.failed_checks(),
            "sections": self.sections,
        }
        for name, text in (("gpu.json", json.dumps(whole, indent=1)), ("gpu.md", self.markdown())):
            draft = self.folder / f"{name}.draft"
            draft.write_text(text + "\n", encoding="utf-8")
            os.replace(draft, self.folder / name)

    def markdown(self) -> str:
        lines = [f"# GPU battery on {self.card or 'an unknown device'}", ""]
        lines += [f"{key}: {value}  " for key, value in self.machine.items()]
        failed = self.failed_checks()
        lines += ["", f"Failed checks: {len(failed)}", *(f"- {each}" for each in failed), ""]
        goals = [
            (name, row)
            for name, section in self.sections.items()
            for row in section["numbers"]
            if "goal" in row
        ]
        rows = [
            [s, r["name"], _amount(r), r["unit"], r["goal"], _met(r), r["card"]] for s, r in goals
        ]
        lines += ["## Goals", "", *_table("section,what,value,unit,goal,met,card", rows), ""]
        for name, section in self.sections.items():
            seconds = f", {section['seconds']} s" if "seconds" in section else ""
            lines += [f"## {name}: {section['status']}{seconds}", ""]
            numbers = section["numbers"]
            rows = [
                [r["name"], _amount(r), r["unit"], r.get("goal", ""), _met(r), r["card"]]
                for r in numbers
            ]
            lines += _table("what,value,unit,goal,met,card", rows)
            rows = [
                [c["name"], "ok" if c["ok"] else "**failed**", c["got"], c["bound"]]
                for c in section["checks"]
            ]
            lines += _table("check,result,got,bound", rows)
            lines += [f"- {note.splitlines()[0]}" for note in section["notes"] if note]
            if "error" in section:
                lines += ["", "```", section["error"].rstrip(), "```"]
            lines.append("")
        return "\n".join(lines)

    def _keep(self, kind: str, row: Any, value: Any) -> Any:
        self.sections[self.now][kind].append(row)
        self.write()
        return value


def _table(names: str, rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    head = names.split(",")
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _amount(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not finite"
    spread = f" ({row['smallest']:.4g} to {row['largest']:.4g})" if "smallest" in row else ""
    return f"{row['value']:.4g}{spread}"


def _met(row: dict[str, Any]) -> str:
    return {None: "", True: "met", False: "missed"}[row.get("met")]


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int, str)) else str(value)
