"""The wheel that `pip install .` builds, installed elsewhere; a recipe copied from it and run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, whose build/ folder may contain stale files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cookbook_core", "recipes", "tutorials"):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, source / name, ignore=skip)
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("cookbook_core-*.whl"))


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run Python in an empty folder where only the wheel and its dependencies can be imported.

    -S leaves out .pth files, and with them the editable installation of this checkout.
    """
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip("install", "--target", str(site), str(wheel))
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    path = os.pathsep.join([str(site), *sorted(libraries)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
        )
        done.folder, done.site = folder, site
        return done

    return run


def pip(command: str, *arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_everything_under_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    core = [p for p in (ROOT / "cookbook_core").rglob("*") if "__pycache__" not in p.parts]
    files = {p.relative_to(ROOT).as_posix() for p in core if p.is_file()}
    files |= {f"cookbook_core/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.py")}
    assert sorted(files - names) == []
    assert {name.split("/")[0] for name in names} == {"cookbook_core"}


def test_the_wheel_says_what_the_project_files_say(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split(".dist-info/")[-1]: name for name in archive.namelist()}
        metadata = archive.read(names["METADATA"]).decode()
        license_text = archive.read(names["licenses/LICENSE"]).decode()
    version = wheel.name.split("-")[1]
    assert "License-Expression: Apache-2.0\n" in metadata
    assert license_text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_and_a_copied_recipe(run: Command) -> None:
    listed = run("-m", "cookbook_core.commands.cli", "list")
    recipes = {p.stem for p in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert recipes <= set(listed.stdout.split()), listed.stderr
    copied = run("-m", "cookbook_core.commands.cli", "new", "dpo", "my_dpo.py")
    assert "python my_dpo.py" in copied.stdout, copied.stderr
    examined = run("-m", "cookbook_core.commands.cli", "doctor", "my_dpo.py:dpo_loss")
    assert examined.stdout.endswith("no defects, no notes\n"), examined.stdout + examined.stderr

    flags = "--num_steps 2 --batch_size 4 --test_rows 4 --log_path made/run "
    flags += "--dataset tiny/dpo@train[:20]/test"
    trained = run("my_dpo.py", *flags.split())
    assert trained.returncode == 0, trained.stdout + trained.stderr
    made = trained.folder / "made" / "run"
    text = (made / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy is reference
    assert 0 < abs(losses[1] - losses[0]) < 0.1
    assert next(made.rglob("adapter_model.safetensors")).stat().st_size > 0

    compared = run("-m", "cookbook_core.commands.cli", "compare", "made/run")
    assert "| test_accuracy" in compared.stdout, compared.stderr
    assert (trained.folder / "compare.png").exists()


def test_a_copied_grpo_finds_the_packaged_scorer(run: Command) -> None:
    assert run("-m", "cookbook_core.commands.cli", "new", "grpo").returncode == 0
    code = (
        "import my_grpo\n"
        "try: my_grpo.bradley_terry_reward(None, './nowhere', 'tiny')\n"
        "except Exception as error: print(type(error).__module__, error)\n"
        "import sys; print(sys.modules['cookbook_core.recipes.bradley_terry'].__file__)"
    )
    done = run("-c", code)
    assert "bradley_terry.py" in done.stdout, done.stdout + done.stderr


def test_nothing_comes_from_the_checkout(run: Command) -> None:
    done = run(
        "-c", "import cookbook_core.commands.cli, cookbook_core.recipes.sft as r; print(r.__file__)"
    )
    assert Path(done.stdout.strip()).is_relative_to(done.site), done.stderr
    script = done.site / "bin" / "cookbook"
    if os.name == "posix":  # elsewhere it is a program of its own, which would read .pth files
        assert run(str(script), "--version").stdout.startswith("cookbook-core ")
