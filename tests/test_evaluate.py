"""lm-evaluation-harness: on a run, by the command that the run prints, and on `cookbook serve`."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from cookbook_core.runs.evaluation import lm_eval_command
from cookbook_core.storage.paths import asset_path
from recipes import sft
from tests.serve.running import NAME, Running

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HARNESS = Path(sys.prefix) / "lm_eval"
MODEL = str(asset_path("tiny_model"))
installed = pytest.mark.skipif(
    not HARNESS.is_dir() and importlib.util.find_spec("lm_eval") is None,
    reason="make test installs lm-evaluation-harness",
)
pytestmark = pytest.mark.timeout(400)


def run(*command: str) -> str:
    """Standard output of a Python program in the repository's root, offline."""
    path = [str(ROOT), str(HARNESS), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_DATASETS_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@installed
def test_the_command_that_a_run_prints(tmp_path, capsys):
    """The printed task is an example: here it is the recipe's own held-out rows."""
    sizes = {"num_steps": 45, "eval_every": 45, "test_rows": 2}
    sft.train(sft.Config(**sizes, log_path=str(tmp_path / "run")))
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("evaluate: ")
    program, *printed = shlex.split(last)
    assert (program, printed[-1]) == ("lm_eval", "--apply_chat_template")
    printed[printed.index("arc_easy")] = "tiny_mirror"
    more = ["--include_path", "docs/tasks", "--limit", "20", "--output_path", str(tmp_path)]
    run("-m", program, *printed, *more, "--device", "cpu")
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["results"]["tiny_mirror"]
    assert found["exact_match,none"] >= 0.8  # untrained: 0.00


@installed
def test_the_served_model_answers_as_the_model_itself(tmp_path):
    with Running(MODEL, tmp_path) as server:
        cases = [
            (*model, task)
            for task in ("tiny_choice", "tiny_mirror")
            for model in (
                ("hf", f"pretrained={MODEL}"),
                (
                    "local-completions",
                    f"model={NAME},base_url={server.url}/v1/completions,tokenizer={MODEL},"
                    "num_concurrent=4",
                ),
            )
        ]
        output = run("tests/lm_eval_program.py", json.dumps(cases))
    choice, served_choice, mirror, served_mirror = json.loads(output.splitlines()[-1])
    logprobs, served = (np.array(c, dtype=object)[..., 0] for c in (choice, served_choice))
    assert np.allclose(served.astype(float), logprobs.astype(float), atol=1e-4)
    assert np.ptp(served.astype(float)) > 1  # no constant
    assert served_mirror == mirror


def test_commands(tmp_path):
    config = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    chat = SimpleNamespace(chat_template="{{ messages }}", name_or_path="org/model")
    assert lm_eval_command(str(tmp_path), chat) == (
        f"lm_eval --model hf --model_args pretrained=Qwen/Qwen3-0.6B,peft={tmp_path} "
        "--tasks arc_easy --apply_chat_template"
    )
    plain = SimpleNamespace(chat_template=None, name_or_path="org/model")
    path = "tinker://one:train:0/sampler_weights/final"
    assert lm_eval_command(path, plain, "http://127.0.0.1:8000/") == (
        f"lm_eval --model local-completions --model_args model={path},"
        "base_url=http://127.0.0.1:8000/v1/completions,tokenizer=org/model --tasks arc_easy"
    )


def test_every_recipe_ends_with_the_command():
    for recipe in (ROOT / "recipes").glob("[!_]*.py"):
        if recipe.stem != "bradley_terry":  # trains a judge, and prints how to use it as a reward
            assert "run.print_results(adapter, panels)" in recipe.read_text(encoding="utf-8")
