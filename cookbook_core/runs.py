"""The command line of a recipe, and the folder its run leaves behind.

    runs/dpo-1/
      config.json     the parameters as run, and the versions of what they ran on
      metrics.jsonl   one JSON object per logged step
      checkpoints/    the newest ones and the best, to go on from
      plot.png        2-4 panels drawn from metrics.jsonl
      summary.md      the before/after table
      samples.md      held-out prompts: before, after, expected

Everything but the weights is plain UTF-8 text and can be read while the run goes on. A run that was
interrupted, in whatever way, goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cookbook_core import run_files
from cookbook_core.errors import ConfigError, LossError, is_finite, message, nearest
from cookbook_core.plots import Panel, draw_panels
from cookbook_core.run_files import as_code, markdown_table, read_metrics, write_atomically

if TYPE_CHECKING:
    from cookbook_core.tinker import TrainingClient

__all__ = ["Panel", "Run", "Saving", "check", "check_positive", "parse_config", "read_metrics"]

ConfigT = TypeVar("ConfigT")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saving:
    """Flags that every recipe has besides those of its Config."""

    save_every: int = 20
    """Steps between checkpoints; an interrupted run repeats at most so many."""
    keep_last: int = 2
    """Newest checkpoints to keep; the best one stays besides."""
    fresh: bool = False
    """Start over, rather than go on with an interrupted run of the same parameters."""

    def __post_init__(self) -> None:
        check_positive(self, "save_every", "keep_last")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None
) -> tuple[ConfigT, Saving]:
    """Build a recipe's config from command line flags; print help or the mistake, and exit.

    Args:
        config_class: a dataclass; each field is a flag (`--num_steps 30`, booleans `--flag` and
            `--no_flag`), explained by the string under it. The docstring of the module it stands
            in is the program's description.
        argv: the flags; None takes the command line's.
    Returns:
        config, and the flags of `Saving`.
    Raises:
        SystemExit: 0 after --help; 2 after an unknown flag (the nearest known is named) or a value
            that does not fit the field's type or that the config itself refuses.
    """
    import tyro

    parts = {"config": config_class, "saving": Saving}
    fields = [(name, tyro.conf.OmitArgPrefixes[part]) for name, part in parts.items()]
    flags, unknown = tyro.cli(
        dataclasses.make_dataclass("Flags", fields),
        args=list(sys.argv[1:] if argv is None else argv),
        description=sys.modules[config_class.__module__].__doc__ or "",
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [f.name for part in parts.values() for f in dataclasses.fields(cast(Any, part))]
        name = flag.lstrip("-").replace("-", "_")
        print(f"{flag}: no such flag. {nearest(name, known)}", file=sys.stderr)
        raise SystemExit(2)
    return flags.config, flags.saving


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError for the first of these fields that is not a finite number above 0."""
    for name in names:
        check(config, name, 0 < getattr(config, name) < math.inf, "> 0")


def check_types(config: Any) -> None:
    """Raise ConfigError for the first field whose value does not fit its annotation."""
    for name, hint in get_type_hints(type(config)).items():
        check(config, name, _fits(getattr(config, name), hint), f"{hint}")


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in kinds
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        parts = kinds[:1] * len(value) if Ellipsis in kinds else kinds
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float) and not isinstance(value, bool):
        return isinstance(value, (int, hint)) and is_finite(value)
    return isinstance(value, (str, Path) if hint is str else hint)


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
        saving: when checkpoints are saved and how many are kept; whether to start over.
        progress: metrics to show while it runs.
        best: the metric whose best value's checkpoint is kept, "-" before it where less is better.
    Attributes:
        path: the folder.
        checkpoint: what to start from: the path of the newest checkpoint, None in a new run.
        first_step: optimizer steps in that checkpoint.
    Raises:
        ConfigError: log_path holds a finished run, or one with another config, or another process
            is at it. CheckpointError: the newest checkpoint is damaged. Nothing is written then.
    """

    def __init__(
        self,
        recipe: str,
        config: Any,
        num_steps: int,
        saving: Saving | None = None,
        *,
        progress: Sequence[str] = ("loss",),
        best: str = "",
    ) -> None:
        self.num_steps = num_steps
        self._saving = saving or Saving()
        self.path, self._lock = run_files.claim(recipe, config, fresh=self._saving.fresh)
        self._record = run_files.read_record(self.path)
        entry = run_files.newest(self._record)
        self.first_step = entry["step"] if entry else 0
        self.checkpoint = entry["path"] if entry else None
        self._random = entry["random"] if entry else None
        self._metrics_path = self.path / "metrics.jsonl"
        self._progress, self._best = tuple(progress), best
        self._tables: list[str] = []
        self._next_line = self.first_step
        self._null_metrics: set[str] = set()
        self._client: TrainingClient | None = None
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        began = (self.path / "config.json").exists()
        if began:
            run_files.drop_steps_from(self.path, self.first_step)
            run_files.sweep(self.path, self._record)
        else:
            write_atomically(self.path / "config.json", run_files.describe(recipe, config))
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=self.first_step, desc=recipe, unit="step")
        print(f"{recipe}: run folder {self.path}")
        if began:
            print(f"going on at step {self.first_step} of {num_steps}; --fresh starts over")

    def __enter__(self) -> Run:
        with contextlib.suppress(ValueError):  # signals are the main thread's alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # the run has come to its end: there is nothing to go on with
            self._record["finished"] = True
            run_files.write_record(self.path, self._record)
        self.close()

    def close(self) -> None:
        """End the progress line, and let go of the folder."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._bar is not None:
            self._bar.close()
        self._lock.release()

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Remember to stop after this step; a second signal stops at once."""
        signal.signal(number, self._handlers[number])
        self._signal = number
        self._say("stopping after this step; once more stops at once")

    def steps(self, client: TrainingClient) -> Iterator[int]:
        """The steps that are still to run; between two of them checkpoints are saved.

        Args:
            client: what is trained, started from `checkpoint` where there is one.
        Raises:
            SystemExit: after SIGINT or SIGTERM, once the step is done and saved.
        """
        self._client = client
        if self._random is not None:
            run_files.set_random_state(self._random)
        for step in range(self.first_step, self.num_steps):
            yield step
            done = step + 1
            stop = self._signal is not None
            if stop or done % self._saving.save_every == 0 or done == self.num_steps:
                self._save(done)
            if stop and done < self.num_steps:
                self._say(
                    f"stopped at step {done} of {self.num_steps}, which is saved in {self.path}. "
                    "Give the same command to go on."
                )
                raise SystemExit(128 + (self._signal or 0))

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make()` gave when this was first asked in this run, also before an interruption.

        Args:
            name: of the value, kept in progress.json.
            make: gives something that JSON holds; tuples come back as lists.
        """
        values = self._record["values"]
        if name not in values:
            values[name] = make()
            run_files.write_record(self.path, self._record)
        return json.loads(json.dumps(values[name]))

    def _save(self, step: int) -> None:
        """Save a checkpoint after `step` updates, then let go of those no longer kept."""
        entries = self._record["checkpoints"]
        if self._client is None or any(entry["step"] == step for entry in entries):
            return
        saved = self._client.save_state(f"step-{step:06d}", overwrite=True).result()
        entries.append({"step": step, "path": saved.path, "random": run_files.random_state()})
        entries.sort(key=lambda entry: entry["step"])
        best = (self._record["best"] or {"step": None})["step"]
        kept = [e for e in entries if e in entries[-self._saving.keep_last :] or e["step"] == best]
        dropped = [entry for entry in entries if entry not in kept]
        self._record["checkpoints"] = kept
        run_files.write_record(self.path, self._record)
        for entry in dropped:
            path = Path(entry["path"])
            if path.resolve().is_relative_to(self.path.resolve()):
                shutil.rmtree(path, ignore_errors=True)

    def _note_best(self, step: int, row: Mapping[str, Any]) -> None:
        """Keep the checkpoint of these weights if its metric is the best so far."""
        value = row.get(self._best.removeprefix("-"))
        if not self._best or value is None or self._client is None:
            return
        sign = -1 if self._best.startswith("-") else 1
        before = self._record["best"]
        if before is None or sign * value > sign * before["value"]:
            self._record["best"] = {"step": step, "value": value}
            if step:  # the untrained weights can be had without one
                self._save(step)
            run_files.write_record(self.path, self._record)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and show progress.

        Args:
            step: optimizer steps done before these were measured: 0 for the untrained model and
                for the first step's loss; may repeat.
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
        self._note_best(step, row)
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
        table = markdown_table(
            [
                {"metric": name.removeprefix("test_"), "before": before[name], "after": after[name]}
                for name in after
            ]
        )
        self._tables.append(f"## {title}\n\n{table}")
        write_atomically(self.path / "summary.md", "\n".join(self._tables))
        self._say(f"\n{title}\n\n{table}")

    def save_samples(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print and write to samples.md held-out rows such as prompt, before, after, expected.

        Texts are shown as code, with line breaks escaped, so that no markup in them is lost.
        """
        quoted = [{key: as_code(str(value)) for key, value in row.items()} for row in rows]
        write_atomically(self.path / "samples.md", f"## Samples\n\n{markdown_table(quoted)}")
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
