"""What the README prints is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_and_the_loss_falls():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses = [float(line) for line in done.stdout.split()]
        assert losses[-1] < losses[0]


def test_first_command_is_on_the_first_screen():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if "make quickstart" in line) <= 20
