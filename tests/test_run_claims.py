"""Which folder a run goes to: code as well as config must be what began it; failed starts go."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

from cookbook_core import runs
from cookbook_core.errors import ConfigError, RequestError
from cookbook_core.runs import Run, RunFlags, script, tracking

import pytest

RECIPE = '''"""A recipe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    num_steps: int = 4
    log_path: str = ""


def my_loss(data, logprobs):
    """The loss."""
    return -logprobs[0].sum(), {}
'''
OTHER = RECIPE.replace("-logprobs", "logprobs")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(text: str, name: str = "my_dpo.py", **fields: Any) -> Any:
    """Config(**fields) of a script with this text, as a process that runs it has it."""
    Path(name).write_text(text, encoding="utf-8")
    module = types.ModuleType(f"claims_{Path(name).stem}")
    module.__file__ = name
    sys.modules[module.__name__] = module
    exec(compile(text, name, "exec"), module.__dict__)
    return module.Config(**fields)


def notebook_config(**fields: Any) -> Any:
    """A config whose class is in no file."""
    config = config_of(RECIPE, **fields)
    del sys.modules[type(config).__module__]
    return config


def start(config: Any, **saving: Any) -> Run:
    return Run.open("dpo", config, 4, RunFlags(**saving))


def interrupted(config: Any, **saving: Any) -> str:
    """Start or resume a run, as far as one result; its folder."""
    run = start(config, **saving)
    run.log(0, {"loss": 1.0})
    run.close()
    return run.path.as_posix()


def test_layout_comments_and_docstrings_are_no_code() -> None:
    code = script.code_of(RECIPE)
    same = RECIPE.replace("A recipe", "Mine").replace('"""The loss."""\n', "# minus\n\n")
    assert same.count('"""') == 2
    assert script.code_of(same) == code
    assert script.code_of(OTHER) != code
    assert script.code_of(RECIPE.replace("= 4", "= 5")) != code


def test_a_run_is_resumed_by_the_code_that_started_it_only(capsys: pytest.CaptureFixture) -> None:
    """Without log_path, other code starts a folder of its own, named by the script."""
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-1"
    assert Path("runs/my_dpo-1/script.py").read_text(encoding="utf-8") == RECIPE
    written = json.loads(Path("runs/my_dpo-1/config.json").read_text(encoding="utf-8"))
    assert written["script"] == {"file": "my_dpo.py", "code": script.code_of(RECIPE)}
    assert interrupted(config_of(RECIPE + "\n# my note\n")) == "runs/my_dpo-1"
    assert "other code" not in capsys.readouterr().out

    assert interrupted(config_of(OTHER)) == "runs/my_dpo-2"
    assert (
        "runs/my_dpo-1 was started by other code (my_dpo.py), so this run is new; "
        "--resume runs/my_dpo-1 resumes that one\n"
    ) in capsys.readouterr().out.replace("\\", "/")
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-1"
    assert interrupted(config_of(OTHER)) == "runs/my_dpo-2"
    assert interrupted(config_of(OTHER, "my_ipo.py")) == "runs/my_ipo-1"


def test_log_path_refuses_other_code_and_resume_takes_it() -> None:
    """Nothing changes in what is refused; --resume keeps both scripts."""
    interrupted(config_of(RECIPE, log_path="run"))
    before = {p.name: p.read_bytes() for p in Path("run").iterdir() if p.name[0] != "."}
    says = r"started by other code. Expected that of run.script\.py \(my_dpo.py\), .*--resume run r"
    for name in ("my_dpo.py", "my_ipo.py"):
        with pytest.raises(ConfigError, match=says):
            start(config_of(OTHER, name, log_path="run"))
    assert {p.name: p.read_bytes() for p in Path("run").iterdir() if p.name[0] != "."} == before

    interrupted(config_of(OTHER), resume="run")
    assert Path("run/script.py").read_text(encoding="utf-8") == OTHER
    assert Path("run/script.until-0.py").read_text(encoding="utf-8") == RECIPE
    interrupted(config_of(OTHER, log_path="run"))
    with pytest.raises(ConfigError, match="started by other code"):
        start(config_of(RECIPE, log_path="run"))
    with pytest.raises(ConfigError, match="started by other code"):
        start(notebook_config(log_path="run"))


def test_resume_takes_the_parameters_from_the_run(capsys: pytest.CaptureFixture) -> None:
    """Only its own: a flag that differs is refused, as is a run that has finished."""
    config = config_of(RECIPE, num_steps=7)
    assert interrupted(config) == "runs/my_dpo-1"
    again, flags = runs.parse_config(type(config), ["--resume", "runs/my_dpo-1"])
    assert again == config
    run = Run.open("dpo", again, 7, flags)
    assert run.path.as_posix() == "runs/my_dpo-1"
    with run:
        run.log(0, {"loss": 1.0})
    with pytest.raises(ConfigError, match="holds a finished run"):
        Run.open("dpo", again, 7, flags)
    other, flags = runs.parse_config(type(config), ["--resume=runs/my_dpo-1", "--num_steps", "8"])
    with pytest.raises(ConfigError, match=r"other parameters\. Got num_steps 7 there, 8 here"):
        Run.open("dpo", other, 8, flags)
    with pytest.raises(ConfigError, match="--resume: contradicts --fresh"):
        start(config, resume="runs/my_dpo-1", fresh=True)
    Path("runs/model").mkdir()
    Path("runs/model/config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"runs/model: not a run folder.*KeyError: 'config'"):
        start(config, resume="runs/model")


def test_old_runs_are_left_as_they_are() -> None:
    """Neither locked nor written to, whatever their state; one in the way is passed over."""
    run = start(config_of(RECIPE))
    with run:
        run.log(0, {"loss": 1.0})
    (run.path / ".owner").write_text("me", encoding="utf-8")
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-2"
    assert interrupted(config_of(RECIPE, num_steps=9)) == "runs/my_dpo-3"
    assert (run.path / ".owner").read_text(encoding="utf-8") == "me"
    lock = Path("runs/my_dpo-2/.lock")  # no lock can be taken, as in a folder of another user
    lock.unlink()
    lock.mkdir()
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-4"
    with pytest.raises(
        ConfigError, match=r"Config\.log_path: not usable.*Give --log_path a folder"
    ):
        start(config_of(RECIPE, log_path="runs/my_dpo-2"))


def test_a_notebook_goes_on_with_its_own_runs_in_folders_of_the_recipe() -> None:
    config = notebook_config()
    assert interrupted(config) == "runs/dpo-1"
    assert interrupted(config) == "runs/dpo-1"
    assert interrupted(config_of(RECIPE, "dpo.py")) == "runs/dpo-2"


def test_a_run_folder_of_before_the_code_was_recorded_goes_on() -> None:
    path = Path(interrupted(config_of(RECIPE)))
    written = json.loads((path / "config.json").read_text(encoding="utf-8"))
    del written["script"]
    (path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    (path / "script.py").unlink()
    assert interrupted(config_of(OTHER)) == "runs/my_dpo-1"


def test_the_hash_is_that_of_the_python_that_reads_it() -> None:
    """Another version's hash in config.json is passed over for the copy's own."""
    path = Path(interrupted(config_of(RECIPE)))
    text = (path / "config.json").read_text(encoding="utf-8")
    text = text.replace(script.code_of(RECIPE), "0" * 64)
    (path / "config.json").write_text(text, encoding="utf-8")
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-1"
    (path / "script.py").unlink()
    assert interrupted(config_of(RECIPE)) == "runs/my_dpo-2"


def test_a_config_json_of_another_program_is_left_alone() -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Config\.log_path: .*unreadable"):
        start(config_of(RECIPE, log_path="model"))
    assert Path("model/config.json").read_text(encoding="utf-8") == '{"model_type": "qwen3"}'


# ---- failed starts -------------------------------------------------------------------------------


def fail_in(run: Run, steps: int, error: BaseException) -> None:
    """Evaluate and log, then raise in a step after `steps` whole ones."""
    client: Any = types.SimpleNamespace(machine={})
    with run:
        (run.path / "checkpoints/model-0/weights/reference").mkdir(parents=True)
        run.once("before", lambda: {"test_loss": 1.0})
        for step in run.steps(client):
            run.log(step, {"test_loss": 1.0})
            if step == steps:
                raise error
            run.log(step, {"loss": 1.0})


@pytest.mark.parametrize("log_path", ["", "run"])
@pytest.mark.parametrize("error", [ValueError("a mistyped name"), KeyboardInterrupt()])
def test_a_run_that_failed_before_its_first_step_was_done_leaves_no_folder(
    error: BaseException, log_path: str
) -> None:
    for _ in range(2):  # and uses up no number
        run = start(config_of(RECIPE, log_path=log_path))
        with pytest.raises(type(error)):
            fail_in(run, 0, error)
        assert not run.path.exists()
        assert run.path.as_posix() == (log_path or "runs/my_dpo-1")


def test_a_failed_run_leaves_no_files_of_its_tracker() -> None:
    run = start(config_of(RECIPE))
    (run.path / "events.out.tfevents.1.host").touch()
    (run.path / "wandb").mkdir()
    (run.path / "wandb" / "log").touch()
    with pytest.raises(ValueError, match="early"):
        fail_in(run, 0, ValueError("early"))
    assert not run.path.exists()


def test_a_tracker_that_cannot_end_leaves_the_folder_to_the_next_run() -> None:
    def fail() -> None:
        raise OSError("connection lost")

    run = start(config_of(RECIPE))
    run._tracker = tracking.Tracker(lambda step, metrics: None, fail)
    run.log(0, {"loss": 1.0})
    with pytest.raises(OSError, match="connection lost"):
        run.close()
    assert interrupted(config_of(RECIPE)) == run.path.as_posix()


def test_a_failed_run_keeps_a_folder_with_anything_in_it() -> None:
    """A step's result, what an earlier run wrote, a folder that existed, a foreign file."""
    run = start(config_of(RECIPE))
    with pytest.raises(ValueError, match="late"):
        fail_in(run, 1, ValueError("late"))
    assert (run.path / "metrics.jsonl").exists()

    Path("mine").mkdir()
    run = start(config_of(RECIPE, log_path="mine"))
    with pytest.raises(ValueError, match="early"):
        fail_in(run, 0, ValueError("early"))
    assert (run.path / "config.json").exists()

    run = start(config_of(RECIPE, log_path="noted"))
    (run.path / "note.txt").touch()
    with pytest.raises(ValueError, match="early"):
        fail_in(run, 0, ValueError("early"))
    assert (run.path / "note.txt").exists()
    assert (run.path / "config.json").exists()


def test_checkpoints_saved_by_name_outlive_a_run_that_failed_early() -> None:
    run = start(config_of(RECIPE))
    mine = run.path / "checkpoints/model-0/weights/mine"
    mine.mkdir(parents=True)
    with pytest.raises(ValueError, match="early"):
        fail_in(run, 0, ValueError("early"))
    assert mine.is_dir()
    start(config_of(RECIPE)).close()  # the lock is free


def test_fresh_puts_the_run_back_if_the_new_one_fails_early(capsys: pytest.CaptureFixture) -> None:
    config = config_of(RECIPE, log_path="run")
    interrupted(config)
    good = {p.name: p.read_bytes() for p in Path("run").iterdir() if p.name[0] != "."}
    capsys.readouterr()
    run = start(config, fresh=True)
    assert not (run.path / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="too long"), run:
        raise ValueError("all rows are too long")
    assert {p.name: p.read_bytes() for p in Path("run").iterdir() if p.name[0] != "."} == good
    assert [p.name for p in Path().glob("run*")] == ["run"]
    assert capsys.readouterr().out == ""
    with start(config, fresh=True) as run:
        run.log(0, {"loss": 2.0})
    assert "the run that was in run is now in run.old-1\n" in capsys.readouterr().out


def test_a_command_that_fails_before_its_first_step_announces_no_folder(
    capsys: pytest.CaptureFixture,
) -> None:
    run = start(config_of(RECIPE))
    with pytest.raises(ValueError, match="no model"), run:
        raise ValueError("no model")
    assert "my_dpo-1" not in capsys.readouterr().out
    run = start(config_of(RECIPE))
    with pytest.raises(ValueError, match="early"):
        fail_in(run, 0, ValueError("early"))
    printed = capsys.readouterr().out.replace("\\", "/")
    assert "dpo: run folder runs/my_dpo-1\n" in printed
    assert printed.endswith("runs/my_dpo-1 is removed: no step was finished in it\n")


@pytest.mark.parametrize("name", ["reference", "step-000020", ".final-x-y", "mine"])
def test_a_run_killed_before_its_first_checkpoint_starts_over(name: str) -> None:
    """Without what it left; checkpoints of the script's own are moved, not removed."""
    run = start(config_of(RECIPE))
    run.once("before", lambda: 1)
    left = run.path / "checkpoints/model-0/weights" / name
    left.mkdir(parents=True)
    run.log(0, {"loss": 1.0})
    run.close()
    again = start(config_of(RECIPE))
    assert again.path == run.path
    assert again.once("before", lambda: 2) == 2
    assert not (run.path / "checkpoints").exists()
    aside = run.path / "checkpoints.old-1/model-0/weights/mine"
    assert aside.exists() == (name == "mine")


def test_a_killed_run_keeps_its_folder() -> None:
    run = start(config_of(RECIPE))
    with pytest.raises(SystemExit):
        fail_in(run, 0, SystemExit(143))
    assert run.path.exists()


def test_a_tracker_that_is_not_installed_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError):
        start(config_of(RECIPE), track="trackio")
    assert not Path("runs/my_dpo-1").exists()


def test_a_tracker_that_fails_by_itself_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library has already written into the folder."""
    module = types.ModuleType("wandb")

    def init(**settings: Any) -> None:
        Path(settings["dir"], "wandb").mkdir()
        raise OSError("not logged in")

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RequestError, match=r"track: wandb cannot start a run.*OSError: not logged"):
        start(config_of(RECIPE, log_path="run"), track="wandb")
    assert not Path("run").exists()
