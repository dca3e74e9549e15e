"""Runs of two processes: a recipe under torchrun, and processes that die or hang."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cookbook_core import clients
from cookbook_core.backend.local.multiprocess import group, heartbeat
from cookbook_core.errors import ProcessError
from cookbook_core.runs import Run, RunFlags, read_metrics
from cookbook_core.runs.launch import join_processes
from cookbook_core.tinker import AdamParams, ServiceClient, TrainingClient
from recipes import dpo as dpo_recipe
from tests.follower import ROOT, Two
from tests.kill_harness import result_of
from tests.oracles.logprobs import adapter_of, assert_close
from tests.test_processes import SECONDS, dpo, grouped

import pytest

FEW = {"num_steps": 3, "test_rows": 2, "batch_size": 3, "eval_every": 40}
CONFIG = dpo_recipe.Config(**FEW, dataset="tiny/dpo@train[:20]/test")


def torchrun(module: str, folder: Path, *launcher: str) -> tuple[str, str]:
    """Run a program of the recipe dpo in two processes; its output and errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [*launcher, "-m", module, "--save_every=1", f"--log_path={folder}"]
    command += [f"--{name}={getattr(CONFIG, name)}" for name in (*FEW, "dataset")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, torchrun("recipes.dpo", folder)[0]


def test_a_recipe_under_torchrun(of_two: tuple[Path, str], tmp_path: Path) -> None:
    """The command of the README, and the same run in this process alone: the same metrics."""
    folder, printed = of_two
    assert printed.count("Held-out pairs") == 1, "one process speaks"
    dpo_recipe.train(dataclasses.replace(CONFIG, log_path=str(tmp_path)))
    actual, expected = map(read_metrics, (folder, tmp_path))
    assert [row["step"] for row in actual] == [0, 0, 1, 2, 3]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_max_restarts_resumes_by_itself(of_two: tuple[Path, str], tmp_path: Path) -> None:
    """A process is killed: the end is equal to the byte to that of an uninterrupted run."""
    run = tmp_path / "run"
    printed, errors = torchrun("tests.restarted_program", run, "--max_restarts=1")
    assert "resuming at step 1 of 3" in printed
    assert re.search("process 1 of 2: died.* is that of step 1: give the same command", errors)
    assert result_of(run, 3) == result_of(of_two[0], 3)


@dataclass
class Config:
    log_path: str


def steps(
    folder: Path, service: ServiceClient, model: str, before: Callable[[int], None]
) -> TrainingClient:
    """A run of six steps that saves after every second one."""
    data = grouped(2, 2, 18)
    with Run.open("r", Config(str(folder)), 6, RunFlags(save_every=2)) as run:
        client = clients.start(service, model, "", 4, 0, run.checkpoint)
        for step in run.steps(client):
            before(step)
            client.forward_backward_custom(data, dpo)
            metrics = client.optim_step(AdamParams(1e-2)).result(SECONDS).metrics
            run.log(step, metrics or {})
    return client


def test_a_process_that_hangs_ends_the_run_which_goes_on_in_one(
    model_folder: Callable[..., str],
    make_service: Callable[..., ServiceClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 is stopped; then it resumes, and rank 0 has stopped giving signs of life."""
    monkeypatch.setenv(heartbeat.VARIABLE, "12")
    model, run, made = model_folder(), tmp_path / "run", Two(tmp_path)
    first = group.joined()
    assert first is not None

    def stop(step: int) -> None:
        if step == 5:
            made.other.send_signal(signal.SIGSTOP)

    says = rf"process 1 of 2: hangs, or .*\(pid {made.other.pid} on .*none for 12 seconds. "
    says += "The last checkpoint in .*run is that of step 4: give the same"
    try:
        with pytest.raises(ProcessError, match=says):
            steps(run, make_service(checkpoint_dir=run / "checkpoints"), model, stop)
        first.heartbeat.stop()
        made.other.send_signal(signal.SIGCONT)
        assert made.other.wait(SECONDS) == 1
        assert "process 0 of 2: hangs" in made.said.read_text(encoding="utf-8")
    finally:
        made.other.kill()
        made.end()
    assert group.joined() is None
    began: list[int] = []
    ended = steps(run, make_service(checkpoint_dir=run / "checkpoints"), model, began.append)
    assert began == [4, 5]
    there = tmp_path / "whole"
    whole = steps(there, make_service(checkpoint_dir=there / "checkpoints"), model, began.append)
    assert_close(adapter_of(ended).named(), adapter_of(whole).named(), 1e-3)
    assert [row["step"] for row in read_metrics(run)] == list(range(6))


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    join_processes()
    assert group.joined() is None
