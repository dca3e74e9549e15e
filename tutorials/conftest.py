"""Environment of the notebooks' kernels when pytest runs them."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNEL = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # on layers this small two threads cost more than they give, many times more on a busy machine
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",  # bars of slow loads are no output of a cell,
    "PYTHONWARNINGS": "ignore::FutureWarning",  # nor what libraries plan
}

REAL_SDK = "11_the_real_sdk.ipynb"
SDK = Path(sys.prefix) / "sdk" / "0.38.0"  # `make test` installs it beside the other packages

collect_ignore = [] if find_spec("tinker") or SDK.is_dir() else [REAL_SDK]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set it while a cell runs (the first starts the kernel), not for tests in the same process."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KERNEL.items():
            environment.setenv(name, os.environ.get(name, value))
        if item.path.name == REAL_SDK:
            environment.setenv("PYTHONPATH", str(SDK), prepend=os.pathsep)
        yield
