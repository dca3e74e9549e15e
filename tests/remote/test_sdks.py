"""The remote backend over the oldest and the newest SDK it supports, and the objects of each.

`make test` installs the two into the environment's folder sdk/VERSION, beside its packages, since
a process can import only one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.25.0", "0.38.0")
SUITES = (
    "tests/remote/against_sdk.py",
    "tests/test_sdk_objects.py",
    "tests/test_tinker_cookbook.py",  # needs the newer SDK
)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the SDK needs Python 3.11")
@pytest.mark.parametrize("version", VERSIONS)
def test_over_the_sdk(version: str) -> None:
    folder = Path(sys.prefix) / "sdk" / version
    if not folder.is_dir():
        pytest.skip(f"no {folder}; make test installs it")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "NO_PROXY": "127.0.0.1"}
    env.pop("TINKER_API_KEY", None)
    options = ("-p", "no:cacheprovider", "-W", "ignore:DEPRECATED:FutureWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *SUITES],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_versions_are_those_that_are_installed_and_promised() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"SDKS := {' '.join(VERSIONS)}\n" in makefile
    promised = f"tinker>={VERSIONS[0].removesuffix('.0')},<0.39"
    assert promised in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
