"""The command `cookbook`: list, new, compare. test_wheel.py runs it from a wheel, and other
commands have tests of their own."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cookbook_core.commands import cli, recipes
from cookbook_core.runs.script import code_of

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys\nfrom cookbook_core.commands.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'pandas', 'tyro'}\n"
        "main(['list']); print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "usage: cookbook"),
        (["new", "dop"], 'no recipe "dop". Did you mean "dpo"?'),
        (["new", "dpo", "json.py"], "hides the module of that name"),
        (["new", "dpo", "torch.py"], "hides the module of that name"),
        (["new", "dpo", "dpo"], "such as my_dpo.py, got dpo"),
        (["new", "dpo", "no/such/dpo.py"], "no such folder"),
        (["new", "dpo", "there.py"], "there.py: exists"),
        (["compare", "nowhere"], "nowhere: not a run's folder"),
        (["compare", "a", "--metrics", "tets_loss"], 'Did you mean "test_loss"?'),
        (["compare", "a", "--metrics", "loss" + ",loss" * 6], "Expected 1 to 6, got 7"),
        (["compare", "a", "--out", "picture"], "--out: cannot be written"),
        (["compare", "a", "--out", "nowhere/a.png"], "--out: cannot be written"),
        (["compare", "a", "other"], "Expected a common metric, got a: loss, test_loss; other: kl"),
    ],
)
def test_mistaken_commands(
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Exit code 2, the mistake on stderr, and no file written."""
    monkeypatch.chdir(tmp_path)
    Path("there.py").write_text("mine", encoding="utf-8")
    write_run(Path("a"), {}, [{"loss": 1.0, "test_loss": 2.0}])
    write_run(Path("other"), {}, [{"kl": 1.0}])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert cli.main(argv) == 2
    assert says in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("argv", [["nwe"], ["new"], ["compare"], ["list", "dpo"]])
def test_arguments_not_understood_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cookbook-core {recipes.version()}\n"


# ---- list and new --------------------------------------------------------------------------


def test_list_says_what_each_recipe_and_tutorial_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in RECIPES:
        doc = ast.get_docstring(ast.parse((ROOT / f"recipes/{name}.py").read_text("utf-8"))) or ""
        line = next(line for line in shown.splitlines() if line.split()[:1] == [name])
        assert line.endswith(doc.splitlines()[0])

    cells = [{"cell_type": "markdown", "source": ["# A first loss\n", "Text."]}]
    (tmp_path / "01_first.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    folder = recipes._folder
    monkeypatch.setattr(recipes, "_folder", lambda n: tmp_path if n == "tutorials" else folder(n))
    cli.main(["list"])
    assert "01_first       A first loss\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_new_copies_a_recipe_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Except for a first line that names its origin, and for commands, which name the copy."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", name]) == 0
    assert cli.main(["new", name, str(Path("größe und so.py"))]) == 0
    shown = capsys.readouterr().out
    assert f"python my_{name}.py\n" in shown
    assert 'python "größe und so.py" --help' in shown
    original = (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    head, text = Path(f"my_{name}.py").read_text(encoding="utf-8").split("\n", 1)
    assert head == f"# From recipes/{name}.py of cookbook-core {recipes.version()}."
    assert f"runs/my_{name}-N" in text
    back = text.replace(f"python my_{name}.py", f"python -m recipes.{name}")
    back = back.replace(f"runs/my_{name}-", f"runs/{name}-")
    assert back.replace("python -m cookbook_core.recipes.", "python -m recipes.") == original
    assert f"python my_{name}.py " in ast.get_docstring(ast.parse(text))
    loss = next(word for word in shown.split() if word.endswith("_loss()."))
    assert f"\ndef {loss[:-3]}(" in text


# ---- compare -------------------------------------------------------------------------------


def write_run(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    record = {"recipe": "dpo", "config": config, "versions": {}}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures saved in a test."""
    from matplotlib import figure

    figures: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def titles(figure: Any) -> list[str]:
    return [axis.get_title() for axis in figure.axes]


def test_compare_draws_and_tells_what_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    drawn: list[Any],
) -> None:
    """Held-out metrics first, then training's of the same names; the last value that is a number;
    config fields that are equal are left out, and so is log_path."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"test_loss": 0.7, "test_accuracy": 0.5},
        {"loss": 0.6, "grad_norm": 9.0, "accuracy": 0.5, "test_loss": 0.25, "test_accuracy": None},
    ]
    write_run(Path("a/one"), {"beta": 0.1, "seed": 0, "log_path": "a"}, rows)
    write_run(Path("a/two"), {"beta": 0.5, "seed": 0, "log_path": "b"}, [*rows, {"loss": 0.125}])
    assert cli.main(["compare", "a/one", "a/two"]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             capsys.readouterr().out.splitlines() if line.startswith("|")]  # fmt: skip
    assert [table[0], *table[2:]] == [
        ["", "one", "two"],
        ["beta", "0.1", "0.5"],
        ["last step", "1", "2"],
        ["test_loss", "0.25", "0.25"],
        ["test_accuracy", "0.5", "0.5"],
    ]
    assert Path("compare.png").read_bytes()[:4] == b"\x89PNG"
    assert titles(drawn[0]) == ["test_loss", "test_accuracy", "loss", "accuracy"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "two"]
    lines = drawn[0].axes[2].get_lines()
    assert [line.get_ydata()[-1] for line in lines] == [0.6, 0.125]


def test_compare_tells_different_code_and_what_was_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture, drawn: list[Any]
) -> None:
    """No row where the code is equal but for layout. Equal lines stay visible."""
    rows = [{"loss": 1.0, "test_loss": 2.0, "kl": 0.5, "grad_norm": 3.0}] * 2
    codes = {"dpo-1": "a = 1", "dpo-2": "a  =  1", "ipo-1": "a = 2"}
    for name, text in codes.items():
        write_run(tmp_path / name, {}, rows)
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        config["script"] = {"file": f"{name[:3]}.py", "code": code_of(text)}
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    argv = ["compare", *(str(tmp_path / name) for name in codes)]
    argv += ["--out", str(tmp_path / "compare.png")]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "| script    | dpo.py       | dpo.py       | ipo.py       |" in shown
    assert "not drawn: kl, grad_norm (--metrics A,B draws them)\n" in shown
    one, two = (code_of(codes[name])[:12] for name in ("dpo-1", "ipo-1"))
    assert f"| code      | {one} | {one} | {two} |" in shown
    assert titles(drawn[0]) == ["test_loss (different losses)", "loss (different losses)"]
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["loss", "loss"]
    styles = [line._dash_pattern for line in drawn[0].axes[0].get_lines()]
    assert styles[0] == (0, None)
    assert len({offset for offset, dashes in styles if dashes}) == 2
    argv.remove(str(tmp_path / "ipo-1"))
    assert cli.main([*argv, "--metrics", "loss,kl"]) == 0
    shown = capsys.readouterr().out
    assert not any(text in shown for text in ("script", "code", "not drawn"))
    assert titles(drawn[1]) == ["loss", "kl"]


def test_compare_of_other_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    drawn: list[Any],
) -> None:
    """Same names, no config, a metric of one run alone, a pattern no shell expanded, one run."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("a/run"), {"beta": 0.1}, [{"loss": 1.0}])
    write_run(Path("b/run"), {"beta": 0.1}, [{"loss": 2.0, "kl": 0.5}])
    Path("b/run/config.json").unlink()
    argv = ["compare", "*/run", "--metrics", "kl", "--out", "two.svg"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"| {Path('a/run')} | {Path('b/run')} |" in shown
    assert "| kl        |       | 0.5   |" in shown
    assert "<svg" in Path("two.svg").read_text(encoding="utf-8")
    assert titles(drawn[0]) == ["kl"]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == [str(Path("a/run")), str(Path("b/run"))]
    assert cli.main(["compare", "b/run"]) == 0
    assert titles(drawn[1]) == ["loss"]


def test_compare_draws_all_that_dpo_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[Any]
) -> None:
    """Five held-out metrics: the margin grows whether chosen rises or rejected falls, so both are
    drawn. A panel whose values span little says how little."""
    monkeypatch.chdir(tmp_path)
    names = ("loss", "accuracy", "reward_margin", "chosen_logprob", "rejected_logprob")
    rows = [{f"test_{name}": 0.5 for name in names}, {"loss": 0.6, "accuracy": 0.7}]
    rows += [{f"test_{name}": 0.9 for name in names} | {"test_reward_margin": 0.506}]
    write_run(Path("dpo-1"), {}, rows)
    assert cli.main(["compare", "dpo-1"]) == 0
    assert titles(drawn[0]) == [*(f"test_{name}" for name in names), "loss"]
    labels = [axis.get_ylabel() for axis in drawn[0].axes]
    assert labels == ["loss", "accuracy", "reward_margin (range 0.006)", *names[3:], "loss"]
    assert {axis.get_xlabel() for axis in drawn[0].axes} == {"optimizer step"}


def test_many_runs_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    for i in range(14):
        write_run(tmp_path / f"run-{i}", {"seed": i}, [{"loss": float(i)}] * 3)
    folders = [str(tmp_path / f"run-{i}") for i in range(14)]
    assert cli.main(["compare", *folders, "--out", str(tmp_path / "all.png")]) == 0
    lines = drawn[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14


def test_broken_files_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "a", {}, [{"loss": 1.0}])
    (tmp_path / "a" / "config.json").write_text('{"config": 3}', encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "a")]) == 1
    assert "config.json: broken. Expected JSON with recipe and config" in capsys.readouterr().err
