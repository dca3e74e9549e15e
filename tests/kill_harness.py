"""Kills a run again and again at random moments, and checks that nothing is lost.

    python -m tests.kill_harness --kills 50

Each life of the run is a process of its own that is sent SIGKILL with all its children at a random
moment; then the folder is checked, and the same command is given again. Saves are slowed down, by
a pause after every file, so that kills fall into them; half of the moments are chosen inside a
save. At the end the run is compared with one that was not killed. A short form runs in the tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cookbook_core.runs import RunFlags, read_metrics, run_folder
from cookbook_core.storage import manifest

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 3
PAUSE = 0.08  # seconds after each step of a save

CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {
        "dataset": "tiny/sft@train[:40]/test",
        "batch_size": 2,
        "eval_every": 40,
        "test_rows": 4,
    },
    "grpo": {"batch_size": 4, "group_size": 4, "eval_every": 40, "test_rows": 4, "max_tokens": 8},
    "dpo": {"batch_size": 2, "eval_every": 40, "test_rows": 4},
    "kto": {"batch_size": 4, "eval_every": 40, "test_rows": 8},
    "distill": {"batch_size": 4, "group_size": 2, "eval_every": 40, "test_rows": 4},
    "bradley_terry": {"batch_size": 2, "eval_every": 40, "test_rows": 4},
    "token_set_kl": {"batch_size": 4, "eval_every": 40, "test_rows": 4},
    "tool_rl": {
        "dataset": "tiny/grpo",
        "batch_size": 4,
        "group_size": 4,
        "eval_every": 40,
        "test_rows": 4,
    },
}


def child(recipe: str, steps: int, folder: str, slow: bool) -> None:
    """One life of the run; prints a word when it steps and when it saves."""
    from cookbook_core.backend.local import checkpoints
    from cookbook_core.tinker import TrainingClient

    import safetensors.torch

    optim_step, save_file = TrainingClient.optim_step, safetensors.torch.save_file
    sync, replace = checkpoints.sync, checkpoints.put_in_place

    def say(word: str) -> None:
        print(word, flush=True)

    def step(*args: Any, **kwargs: Any) -> Any:
        say("step")
        return optim_step(*args, **kwargs)

    def slowed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            say("save")
            time.sleep(PAUSE)
            done = function(*args, **kwargs)
            time.sleep(PAUSE)
            return done

        return run

    TrainingClient.optim_step = step
    if slow:
        safetensors.torch.save_file = slowed(save_file)
        checkpoints.sync, checkpoints.put_in_place = slowed(sync), slowed(replace)
        run_folder.write_record = slowed(run_folder.write_record)
    module = importlib.import_module(f"recipes.{recipe}")
    config = module.Config(num_steps=steps, log_path=folder, **CONFIGS[recipe])
    module.train(config, RunFlags(save_every=SAVE_EVERY))
    say("end")


def start(recipe: str, steps: int, folder: Path, *, slow: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.kill_harness", "--child", recipe, str(folder)]
    command += ["--steps", str(steps)] + ["--slow"] * slow
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], word: str, count: int) -> bool:
    """Whether the process printed `word` `count` times before it ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "end":
            return False
        if line.strip() == word:
            count -= 1
            if not count:
                return True
    return False


def look(folder: Path) -> tuple[int, int]:
    """The newest checkpoint's step and how many steps were done after it; all is checked."""
    record = run_folder.read_record(folder)
    for entry in record["checkpoints"]:
        written = manifest.check(Path(entry["path"]))
        assert written is not None, entry["step"]
        assert int(written["step"]) <= entry["step"]  # less where grpo had nothing to learn from
        for file in Path(entry["path"]).glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    entry = run_folder.newest_checkpoint(record)
    step = entry["step"] if entry else 0
    rows = [  # of training: grpo logs no loss where no completion beats another
        row["step"]
        for row in read_metrics(folder)
        if not all(key.startswith("test_") for key in row if key != "step")
    ]
    lost = max(rows, default=-1) + 1 - step
    assert lost <= SAVE_EVERY, f"{lost} steps lost"
    assert rows[:step] == list(range(step)), "metrics are missing a step, or have one twice"
    return step, max(lost, 0)


def result_of(folder: Path, steps: int) -> dict[str, Any]:
    """What must be equal: tensors of the last checkpoint and of the export, metrics, texts."""
    weights = folder / "checkpoints" / "model-0"
    files = [
        *(weights / "weights" / f"step-{steps:06d}").glob("*.safetensors"),
        *(weights / "sampler_weights" / "final").glob("*.safetensors"),
        *folder.glob("s*.md"),
    ]
    assert len(files) == 5, files
    contents: dict[str, Any] = {str(f.relative_to(folder)): f.read_bytes() for f in files}
    rows = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_metrics(folder)]
    return contents | {"metrics": json.dumps(rows)}


def torture(recipe: str, kills: int, steps: int, folder: Path, seed: int) -> str:
    """Kill a run `kills` times, let it end, compare it; returns a line of figures."""
    chance = random.Random(f"{recipe}/{seed}")
    whole = start(recipe, steps, folder / "whole", slow=False)
    assert not wait_for(whole, "never", 1)
    assert whole.wait() == 0
    done, where, repeated = 0, {"save": 0, "step": 0, "start": 0}, []
    while done < kills:
        process = start(recipe, steps, folder / "killed", slow=True)
        word = chance.choice(["save", "save", "step", "step", "start"])
        if word != "start" and not wait_for(process, word, chance.randint(1, 12)):
            raise SystemExit(f"the run ended after {done} kills: more --steps are needed")
        time.sleep(chance.uniform(0, 2 * PAUSE if word == "save" else 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
        where[word] += 1
        repeated.append(look(folder / "killed")[1])
    last = start(recipe, steps, folder / "killed", slow=False)
    assert not wait_for(last, "never", 1)
    assert last.wait() == 0
    expected, actual = (result_of(folder / name, steps) for name in ("whole", "killed"))
    differ = [key for key in expected if actual.get(key) != expected[key]]
    assert not differ, f"differ: {differ}"
    return (
        f"{recipe}: {done} kills ({where['save']} in a save, {where['step']} in a step, "
        f"{where['start']} before), at most {max(repeated)} steps repeated, end state equal"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all, over the recipes")
    parser.add_argument("--recipes", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.steps, options.child[1], options.slow)
        return
    share, more = divmod(options.kills, len(options.recipes))
    for i, recipe in enumerate(options.recipes):
        with tempfile.TemporaryDirectory() as folder:
            kills = share + (i < more)
            print(torture(recipe, kills, options.steps, Path(folder), options.seed), flush=True)


if __name__ == "__main__":
    main()
