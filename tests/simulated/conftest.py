"""Make the simulated device before the first test here; skip, saying why, where it cannot be."""

from __future__ import annotations

import os

from tests.simulated import device
from tests.simulated.choices import choose_as_on_cuda

import pytest


@pytest.fixture(scope="session", autouse=True)
def simulated() -> None:
    """Register the device; SIMULATED=required, as in CI, makes it an error if that fails."""
    try:
        choose_as_on_cuda()
    except device.Unavailable as problem:
        if os.environ.get("SIMULATED") == "required":
            raise
        pytest.skip(f"no simulated device: {problem}")


@pytest.fixture
def accelerator() -> str:
    """The device that tests/test_cuda.py checks."""
    return "sim"
