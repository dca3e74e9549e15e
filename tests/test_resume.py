"""A run that is interrupted and resumed ends as one that was not: bytes and metrics."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cookbook_core import runs
from cookbook_core.errors import CheckpointError, ConfigError
from cookbook_core.runs import Run, RunFlags, read_metrics, run_folder
from cookbook_core.runs.claim import lock
from cookbook_core.tinker import TrainingClient
from tests import kill_harness
from tests.test_runs import Config

import pytest
import torch

ROOT = Path(__file__).parents[1]

SMALL: dict[str, dict[str, Any]] = {  # few rows: reading all of them takes longer than the steps
    "sft": {"batch_size": 2, "dataset": "tiny/sft@train[:40]/test"},
    "dpo": {"batch_size": 2, "dataset": "tiny/dpo@train[:40]/test"},
    "kto": {"batch_size": 4, "dataset": "tiny/dpo@train[:40]/test"},
    "distill": {
        "batch_size": 2,
        "group_size": 2,
        "context": "reverse: {prompt}",
        "dataset": "tiny/lists@train[:40]/train[40:60]",
    },
    "bradley_terry": {"batch_size": 2, "dataset": "tiny/dpo@train[:40]/test"},
    "grpo": {"batch_size": 4, "updates_per_rollout": 2, "dataset": "tiny/grpo@train[:40]/test"},
    "token_set_kl": {"batch_size": 4, "dataset": "tiny/token_set_kl@train[:40]/test"},
    "tool_rl": {"batch_size": 4, "dataset": "tiny/grpo@train[:40]/test", "max_tokens": 8},
}


class Killed(BaseException):
    """Caught by nothing in the package."""


def bytes_of(path: Path) -> dict[str, bytes]:
    """The last checkpoint's and the exported adapter's tensors, and the texts beside them."""
    names = ["checkpoints/model-0/weights/step-000006", "checkpoints/model-0/sampler_weights/final"]
    contents = {
        f"{name}/{file.name}": file.read_bytes()
        for name in names
        for file in sorted((path / name).glob("*.safetensors"))
    }
    assert len(contents) == 3
    return contents | {name: (path / name).read_bytes() for name in ("summary.md", "samples.md")}


def timeless(path: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(path)
    ]


@pytest.mark.parametrize("name", SMALL)
def test_interrupted_and_resumed_equals_uninterrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, optimizer, metrics and texts to the byte, for a run cut off in step 5 of 6 (the
    checkpoint is of step 4), and again before the first checkpoint; the reference is the first."""
    recipe = importlib.import_module(f"recipes.{name}")
    monkeypatch.setattr(runs.run, "draw_panels", lambda *_: "plot.png")  # takes a second
    settings = {"num_steps": 6, "eval_every": 3, "test_rows": 6} | SMALL[name]

    def config(folder: str) -> Any:
        return recipe.Config(**settings, log_path=str(tmp_path / folder))

    flags = RunFlags(save_every=2)
    whole = recipe.train(config("whole"), flags)
    optim_step, calls = TrainingClient.optim_step, [0]

    def killed_at(count: int) -> None:
        def step(self: TrainingClient, params: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                raise Killed
            return optim_step(self, params)

        calls[0] = 0
        monkeypatch.setattr(TrainingClient, "optim_step", step)

    per_step = settings.get("updates_per_rollout", 1)
    for count in (2 * per_step, 5 * per_step):
        killed_at(count)
        with pytest.raises(Killed):
            recipe.train(config("cut"), flags)
    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    reference = tmp_path / "cut/checkpoints/model-0/weights/reference/adapter_model.safetensors"
    kept = b""
    if name in ("dpo", "kto", "grpo", "distill", "tool_rl"):
        kept = reference.read_bytes()
    assert recipe.train(config("cut"), flags) == whole
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    if kept:
        assert reference.read_bytes() == kept
    with pytest.raises(ConfigError, match="holds a finished run"):
        recipe.train(config("cut"), flags)


# ---- the folder ----------------------------------------------------------------------------------


class Client:
    """Saves text instead of weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.machine = folder, 0, {}

    def save_state(self, name: str, overwrite: bool = False) -> Any:
        path = self.folder / "checkpoints" / "model-0" / "weights" / name
        path.mkdir(parents=True, exist_ok=overwrite)
        (path / "state").write_text(str(self.state), encoding="utf-8")
        run_folder.manifest.write(path, {})
        return self

    def result(self, *_: Any) -> Any:
        weights = self.folder / "checkpoints" / "model-0" / "weights"
        self.path = str(max(weights.iterdir(), key=lambda p: p.stat().st_mtime_ns))
        return self


def go(tmp_path: Path, until: int, num_steps: int = 10, **flags: Any) -> Run:
    """Run to `until` updates, then stop without a word, as a killed process does."""
    config = Config(num_steps, log_path=str(tmp_path / "run"))
    run = Run.open(
        "sft", config, num_steps, RunFlags(**{"save_every": 2, **flags}), best="-test_loss"
    )
    client: Any = Client(run.path)
    for step in run.steps(client):
        if step == until:
            break
        if step % 5 == 0:
            run.log(step, {"test_loss": abs(step - 5)})
        client.state = step + 1
        run.log(step, {"loss": float(step), "random": float(torch.rand(()))})
    run._claim.lock.release()
    return run


def saved(run: Run) -> list[str]:
    return sorted(p.name for p in (run.path / "checkpoints/model-0/weights").iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = go(tmp_path, 99)
    assert saved(run) == ["step-000005", "step-000008", "step-000010"]
    assert json.loads((run.path / "progress.json").read_text(encoding="utf-8"))["best"] == {
        "step": 5,
        "value": 0.0,
    }


def test_steps_run_once_each_in_the_metrics(tmp_path: Path) -> None:
    """Wherever it stopped; random numbers continue; a line cut short is dropped."""
    torch.manual_seed(0)
    whole = go(tmp_path / "whole", 99)
    torch.manual_seed(0)
    for until in (1, 4, 7, 9):
        run = go(tmp_path, until)
        with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 3, "lo')
        if until > 1:  # before the first checkpoint the states are not saved
            torch.manual_seed(99)
        else:
            torch.manual_seed(0)
    run = go(tmp_path, 99)
    assert read_metrics(run.path) == read_metrics(whole.path)
    assert run.first_step == 8


def test_what_was_found_once_stays(tmp_path: Path) -> None:
    run = go(tmp_path, 3)
    assert run.once("before", lambda: ({"a": 0.1}, ["x"])) == [{"a": 0.1}, ["x"]]
    assert go(tmp_path, 5).once("before", lambda: pytest.fail("again")) == [{"a": 0.1}, ["x"]]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path: Path) -> None:
    run = go(tmp_path, 7)
    newest = run.path / "checkpoints/model-0/weights/step-000006"
    (newest / "state").write_text("9", encoding="utf-8")
    metrics = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"state: damaged.* of step 5: .* remove .*000006"
    ) as caught:
        go(tmp_path, 8)
    assert caught.traceback  # keeps the frames alive that would hold the lock
    lock(run.path).release()  # the failed start has released it
    assert (run.path / "metrics.jsonl").read_bytes() == metrics
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert go(tmp_path, 8).first_step == 5


def test_leftovers_of_a_save_are_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    run = go(tmp_path, 5)
    weights = run.path / "checkpoints/model-0/weights"
    for name in ("step-000006", ".step-000006-abc123", "mine"):
        (weights / name).mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (weights / "step-000099").symlink_to(outside, target_is_directory=True)
    assert go(tmp_path, 5).first_step == 4
    assert {"mine", "step-000004"} <= set(saved(run))
    assert not {"step-000006", ".step-000006-abc123"} & set(saved(run))
    assert outside.is_dir()


def test_another_config_is_refused_and_fresh_moves_the_run_aside(tmp_path: Path) -> None:
    def files(path: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name[0] != "."}

    run = go(tmp_path, 5)
    before = files(run.path)
    with pytest.raises(ConfigError, match=r"other parameters.*num_steps 10 there, 12 here.*fresh"):
        go(tmp_path, 5, num_steps=12)
    assert files(run.path) == before
    assert go(tmp_path, 5, num_steps=12, fresh=True).first_step == 0
    assert files(tmp_path / "run.old-1") == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    config = Config(3, log_path=str(tmp_path / "run"))
    with Run.open("sft", config, 3):
        code = (
            "import sys; from tests.test_runs import Config; from cookbook_core.runs import Run\n"
            "Run.open('sft', Config(3, log_path=sys.argv[1]), 3)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, config.log_path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert f"in use. Expected a folder that no other process uses, got {config.log_path}" in (
        done.stderr
    )
    assert f"process {os.getpid()} on" in done.stderr


def test_numbered_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without log_path: the newest interrupted run of these parameters, else the next number."""
    monkeypatch.chdir(tmp_path)

    def start(steps: int, **flags: Any) -> Run:
        return Run.open("dpo", Config(steps), steps, RunFlags(**flags))

    first = start(3)
    assert first.path.as_posix() == "runs/test_runs-1"
    assert sorted(p.name for p in first.path.iterdir()) == [
        ".lock",
        ".owner",
        "config.json",
        "script.py",
    ]
    written = json.loads((first.path / "config.json").read_text(encoding="utf-8"))
    assert (written["recipe"], Config(**written["config"])) == ("dpo", Config(3))
    with start(3) as second:  # the first is in use
        assert second.path.as_posix() == "runs/test_runs-2"
    first.close()
    with start(4) as third:  # other parameters
        assert third.path.as_posix() == "runs/test_runs-3"
    again = start(3)  # dpo-2 has ended, dpo-1 was interrupted
    assert again.path.as_posix() == "runs/test_runs-1"
    again.close()
    assert start(3, fresh=True).path.as_posix() == "runs/test_runs-4"


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-u", "-m", "recipes.sft", "--num_steps", "400", "--test_rows", "3"]
    command += ["--dataset", "tiny/sft@train[:40]/test"]
    command += ["--batch_size", "2", "--save_every", "1000", "--log_path", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    entry = run_folder.newest_checkpoint(run_folder.read_record(tmp_path / "run"))
    assert entry is not None
    assert f"stopped at step {entry['step']} of 400, which is saved in" in printed
    assert "Give the same command to resume." in printed
    assert read_metrics(tmp_path / "run")[-1]["step"] == entry["step"] - 1


def test_a_second_signal_is_the_plain_one(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with Run.open("s", Config(log_path=str(tmp_path / "r")), 3), pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_runs_names_are_documented() -> None:
    assert all((getattr(runs, name).__doc__ or "").strip() for name in runs.__all__)


# ---- killed --------------------------------------------------------------------------------------


def test_killed_in_a_save_and_in_a_step(tmp_path: Path) -> None:
    """The short form of `python -m tests.kill_harness`."""
    printed = kill_harness.torture("sft", 3, 24, tmp_path, seed=2)
    assert printed.startswith("sft: 3 kills")
