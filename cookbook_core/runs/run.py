"""A run: its folder, its checkpoints, its metrics, and how it resumes after an interruption.

    runs/dpo-1/
      config.json     the parameters, the script, the versions of libraries, choices of the machine
      script.py       the script's text: the loss as run
      metrics.jsonl   one JSON object per logged step
      progress.json   checkpoints, values that `Run.once` computed, whether the run has finished
      checkpoints/    the newest ones and the best, to resume from
      plot.png        2-4 panels drawn from metrics.jsonl
      summary.md      the before/after table
      samples.md      held-out prompts: before, after, expected

Everything but the weights is UTF-8 text and can be read during the run. The same command, with the
same code, resumes a run that was interrupted in whatever way.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from cookbook_core.errors import ConfigError, LossError, ProcessError, RewardError
from cookbook_core.runs import claim, run_folder
from cookbook_core.runs.config import RunFlags
from cookbook_core.runs.evaluation import lm_eval_command
from cookbook_core.runs.plots import Panel, draw_panels
from cookbook_core.runs.progress import Progress
from cookbook_core.runs.run_folder import as_code, markdown_table, read_metrics, write_atomically
from cookbook_core.runs.script import Script, script_of
from cookbook_core.runs.stalls import Stalls, got_worse
from cookbook_core.runs.tracking import Tracker, open_tracker
from cookbook_core.tinker import ServiceClient

if TYPE_CHECKING:
    from cookbook_core.tinker import TrainingClient

T = TypeVar("T")


class Run:
    """A run's folder and its progress line; made by `Run.open`, used in a `with` statement.

    Attributes:
        path: the folder.
        num_steps: optimizer steps in the whole run.
        checkpoint: path of the newest checkpoint, to start from; None in a new run.
        first_step: optimizer steps in that checkpoint.
    """

    def __init__(
        self,
        recipe: str,
        num_steps: int,
        claimed: claim.Claim,
        flags: RunFlags,
        script: Script | None,
        progress: Sequence[str],
        best: str,
    ) -> None:
        self.path, self.num_steps = claimed.path, num_steps
        self._record = run_folder.read_record(self.path)
        newest = run_folder.newest_checkpoint(self._record)
        self.first_step = self._done = newest["step"] if newest else 0
        self.checkpoint = newest["path"] if newest else None
        self._recipe, self._claim, self._flags = recipe, claimed, flags
        self._script, self._best = script, best
        self._tracker: Tracker | None = None
        self._tables: list[str] = []
        self._null_metrics: set[str] = set()
        self._client: TrainingClient | None = None
        self._announced = self._has_results = self._renders = False
        self._images: Any = None
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._stalls = Stalls()
        self._progress = Progress(recipe, num_steps, self.first_step, progress)

    @classmethod
    def open(
        cls,
        recipe: str,
        config: Any,
        num_steps: int,
        flags: RunFlags | None = None,
        *,
        progress: Sequence[str] = ("loss",),
        best: str = "",
    ) -> Run:
        """Start a run, or resume an interrupted one: lock its folder and write config.json.

        Args:
            recipe: its name.
            config: a dataclass with a field `log_path`. Where that is "", the script that defines
                the dataclass names the folder (in a notebook, the recipe does).
            num_steps: optimizer steps in the whole run.
            flags: when checkpoints are saved and how many are kept, what to resume, where to train.
            progress: metrics to show during the run, beside tokens per second and the time left.
            best: the metric whose best value's checkpoint is kept, "-" before it where less is
                better.
        Raises:
            ConfigError: the folder is in use, or holds a finished run, one with another config or
                one started by other code. CheckpointError: the newest checkpoint is damaged. The
                folder is then as it was before.
        """
        flags, script = flags or RunFlags(), script_of(config)
        claimed = claim.claim(recipe, config, script, fresh=flags.fresh, resume=flags.resume)
        path = claimed.path
        try:
            run_folder.restart_without_checkpoint(path)
            run = cls(recipe, num_steps, claimed, flags, script, progress, best)
            began = run_folder.has_begun(path)
            if began:
                run_folder.truncate_metrics(path, run.first_step)
                run_folder.remove_unlisted_checkpoints(path, run._record)
            if not began or claim.other_code(path, script):
                claim.describe_run(path, recipe, config, script, run.first_step)
            if flags.track != "none":
                parameters = dataclasses.asdict(config)
                run._tracker = open_tracker(flags.track, path.name, parameters, path)
        except BaseException:
            claimed.remove() if claimed.made else claimed.lock.release()
            raise
        if began:
            run._announce()
            print(f"resuming at step {run.first_step} of {num_steps}; --fresh starts over")
            for row in read_metrics(path):
                run._stalls.add(row)
        return run

    def service_client(self, device: str = "auto", dtype: str = "auto") -> ServiceClient:
        """The service to train on: this machine, or that of --base_url.

        Args:
            device: "auto" (cuda, then mps, then cpu) or torch's own device string.
            dtype: of the base model: "auto" (bfloat16 on cuda, else float32), "float32",
                "bfloat16" or "nf4" (linear layers in 4 bits).
        Returns:
            A ServiceClient that saves checkpoints in the run's folder.
        """
        return ServiceClient(
            base_url=self._flags.base_url,
            trust_service=self._flags.trust_service,
            sampler_url=self._flags.sampler_url,
            checkpoint_dir=self.path / "checkpoints",
            device=device,
            dtype=dtype,
        )

    def tokenizer(self, client: TrainingClient) -> Any:
        """The client's tokenizer, whose chat template gets the arguments of --chat_template_kwargs.

        Every tokenizer of this run's clients of the same base model is this object, so prompts to
        train on and to sample from are rendered alike.

        Raises:
            ConfigError: the run was started with other arguments.
        """
        flag, where = self._flags.chat_template_kwargs, "--chat_template_kwargs"
        started = self.once("chat_template_kwargs", lambda: json.loads(flag or "{}"))
        if started != json.loads(flag or "{}") and (flag or not self._flags.resume):
            what, rule = "not that of the run to resume", json.dumps(started)
            fix = "Give the same, or start over with --fresh."
            raise ConfigError(where, what, expected=rule, got=flag or "none", fix=fix)
        tokenizer = client.get_tokenizer()
        tokenizer.chat_template_kwargs = started
        self._renders, self._images = True, getattr(tokenizer, "images", None)
        return tokenizer

    def report_rows(
        self,
        unit: str,
        train: int,
        test: int,
        given: int,
        longest: int,
        flag: str = "a larger --max_length",
    ) -> None:
        """Print how many rows are used, how many were too long, and how long images are.

        Args:
            unit: what a row is: "pairs".
            train: rows left to train on.
            test: rows left that are held out.
            given: rows before the long ones were dropped.
            longest: the limit, tokens.
            flag: what to give to allow longer rows.
        Raises:
            ConfigError: no row is left to train on, or none is held out.
        """
        largest = getattr(self._images, "longest", 0)
        images = f"; images take up to {largest} of them" if largest else ""
        self._progress.say(
            f"{unit}: {train} to train on, {test} held out; "
            f"dropped as longer than {longest} tokens: {given - train - test}{images}"
        )
        if not train or not test:
            purpose = "held out" if train else "to train on"
            what = f"no {unit} {purpose}: all are longer than {longest} tokens{images}"
            raise ConfigError("Config.dataset", what, fix=f"Give {flag}.")

    def _announce(self) -> None:
        """Print the folder when it has results: a command that fails earlier leaves none."""
        if not self._announced:
            self._announced = True
            note = f"{self._claim.note}\n" if self._claim.note else ""
            self._progress.say(f"{note}{self._recipe}: run folder {self.path}")

    def __enter__(self) -> Run:
        with contextlib.suppress(ValueError):  # only the main thread can set signal handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if kind is None:
            self._record["finished"] = True
            run_folder.write_record(self.path, self._record)
        if isinstance(error, RewardError) and self._done > self.first_step:
            self._save(self._done)  # a step's rewards come before its updates
            self._progress.say(f"step {self._done} is saved: resume with --resume {self.path}")
        errors = (error, getattr(error, "__cause__", None))
        lost = next((e for e in errors if isinstance(e, ProcessError)), None)
        failed = kind is not None and issubclass(kind, (Exception, KeyboardInterrupt))
        self.close(failed=failed and lost is None)
        if lost is not None:
            saved = self._record["checkpoints"]
            last = f"is that of step {saved[-1]['step']}" if saved else "had not been saved yet"
            fix = f"The last checkpoint in {self.path} {last}: give the same command to resume."
            raise lost.replace(fix=fix) from error

    def close(self, *, failed: bool = False) -> None:
        """End the progress line, close the tracker and release the folder.

        Args:
            failed: remove the folder if it was made for this run and no step was done in it.
        """
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self._progress.close()
        tracker, self._tracker = self._tracker, None
        try:
            if tracker is not None:
                tracker.close()
        finally:
            unused = failed and self._claim.made and not self._has_results
            if unused and not self._claim.has_files_of_others():
                self._claim.remove()
                if self._announced:
                    print(f"{self.path} is removed: no step was finished in it")
            else:
                if self._claim.aside is not None:
                    self._announce()  # also where --fresh moved the run that was there
                self._claim.lock.release()

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Remember to stop after this step; a second signal stops at once."""
        signal.signal(number, self._handlers[number])
        self._signal = number
        self._progress.say("stopping after this step; a second signal stops at once")

    def steps(self, client: TrainingClient) -> Iterator[int]:
        """Iterate over the remaining steps; checkpoints are saved between them.

        Args:
            client: the client in training, started from `checkpoint` where there is one.
        Raises:
            SystemExit: after SIGINT or SIGTERM, when the step is done and saved.
        """
        if self._flags.chat_template_kwargs and not self._renders:
            where, fix = "--chat_template_kwargs", "Take its tokenizer from run.tokenizer(client)."
            raise ConfigError(where, "not used by this script", fix=fix)
        self._client = client
        self._announce()
        self._record_machine(client.machine)
        if self.first_step:
            run_folder.restore_random_state(self.path, self.first_step)
        self._progress.begin()
        for step in range(self.first_step, self.num_steps):
            yield step
            self._has_results = True
            self._done = done = step + 1
            stop = self._signal is not None
            if stop or done % self._flags.save_every == 0 or done == self.num_steps:
                self._save(done)
            if stop and done < self.num_steps:
                self._progress.say(
                    f"stopped at step {done} of {self.num_steps}, which is saved in {self.path}. "
                    "Give the same command to resume."
                )
                raise SystemExit(128 + (self._signal or 0))

    def _record_machine(self, machine: Mapping[str, Any]) -> None:
        """Write to config.json what results depend on besides seed and data; report a change."""
        content = run_folder.read_config(self.path)
        before = content.get("machine") or {}
        changed = [f"{k} {before[k]} -> {v}" for k, v in machine.items() if before.get(k, v) != v]
        if changed:
            self._progress.say(
                f"resumed under other conditions ({', '.join(changed)}): results may differ in "
                "their last bits from those of an uninterrupted run"
            )
        if before != machine:
            run_folder.write_config(self.path, {**content, "machine": dict(machine)})

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Compute a value at most once in a run: a resumed run reads it from progress.json.

        Args:
            name: of the value.
            make: returns a value that JSON can hold; NaN and infinity too.
        Returns:
            The value as JSON gives it back: tuples are lists.
        Raises:
            ConfigError: JSON cannot hold the value.
        """
        values = self._record["values"]
        if name not in values:
            value = make()
            try:
                values[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                where, fix = f'Run.once("{name}")', "Return numbers, text, lists and dicts only."
                raise ConfigError(where, "not a JSON value", got=error, fix=fix) from error
            run_folder.write_record(self.path, self._record)
        return copy.deepcopy(values[name])

    def _save(self, step: int) -> None:
        """Save a checkpoint after `step` updates, then remove those no longer kept."""
        entries = self._record["checkpoints"]
        if self._client is None or any(entry["step"] == step for entry in entries):
            return
        saved = self._client.save_state(f"step-{step:06d}", overwrite=True).result()
        run_folder.save_random_state(self.path, step)
        entries.append({"step": step, "path": saved.path})
        entries.sort(key=lambda entry: entry["step"])
        best = (self._record["best"] or {}).get("step")
        dropped = [e for e in entries[: -self._flags.keep_last] if e["step"] != best]
        self._record["checkpoints"] = [e for e in entries if e not in dropped]
        run_folder.write_record(self.path, self._record)
        for entry in dropped:
            run_folder.remove_checkpoint(self.path, entry)

    def _note_best(self, step: int, row: Mapping[str, Any]) -> None:
        """Keep the checkpoint of these weights if its metric is the best so far."""
        value = row.get(self._best.removeprefix("-"))
        if not self._best or value is None or self._client is None:
            return
        sign = -1 if self._best.startswith("-") else 1
        before = self._record["best"]
        if before is None or sign * value > sign * before["value"]:
            self._record["best"] = {"step": step, "value": value}
            if step:  # untrained weights need no checkpoint
                self._save(step)
            run_folder.write_record(self.path, self._record)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, show progress, and warn if nothing is being learnt.

        Args:
            step: optimizer steps done before these were measured: 0 for the untrained model and
                for the first step's loss; may repeat.
            metrics: name -> number or 0-d tensor. JSON has no NaN or infinity: those are written
                as null, with a message the first time.
        Raises:
            LossError: a value that is not one number, or a metric called "step".
        """
        row: dict[str, float | int | None] = {"step": step}
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                got = f"{type(value).__name__} {value!r:.60}"
                where, fix = f'metrics["{name}"]', "Log numbers and 0-d tensors only."
                raise LossError(where, "not a number", got=got, fix=fix) from error
            if name == "step":
                fix = "Give the metric another name."
                raise LossError('metrics["step"]', "name is reserved", fix=fix)
            row[name] = number if math.isfinite(number) else None
            if row[name] is None and name not in self._null_metrics:
                self._null_metrics.add(name)
                self._progress.say(f'step {step}: metric "{name}" is {number}; written as null')
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._tracker is not None:
            self._tracker.log(step, {k: v for k, v in row.items() if k != "step"})
        self._has_results |= self._client is None  # within `steps`, only after the first step
        self._announce()
        self._note_best(step, row)
        self._progress.show(step, row)
        for warning in self._stalls.add(row):
            self._progress.say(f"warning: step {step}: {warning}")

    def plot(self, panels: Sequence[Panel]) -> Path:
        """Draw 2-4 panels from metrics.jsonl into plot.png."""
        return draw_panels(panels, read_metrics(self.path), self.path / "plot.png")

    def print_results(self, adapter: str, panels: Sequence[Panel]) -> None:
        """Draw plot.png; print where it and the adapter are, and how to evaluate the adapter."""
        self._progress.say(f"adapter: {adapter}\nplot: {self.plot(panels)}")
        if self._client is not None:
            tokenizer, url = self._client.get_tokenizer(), self._flags.base_url
            self._progress.say(f"evaluate: {lm_eval_command(adapter, tokenizer, url)}")

    def save_before_after(
        self, title: str, before: Mapping[str, float], after: Mapping[str, float]
    ) -> None:
        """Print a table of metrics before and after the run, and add it to summary.md.

        Rows are the metrics of `after`, named without the "test_" of held-out ones; one that is
        missing in `before` has a dash there. Below the table stand warnings: a best metric that got
        worse, and signs that the run learnt nothing.
        """
        rows = [
            {"metric": name.removeprefix("test_"), "before": before.get(name, "-"), "after": value}
            for name, value in after.items()
        ]
        loss = self._script.loss() if self._script else "FILE:LOSS"
        warnings = [*got_worse(self._best, before, after, loss), *self._stalls.summary()]
        table = markdown_table(rows) + "".join(f"\nwarning: {line}\n" for line in warnings)
        self._tables.append(f"## {title}\n\n{table}")
        write_atomically(self.path / "summary.md", "\n".join(self._tables))
        self._progress.say(f"\n{title}\n\n{table}")

    def save_samples(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print held-out rows such as prompt, before, after, expected, and write samples.md.

        Texts are shown as code, with line breaks escaped, so that markup in them stays visible.
        """
        quoted = [{key: as_code(str(value)) for key, value in row.items()} for row in rows]
        write_atomically(self.path / "samples.md", f"## Samples\n\n{markdown_table(quoted)}")
        for row in rows:
            self._progress.say("\n" + "\n".join(f"{key:>8}: {value}" for key, value in row.items()))
