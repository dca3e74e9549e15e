"""The command line of a recipe, and the folder its run leaves behind.

    runs/dpo-1/
      config.json     the parameters as run, and the versions of what they ran on
      metrics.jsonl   one JSON object per logged step
      plot.png        2-4 panels drawn from metrics.jsonl
      summary.md      the before/after table
      samples.md      held-out prompts: before, after, expected

Everything is plain UTF-8 text and can be read while the run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from cookbook_core.errors import ConfigError, DataError, LossError, message, nearest
from cookbook_core.plots import Panel, draw_panels

ConfigT = TypeVar("ConfigT")

_REPORTED_VERSIONS = ("torch", "transformers", "peft", "numpy")


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Build a recipe's config from command line flags; print help or the mistake, and exit.

    Args:
        config_class: a dataclass; each field is a flag (`--num_steps 30`, booleans `--flag` and
            `--no_flag`), explained by the string under it. The docstring of the module it stands
            in is the program's description.
        argv: the flags; None takes the command line's.
    Raises:
        SystemExit: 0 after --help; 2 after an unknown flag (the nearest known is named) or a value
            that does not fit the field's type or that the config itself refuses.
    """
    import tyro

    config, unknown = tyro.cli(
        config_class,
        args=list(sys.argv[1:] if argv is None else argv),
        description=sys.modules[config_class.__module__].__doc__ or "",
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [field.name for field in dataclasses.fields(cast(Any, config_class))]
        name = flag.lstrip("-").replace("-", "_")
        print(f"{flag}: no such flag. {nearest(name, known)}", file=sys.stderr)
        raise SystemExit(2)
    return config


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError for the first of these fields that is not a finite number above 0."""
    for name in names:
        check(config, name, 0 < getattr(config, name) < math.inf, "> 0")


def check(config: Any, name: str, good: bool, rule: str) -> None:
    """Raise ConfigError that the field's value breaks `rule`, unless it is `good`."""
    if not good:
        raise ConfigError(message(f"Config.{name}", "out of range", rule, getattr(config, name)))


class Run:
    """A run's folder and its progress line; use it in a `with` statement.

    Args:
        recipe: its name; names the folder when config.log_path is "".
        config: a dataclass with a field `log_path`.
        num_steps: optimizer steps in the whole run.
        progress: metrics to show while it runs.
        start_step: 0 begins a run. Above 0 resumes the one in config.log_path at that step: what
            it logged from there on is dropped, since those steps are about to run again.
    Raises:
        ConfigError: log_path holds a run already (start_step 0) or none (above 0). Nothing is
            written then.
    """

    def __init__(
        self,
        recipe: str,
        config: Any,
        num_steps: int,
        *,
        progress: Sequence[str] = ("loss",),
        start_step: int = 0,
    ) -> None:
        self.num_steps = num_steps
        self.path = _claim_folder(recipe, config.log_path, resume=start_step > 0)
        self._metrics_path = self.path / "metrics.jsonl"
        self._progress = tuple(progress)
        self._tables: list[str] = []
        self._next_line = start_step
        self._null_metrics: set[str] = set()
        if start_step:
            kept = [row for row in read_metrics(self.path) if row["step"] < start_step]
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            _write_atomically(self._metrics_path, lines)
        name = f"config_from_step_{start_step}.json" if start_step else "config.json"
        _write_atomically(self.path / name, _describe(recipe, config))
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=start_step, desc=recipe, unit="step")
        print(f"{recipe}: run folder {self.path}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and show progress.

        Args:
            step: optimizer step from 0; may repeat (training and evaluation metrics of one step).
            metrics: name -> number or 0-d tensor. JSON has no NaN or infinity: those are written
                as null, and said once per name.
        Raises:
            LossError: a value that is not one number, or a metric called "step".
        """
        row: dict[str, float | int | None] = {"step": step}
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                got = f"{type(value).__name__} {value!r:.60}"
                raise LossError(
                    message(f'metrics["{name}"]', "not a number", "one", got)
                ) from error
            if name == "step":
                raise LossError(message('metrics["step"]', "name is taken", "another name", "step"))
            row[name] = number if math.isfinite(number) else None
            if row[name] is None and name not in self._null_metrics:
                self._null_metrics.add(name)
                self._say(f'step {step}: metric "{name}" is {number}; written as null')
        with open(self._metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._show(step, row)

    def plot(self, panels: Sequence[Panel]) -> Path:
        """Draw 2-4 panels from metrics.jsonl into plot.png."""
        return draw_panels(panels, read_metrics(self.path), self.path / "plot.png")

    def save_before_after(
        self, title: str, before: Mapping[str, float], after: Mapping[str, float]
    ) -> None:
        """Print a table of metrics before and after the run, and add it to summary.md.

        Rows are the metrics of `after`, named without the "test_" of held-out ones.
        """
        table = _markdown_table(
            [
                {"metric": name.removeprefix("test_"), "before": before[name], "after": after[name]}
                for name in after
            ]
        )
        self._tables.append(f"## {title}\n\n{table}")
        _write_atomically(self.path / "summary.md", "\n".join(self._tables))
        self._say(f"\n{title}\n\n{table}")

    def save_samples(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print and write to samples.md held-out rows such as prompt, before, after, expected.

        Texts are shown as code, with line breaks escaped, so that no markup in them is lost.
        """
        quoted = [{key: _as_code(str(value)) for key, value in row.items()} for row in rows]
        _write_atomically(self.path / "samples.md", f"## Samples\n\n{_markdown_table(quoted)}")
        for row in rows:
            self._say("\n" + "\n".join(f"{key:>8}: {value}" for key, value in row.items()))

    def _show(self, step: int, row: Mapping[str, float | int | None]) -> None:
        shown = {name: row[name] for name in self._progress if row.get(name) is not None}
        if self._bar is not None:
            if shown:
                text = {name: f"{value:.4g}" for name, value in shown.items()}
                self._bar.set_postfix(text, refresh=False)
            self._bar.update(max(0, min(step + 1, self.num_steps) - self._bar.n))
        elif shown and (step >= self._next_line or step == self.num_steps - 1):
            self._next_line = step + max(1, round(self.num_steps / 10))
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"step {step + 1}/{self.num_steps}  {text}", flush=True)

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a run folder's metrics.jsonl, one dict per line; no file gives no rows.

    A last line cut short by a crash is left out.

    Raises:
        DataError: another line is not JSON.
    """
    file = Path(path) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.extend([json.loads(line)] if line else [])
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(
                message(f"{file}:{number}", "broken", "JSON", repr(line[:60]))
            ) from error
    return rows


# ---- files ---------------------------------------------------------------------------------


def _claim_folder(recipe: str, log_path: str, resume: bool) -> Path:
    """Create the run's folder, or for a resumed run find it."""
    if log_path:
        path = Path(log_path).expanduser()
        exists = (path / "config.json").exists() or (path / "metrics.jsonl").exists()
        if exists and not resume:
            mend = "Give another log_path."
            raise ConfigError(
                message("Config.log_path", "holds a run already", "a new folder", path, mend)
            )
        if resume and not exists:
            raise ConfigError(message("Config.log_path", "no run to resume", "its folder", path))
        path.mkdir(parents=True, exist_ok=True)
        return path
    if resume:
        raise ConfigError(message("Config.log_path", "no run to resume", "its folder", '""'))
    for number in itertools.count(1):
        path = Path("runs") / f"{recipe}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("count() ended")


def _describe(recipe: str, config: Any) -> str:
    versions = {"python": platform.python_version()}
    for package in _REPORTED_VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    held = {"recipe": recipe, "config": dataclasses.asdict(config), "versions": versions}
    return json.dumps(held, indent=2, ensure_ascii=False, default=str) + "\n"


def _write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename: a reader, or a crash, never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(rows[0]) if rows else ["nothing to show"]
    cells = [keys] + [[_as_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(keys))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "".join(f"| {line} |\n" for line in lines)


def _as_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _as_code(text: str) -> str:
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}".replace("\n", "\\n")
