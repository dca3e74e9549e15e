"""What was measured: numbers, checks and notes by section, in gpu.json and gpu.md.

Both files are rewritten after every number, so a run that is killed leaves all it had measured.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Report:
    """The results of one run of `minutes`; in a smoke run goals are listed and not judged.

    card: name of the device, beside every number. machine: versions and the like.
    heard: warnings, added to the notes of the section that ends next.
    """

    def __init__(self, folder: Path, minutes: float, sections: list[str], smoke: bool) -> None:
        self.folder, self.deadline, self.smoke = folder, time.monotonic() + 60 * minutes, smoke
        self.card, self.heard = "", list[str]()
        self.machine: dict[str, Any] = {}
        self.sections: dict[str, dict[str, Any]] = {
            name: {"status": "not reached", "numbers": [], "checks": [], "notes": []}
            for name in sections
        }
        self.now, self._section_ends = sections[0], math.inf
        folder.mkdir(parents=True, exist_ok=True)

    def number(
        self, name: str, value: Any, unit: str, goal: tuple[str, float] | None = None
    ) -> float:
        """Keep a number, or of several the median, the smallest and the largest.

        goal: (">=" or "<=", bound). One that is missed fails nothing.
        """
        values = [value] if isinstance(value, (int, float)) else value
        middle = float(statistics.median(values))
        kept = middle if math.isfinite(middle) else None  # JSON has no NaN
        row: dict[str, Any] = {"name": name, "value": kept, "unit": unit, "card": self.card}
        if len(values) > 1:
            row |= {"smallest": min(values), "largest": max(values), "repeats": len(values)}
        if goal is not None:
            way, bound = goal
            met = middle >= bound if way == ">=" else middle <= bound
            row |= {"goal": f"{way} {bound:g}", "met": None if self.smoke else met}
        self._keep("numbers", row)
        return middle

    def rate(self, name: str, amount: float, seconds: Sequence[float]) -> float:
        """Keep how many tokens a second that is."""
        return self.number(name, [amount / t for t in seconds], "tokens/s")

    def check(self, name: str, ok: Any, got: Any = "", bound: Any = "") -> None:
        """Keep a check; one that failed makes the exit status 1."""
        got = f"{got:.3g}" if isinstance(got, float) else str(got)
        self._keep("checks", {"name": name, "ok": bool(ok), "got": got, "bound": str(bound)})

    def at_most(self, name: str, got: float, bound: float) -> None:
        """Check that a number is within its bound; NaN is not."""
        self.check(name, got <= bound, got, f"<= {bound:g}")

    def note(self, text: str) -> None:
        self._keep("notes", text)

    def attempt(
        self, what: str, part: Callable[[], Any], seconds: float = 0, *, must: bool = True
    ) -> Any:
        """Run a part of a section if `seconds` are left for it (in a smoke run: any).

        An exception ends the part alone; with `must` it is a failed check.
        """
        if self.left() < (0 if self.smoke else seconds):
            self.note(f"{what}: skipped: {seconds:.0f} s needed, {max(self.left(), 0):.0f} s left")
            return None
        try:
            return part()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            if must:
                self.check(what, False, text, "no exception")
            self.note(f"{what}: {text}\n" + "".join(traceback.format_exception(error))[-2000:])

    def left(self) -> float:
        """Seconds until the deadline or, within a section, until its end."""
        return min(self.deadline, self._section_ends) - time.monotonic()

    def begin(self, section: str, cap: float) -> None:
        self.now, self._began = section, time.monotonic()
        self._section_ends = self._began + cap
        self.sections[section]["status"] = "running"
        self.write()

    def end(self, status: str, error: BaseException | None = None) -> None:
        here, self._section_ends = self.sections[self.now], math.inf
        here["notes"] += [f"{text} ({n} times)" for text, n in Counter(self.heard).items()]
        self.heard.clear()
        here |= {"status": status, "seconds": round(time.monotonic() - self._began, 1)}
        if error is not None:
            here["error"] = "".join(traceback.format_exception(error))[-6000:]
        self.write()

    def failed_checks(self) -> list[str]:
        every = [(name, c) for name, s in self.sections.items() for c in s["checks"]]
        return [f"{n}: {c['name']}: {c['got']} {c['bound']}" for n, c in every if not c["ok"]]

    def write(self) -> None:
        """Replace gpu.json and gpu.md; either is whole at any moment."""
        whole = {"card": self.card, "machine": self.machine, "sections": self.sections}
        whole["failed_checks"] = self.failed_checks()
        for name, text in (("gpu.json", json.dumps(whole, indent=1)), ("gpu.md", self.markdown())):
            draft = self.folder / f"{name}.draft"
            draft.write_text(text + "\n", encoding="utf-8")
            os.replace(draft, self.folder / name)

    def markdown(self) -> str:
        failed = self.failed_checks()
        lines = [f"# GPU battery on {self.card or 'an unknown device'}", ""]
        lines += [f"{key}: {value}  " for key, value in self.machine.items()]
        lines += ["", f"Failed checks: {len(failed)}", *(f"- {each}" for each in failed), ""]
        numbers = [(name, r) for name, s in self.sections.items() for r in s["numbers"]]
        goals = [[name, *_cells(r)] for name, r in numbers if "goal" in r]
        lines += ["## Goals", "", *_table("section,what,value,unit,goal,met,card", goals)]
        for name, section in self.sections.items():
            seconds = f", {section['seconds']} s" if "seconds" in section else ""
            lines += [f"## {name}: {section['status']}{seconds}", ""]
            rows = [_cells(r) for r in section["numbers"]]
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

    def _keep(self, kind: str, row: Any) -> None:
        self.sections[self.now][kind].append(row)
        self.write()


def _cells(row: dict[str, Any]) -> list[str]:
    value = "not finite" if row["value"] is None else f"{row['value']:.4g}"
    if "smallest" in row:
        value += f" ({row['smallest']:.4g} to {row['largest']:.4g})"
    met = {None: "", True: "met", False: "missed"}[row.get("met")]
    return [row["name"], value, row["unit"], row.get("goal", ""), met, row["card"]]


def _table(names: str, rows: list[list[str]]) -> list[str]:
    head = names.split(",")
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *escaped] if rows else []
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
