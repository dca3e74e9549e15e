"""The README's snippets run and print what it says; its tree shows the folders that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TREE = re.search(r"^    cookbook_core/\n(?:    .*\n)+", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The lines that each block prints, all blocks run in order as one program."""
    separator = "=== next block"
    done = subprocess.run(
        [sys.executable, "-c", f"\nprint({separator!r})\n".join(BLOCKS)],
        cwd=tmp_path_factory.mktemp("readme"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [part.splitlines() for part in done.stdout.split(separator + "\n")]


def test_losses_fall_and_the_sampled_answer_is_right(printed):
    """The blocks are: a loss, sampling, a token set, the whole vocabulary, the adapter in peft."""
    loss, sampled, token_set, vocabulary, in_peft = printed
    for lines in (loss, token_set, vocabulary):
        losses = [float(line.split()[0]) for line in lines]
        assert losses[-1] < 0.9 * losses[0]
    stated = re.search(r"falls from (.+) to (.+), and the .+ from (.+) to (.+)\. Sample", README)
    assert stated
    first, last = (lines.split() for lines in (loss[0], loss[-1]))
    for value, text in zip((first[0], last[0], first[1], last[1]), stated.groups(), strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(value) - float(text)) < 1.5 * 10**-digits
    for lines in (sampled, in_peft):
        text = "\n".join(lines)
        assert "What is 17 + 5?" in text
        assert re.search(r"assistant\s+22(<|$)", text)


def test_tree_shows_the_folders():
    """Every entry exists, none of the package's is left out, and the stated sizes are true."""
    assert TREE
    stated: list[int] = []
    counted: list[int] = []
    seen: set[str] = set()
    parent = ""
    for line in TREE[0].splitlines()[1:]:
        indent, entry = re.match(r"    ( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if entry == "#":
            stated.append(int(re.search(r"about ([\d,]+) lines", line)[1].replace(",", "")))  # type: ignore[index]
            counted.append(0)
        elif not indent:
            assert (ROOT / entry).is_dir(), entry
        elif len(indent) > 2:
            assert (ROOT / "cookbook_core" / parent / entry).is_dir(), entry
        else:
            parent, path = entry, ROOT / "cookbook_core" / entry
            assert path.exists(), entry
            if entry.count("/") < 2:  # backend/local/ is counted with backend/
                seen.add(path.name)
                files = path.rglob("*.py") if path.is_dir() else [path]
                counted[-1] += sum(len(f.read_text("utf-8").splitlines()) for f in files)
    tracked = (ROOT / "cookbook_core").iterdir()
    missing = {path.name for path in tracked if not path.name.startswith("_")} - seen
    assert missing == set()
    for said, lines in zip(stated, counted, strict=True):
        assert abs(said - lines) <= 0.1 * lines, (said, lines)


def test_first_command_is_on_the_first_screen():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if "make quickstart" in line) <= 20
