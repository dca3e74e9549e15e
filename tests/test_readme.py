"""What the README prints is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(program: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_losses_run_and_fall(tmp_path):
    for block in BLOCKS[:2]:
        losses = [float(line) for line in run(block, tmp_path)]
        assert losses[-1] < losses[0]


def test_blocks_that_go_on_from_the_first(tmp_path):
    """Sampling with the client, and the adapter opened by peft."""
    first, _, *others = BLOCKS
    assert len(others) == 2
    said = run("\n".join([first, *others]), tmp_path)
    assert len(said) > 5
    assert "What is 2 + 3?" in "\n".join(said[5:])


def test_first_command_is_on_the_first_screen():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if "make quickstart" in line) <= 20
