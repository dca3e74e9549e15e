"""One server for the tests of a file, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.serve.running import Running, Wire

import pytest

collect_ignore = ["dpo_program.py", "sdk_program.py"]  # programs that tests start beside an SDK


@pytest.fixture(scope="module")
def running(model_folder, tmp_path_factory) -> Iterator[Running]:
    with Running(model_folder("qwen3"), tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Wire]:
    with Wire(running.url) as made:
        yield made


@pytest.fixture
def local(make_service, model_folder):
    """`local(rank=4, seed=0)`: an in-process client of the model that is served."""

    def make(rank: int = 4, seed: int = 0):
        service = make_service()
        made = service.create_lora_training_client(
            model_folder("qwen3"), rank, seed, train_unembed=False
        )
        return made.result()

    return make
