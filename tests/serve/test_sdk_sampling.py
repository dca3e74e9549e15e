"""Everything that a `sample` can return: the SDK and our client over a server, and here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cookbook_core import tinker
from cookbook_core.storage.paths import asset_path
from tests.serve.running import NAME, Running
from tests.serve.sampling_program import ours

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the SDK needs Python 3.11"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Running(str(asset_path("tiny_model")), tmp_path_factory.mktemp("served")) as server:
        yield server


def run(running: Any, version: str) -> subprocess.CompletedProcess:
    folder = Path(sys.prefix) / "sdk" / version
    if not folder.is_dir():
        pytest.skip(f"no {folder}; make test installs it")
    env = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "NO_PROXY": "127.0.0.1",
        "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
    }  # fmt: skip
    program = ["-W", "ignore", "-m", "tests.serve.sampling_program", running.url, NAME]
    return subprocess.run(
        [sys.executable, *program],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    """Equal structures, numbers to 1e-5."""
    assert type(found) is type(expected) or {type(found), type(expected)} <= {list, tuple}
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(found, float):
        assert np.isclose(found, expected, atol=1e-5, rtol=0)
    else:
        assert found == expected


def test_the_sdk_and_our_client_get_what_is_computed_here(running):
    done = run(running, "0.38.0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    out = json.loads(done.stdout.splitlines()[-1])
    service = tinker.ServiceClient(device="cpu", dtype="float32")
    here = ours(service.create_sampling_client(base_model="tiny").result())
    assert_same(out["ours"], here)
    assert_same(out["sdk"], {name: value for name, value in here.items() if name != "scores"})


def test_an_older_sdk_lacks_an_argument_by_name(running):
    done = run(running, "0.25.0")
    assert done.returncode == 1
    refusal = "topk_sample_logprobs: the installed tinker SDK's sample lacks it. Install \"tinker>="
    assert refusal in done.stderr
