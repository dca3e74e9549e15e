"""Environment of the notebooks' kernels when pytest runs them."""

import os
from collections.abc import Iterator

import pytest

KERNEL = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # on layers this small two threads cost more than they give, many times more on a busy machine
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",  # bars of slow loads are no output of a cell,
    "PYTHONWARNINGS": "ignore::FutureWarning",  # nor what libraries plan
}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Set it while a cell runs (the first starts the kernel), not for tests in the same process."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KERNEL.items():
            environment.setenv(name, os.environ.get(name, value))
        yield
