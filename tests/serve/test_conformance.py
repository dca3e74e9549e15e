"""`cookbook check` of `cookbook serve`: every check passes, over both SDKs our client supports.

With the bundled model: the checks draw token ids up to 255.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cookbook_core.storage.paths import asset_path
from tests.serve.running import NAME, Running

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the SDK needs Python 3.11"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = str(asset_path("tiny_model"))
    with Running(folder, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.mark.parametrize("version", ["0.25.0", "0.38.0"])
def test_the_conformance_suite_passes(running, version):
    """`cookbook check --base_url`: every check, over both versions that our client supports."""
    folder = Path(sys.prefix) / "sdk" / version
    if not folder.is_dir():
        pytest.skip(f"no {folder}; make test installs it")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "NO_PROXY": "127.0.0.1"}
    command = ["-m", "cookbook_core.commands.cli", "check", "--base_url", running.url]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["35 pass"], done.stdout + done.stderr[-2000:]
    assert done.returncode == 0
    assert NAME in done.stdout
