"""Runs of two processes: a recipe under torchrun, and a process that dies."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cookbook_core import clients
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.errors import ProcessError
from cookbook_core.runs import Run, RunFlags, read_metrics
from cookbook_core.runs.launch import join_processes
from cookbook_core.tinker import AdamParams, ServiceClient, TrainingClient
from recipes import dpo as dpo_recipe
from tests.follower import ROOT, Two
from tests.oracles.logprobs import adapter_of, assert_close
from tests.test_processes import SECONDS, dpo, grouped

import pytest


def test_a_recipe_under_torchrun(tmp_path: Path) -> None:
    """The command of the README, and the same run in this process alone: the same metrics."""
    few = {"num_steps": 3, "test_rows": 2, "batch_size": 3, "eval_every": 40}
    config = dpo_recipe.Config(**few, dataset="tiny/dpo@train[:20]/test")
    flags = [f"--{name}={getattr(config, name)}" for name in (*few, "dataset")]
    flags += ["--log_path", str(tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node=2", "-m", "recipes.dpo", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held-out pairs") == 1, "one process speaks"
    dpo_recipe.train(dataclasses.replace(config, log_path=str(tmp_path / "one")))
    actual, expected = (read_metrics(tmp_path / name) for name in ("two", "one"))
    assert [row["step"] for row in actual] == [0, 0, 1, 2, 3]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


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


def test_a_process_that_dies_ends_the_run_which_goes_on_in_one(
    model_folder: Callable[..., str], make_service: Callable[..., ServiceClient], tmp_path: Path
) -> None:
    model = model_folder()
    run = tmp_path / "run"
    made = Two(tmp_path)

    def kill(step: int) -> None:
        if step == 5:
            made.other.kill()
            made.other.wait(SECONDS)

    says = "process 1 of 2: died.* The last checkpoint in .*run is that of step 4: give the same"
    try:
        with pytest.raises(ProcessError, match=says):
            steps(run, make_service(checkpoint_dir=run / "checkpoints"), model, kill)
    finally:
        assert made.end() == -9
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
