"""The command line of a recipe, and the folder its run leaves behind.

    runs/dpo-1/
      config.json     the parameters as run, the script, and the versions of what they ran on
      script.py       the script's text: the loss as run
      metrics.jsonl   one JSON object per logged step
      checkpoints/    the newest ones and the best, to go on from
      plot.png        2-4 panels drawn from metrics.jsonl
      summary.md      the before/after table
      samples.md      held-out prompts: before, after, expected

Everything but the weights is plain UTF-8 text and can be read while the run goes on. A run that was
interrupted, in whatever way, goes on when the same command is given again and the code is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from cookbook_core.errors import ConfigError, LossError, ProcessError
from cookbook_core.runs import claim, run_folder, script
from cookbook_core.runs.config import (
    RunFlags,
)
from cookbook_core.runs.plots import Panel, draw_panels
from cookbook_core.runs.progress import Progress
from cookbook_core.runs.run_folder import as_code, markdown_table, read_metrics, write_atomically
from cookbook_core.runs.tracking import Tracker, open_tracker
from cookbook_core.storage.paths import is_on_service

if TYPE_CHECKING:
    from cookbook_core.tinker import TrainingClient

T = TypeVar("T")


class Run:
    """A run's folder and its progress line; use it in a `with` statement.

    Args:
        recipe: its name.
        config: a dataclass with a field `log_path`. Where that is "", the script in which the
            dataclass is defined names the folder (in a notebook, the recipe does).
        num_steps: optimizer steps in the whole run.
        flags: when checkpoints are saved and how many are kept; whether to start over; where to
            train.
        progress: metrics to show while it runs, beside tokens per second and the time left.
        best: the metric whose best value's checkpoint is kept, "-" before it where less is better.
    Attributes:
        path: the folder.
        service: how ServiceClient is to be made: where to train, where checkpoints go.
        checkpoint: what to start from: the path of the newest checkpoint, None in a new run.
        first_step: optimizer steps in that checkpoint.
    Raises:
        ConfigError: log_path holds a finished run, or one with another config or begun by other
            code, or another process is at it. CheckpointError: the newest checkpoint is damaged.
            Nothing is written then.
    """

    def __init__(
        self,
        recipe: str,
        config: Any,
        num_steps: int,
        flags: RunFlags | None = None,
        *,
        progress: Sequence[str] = ("loss",),
        best: str = "",
    ) -> None:
        self.num_steps = num_steps
        self._flags = flags or RunFlags()
        self._script = script.script_of(config)
        self.path, self._lock, self._made = claim.claim(
            recipe, config, self._script, fresh=self._flags.fresh, anyway=self._flags.anyway
        )
        run_folder.forget_start(self.path)
        self._record = run_folder.read_record(self.path)
        self.service: dict[str, Any] = {
            "base_url": self._flags.base_url,
            "trust_service": self._flags.trust_service,
            "checkpoint_dir": self.path / "checkpoints",
        }
        entry = run_folder.newest(self._record)
        self.first_step = entry["step"] if entry else 0
        self.checkpoint = entry["path"] if entry else None
        self._metrics_path = self.path / "metrics.jsonl"
        self._best = best
        self._tables: list[str] = []
        self._null_metrics: set[str] = set()
        self._client: TrainingClient | None = None
        self._got_somewhere = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        began = run_folder.has_begun(self.path)
        if began:
            run_folder.drop_steps_from(self.path, self.first_step)
            run_folder.sweep(self.path, self._record)
        if not began or claim.other_code(self.path, self._script):
            claim.describe_run(self.path, recipe, config, self._script, self.first_step)
        self._tracker: Tracker | None = None
        if self._flags.track != "none":
            told = dataclasses.asdict(config)
            try:
                self._tracker = open_tracker(self._flags.track, self.path.name, told, self.path)
            except ConfigError:
                self._let_go(failed=True)
                raise
        self._progress = Progress(recipe, num_steps, self.first_step, progress)
        print(f"{recipe}: run folder {self.path}")
        if began:
            print(f"going on at step {self.first_step} of {num_steps}; --fresh starts over")

    def __enter__(self) -> Run:
        with contextlib.suppress(ValueError):  # signals are the main thread's alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if kind is None:  # the run has come to its end: there is nothing to go on with
            self._record["finished"] = True
            run_folder.write_record(self.path, self._record)
        gone = [
            e for e in (error, getattr(error, "__cause__", None)) if isinstance(e, ProcessError)
        ]
        failed = kind is not None and issubclass(kind, (Exception, KeyboardInterrupt))
        self.close(failed=failed and not gone)
        if gone:
            saved = self._record["checkpoints"]
            last = f"is that of step {saved[-1]['step']}" if saved else "was yet to come"
            mend = f"The last checkpoint in {self.path} {last}: give the same command to go on."
            raise gone[0].replace(fix=mend) from error

    def close(self, *, failed: bool = False) -> None:
        """End the progress line, and let go of the folder.

        Args:
            failed: the folder goes too, if it was made for this run and no step was done in it.
        """
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self._progress.close()
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        self._let_go(failed=failed)

    def _let_go(self, *, failed: bool) -> None:
        if failed and self._made and not self._got_somewhere:
            claim.discard(self.path, self._lock)
        else:
            self._lock.release()

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Remember to stop after this step; a second signal stops at once."""
        signal.signal(number, self._handlers[number])
        self._signal = number
        self._progress.say("stopping after this step; once more stops at once")

    def steps(self, client: TrainingClient) -> Iterator[int]:
        """The steps that are still to run; between two of them checkpoints are saved.

        Args:
            client: what is trained, started from `checkpoint` where there is one.
        Raises:
            SystemExit: after SIGINT or SIGTERM, once the step is done and saved.
        """
        self._client = client
        if self.first_step:
            run_folder.restore_random_state(self.path, self.first_step)
        self._progress.begin()
        for step in range(self.first_step, self.num_steps):
            yield step
            self._got_somewhere = True
            done = step + 1
            stop = self._signal is not None
            if stop or done % self._flags.save_every == 0 or done == self.num_steps:
                self._save(done)
            if stop and done < self.num_steps:
                self._progress.say(
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
            run_folder.write_record(self.path, self._record)
        return json.loads(json.dumps(values[name]))

    def _save(self, step: int) -> None:
        """Save a checkpoint after `step` updates, then let go of those no longer kept."""
        entries = self._record["checkpoints"]
        if self._client is None or any(entry["step"] == step for entry in entries):
            return
        saved = self._client.save_state(f"step-{step:06d}", overwrite=True).result()
        run_folder.keep_random_state(self.path, step)
        entries.append({"step": step, "path": saved.path})
        entries.sort(key=lambda entry: entry["step"])
        best = (self._record["best"] or {"step": None})["step"]
        kept = [e for e in entries if e in entries[-self._flags.keep_last :] or e["step"] == best]
        dropped = [entry for entry in entries if entry not in kept]
        self._record["checkpoints"] = kept
        run_folder.write_record(self.path, self._record)
        for entry in dropped:
            run_folder.random_file(self.path, entry["step"]).unlink(missing_ok=True)
            path = Path(entry["path"])
            if not is_on_service(entry["path"]) and path.resolve().is_relative_to(
                self.path.resolve()
            ):
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
            run_folder.write_record(self.path, self._record)

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
                    f'metrics["{name}"]', "not a number", expected="one", got=got
                ) from error
            if name == "step":
                raise LossError(
                    'metrics["step"]', "name is taken", expected="another name", got="step"
                )
            row[name] = number if math.isfinite(number) else None
            if row[name] is None and name not in self._null_metrics:
                self._null_metrics.add(name)
                self._progress.say(f'step {step}: metric "{name}" is {number}; written as null')
        with open(self._metrics_path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._tracker is not None:
            self._tracker.log(step, {k: v for k, v in row.items() if k != "step"})
        self._got_somewhere |= self._client is None  # in `steps`, once the first is done
        self._note_best(step, row)
        self._progress.show(step, row)

    def plot(self, panels: Sequence[Panel]) -> Path:
        """Draw 2-4 panels from metrics.jsonl into plot.png."""
        return draw_panels(panels, read_metrics(self.path), self.path / "plot.png")

    def save_before_after(
        self, title: str, before: Mapping[str, float], after: Mapping[str, float]
    ) -> None:
        """Print a table of metrics before and after the run, and add it to summary.md.

        Rows are the metrics of `after`, named without the "test_" of held-out ones. A run that
        made its best metric worse is told below the table how to examine its loss.
        """
        table = markdown_table(
            [
                {"metric": name.removeprefix("test_"), "before": before[name], "after": after[name]}
                for name in after
            ]
        )
        table += self._warning(before, after)
        self._tables.append(f"## {title}\n\n{table}")
        write_atomically(self.path / "summary.md", "\n".join(self._tables))
        self._progress.say(f"\n{title}\n\n{table}")

    def _warning(self, before: Mapping[str, float], after: Mapping[str, float]) -> str:
        """A line on a run that made its best metric worse; "" on another."""
        name = self._best.removeprefix("-")
        if name not in before or name not in after:
            return ""
        was, now = before[name], after[name]
        if not (now > was if self._best.startswith("-") else now < was):
            return ""
        loss = self._script.loss() if self._script else "FILE:LOSS"
        moved = f"{'rose' if now > was else 'fell'} from {was:.3g} to {now:.3g}"
        return (
            f"\n{name} {moved}: is the sign of the loss right? "
            f"python -m cookbook_core.doctor {loss}\n"
        )

    def save_samples(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print and write to samples.md held-out rows such as prompt, before, after, expected.

        Texts are shown as code, with line breaks escaped, so that no markup in them is lost.
        """
        quoted = [{key: as_code(str(value)) for key, value in row.items()} for row in rows]
        write_atomically(self.path / "samples.md", f"## Samples\n\n{markdown_table(quoted)}")
        for row in rows:
            self._progress.say("\n" + "\n".join(f"{key:>8}: {value}" for key, value in row.items()))
