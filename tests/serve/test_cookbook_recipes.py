"""tinker-cookbook's recipes by their own command line, offline: only the URL is ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cookbook_core.storage.paths import asset_path
from tests.serve.running import Running

import pytest

ROOT = Path(__file__).parents[2]
NAME = "Qwen/Qwen3-8B"
SDK = Path(sys.prefix) / "sdk" / "0.38.0"
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (SDK / "tinker_cookbook").is_dir(), reason="make test installs it"),
]
SHARED = (f"model_name={NAME}", "renderer_name=role_colon", "log_path=log",
          "behavior_if_log_dir_exists=delete")  # fmt: skip
SUPERVISED = (*SHARED, "lora_rank=8", "max_length=200", "batch_size=4", "max_steps=3",
              "learning_rate=1e-3")  # fmt: skip
RECIPES = {
    "chat_sl": ("tinker_cookbook.recipes.chat_sl.train", *SUPERVISED, "dataset=chats.jsonl"),
    "prompt_distillation": (
        "tinker_cookbook.recipes.prompt_distillation.train", *SUPERVISED, "file_path=chats.jsonl",
    ),
    "math_rl": (
        "tinker_cookbook.recipes.math_rl.train", *SHARED, "lora_rank=8", "env=arithmetic",
        "loss_fn=importance_sampling", "group_size=4", "groups_per_batch=4", "max_steps=2",
        "max_tokens=8", "eval_every=0",
    ),
    "dpo": ("tests.serve.dpo_program", *SHARED, "batch_size=4", "max_steps=2"),
}  # fmt: skip
METRICS = {
    "chat_sl": "train_mean_nll", "prompt_distillation": "train_mean_nll",
    "math_rl": "env/all/reward/total", "dpo": "dpo_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = str(asset_path("tiny_model"))
    with Running(folder, tmp_path_factory.mktemp("served"), name=NAME) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with chats, and the model under its name on the Hub: tokenizers are found there."""
    chats = [
        {"messages": [{"role": "user", "content": f"Say {word}."},
                      {"role": "assistant", "content": word * 2}]}
        for word in ("red", "blue", "green", "black", "white", "brown", "pink", "grey") * 4
    ]  # fmt: skip
    text = "".join(json.dumps(chat) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / NAME).symlink_to(asset_path("tiny_model"))
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_and_logs(running, folder, recipe):
    module, *flags = RECIPES[recipe]
    if recipe == "math_rl":  # in one process with the SDK: what make test installs beside it
        pytest.importorskip("sympy")
        if not (SDK / "math_verify").is_dir():
            pytest.skip("no math_verify; make test installs it")
    env = {
        **os.environ, "PYTHONPATH": f"{SDK}{os.pathsep}{ROOT}", "TINKER_BASE_URL": running.url,
        "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *flags, f"base_url={running.url}"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [
        json.loads(line)
        for line in (folder / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    values = [row[METRICS[recipe]] for row in rows if METRICS[recipe] in row]
    assert values, sorted(rows[0])
    assert len(running.service.saved.checkpoints()) > 0
    if recipe in ("chat_sl", "prompt_distillation"):
        assert values[-1] < values[0]
