"""Running out of memory, at any point and under any name: the same result, or nothing changed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from cookbook_core import clients, tinker
from cookbook_core.backend.local import memory_table
from cookbook_core.errors import CookbookError
from cookbook_core.tinker import TrainingClient
from tests.conftest import make_random_data
from tests.oracles.logprobs import adapter_of, assert_close, engine_of
from tests.simulated import device
from tests.simulated.device import limited_memory
from tests.test_cuda import (
    SECONDS,
    Connect,
    connect_to,  # noqa: F401  a fixture
    gradient_of,
    peak_of,
    same_bits,
    same_samples,
    samples,
    weights_of,
)
from tests.test_gradient_parity import squared

import pytest
import torch


@pytest.fixture
def client(connect_to: Connect) -> TrainingClient:  # noqa: F811
    """Nothing is planned by free memory: only running out lowers a limit."""
    made = connect_to("sim")()
    engine_of(made).limits.graph_tokens = 10**9
    engine_of(made).limits.mode = "off"
    return made


def falls_to(level: int) -> bool:
    """Whether the memory in use comes down to `level` bytes.

    Autograd's thread of the device frees its last operands just after the backward has returned, on
    a busy machine noticeably after: a tensor that something still holds stays for good.
    """
    end = time.monotonic() + 10
    while device.used_bytes() > level and time.monotonic() < end:
        time.sleep(0.01)
    return device.used_bytes() <= level


def limited(run: Callable[[], Any], share: float, *, plain_error: bool = False) -> tuple[Any, Any]:
    """What `run` gives with all the memory it takes, and with `share` of that."""
    found: list[Any] = []
    taken = peak_of("sim", lambda: found.append(run()))
    gc.collect()
    before = device.used_bytes()
    with limited_memory(int(share * taken), plain_error=plain_error):
        found.append(run())
    gc.collect()
    assert falls_to(before), "an attempt that failed left something behind"
    return found[0], found[1]


DATA = make_random_data(60, lengths=(30, 60))


def over_the_vocabulary(data: Any, scores: Any) -> Any:
    del data
    return sum((score[3:9].exp() * score[3:9]).sum() for score in scores), {}


@pytest.mark.parametrize("plain_error", [False, True], ids=["torch", "cublas"])
@pytest.mark.parametrize("form", ["logprobs", "vocab_logprobs"])
def test_training(
    form: str, plain_error: bool, client: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    loss = squared if form == "logprobs" else over_the_vocabulary
    want, found = limited(
        lambda: gradient_of(client, DATA, loss, form), 0.4, plain_error=plain_error
    )
    assert_close(found, want, 1e-4)
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("plain_error", [False, True], ids=["torch", "cublas"])
def test_scoring(
    plain_error: bool, client: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    want, found = limited(lambda: clients.score(client, DATA), 0.5, plain_error=plain_error)
    torch.testing.assert_close(found, want)
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("plain_error", [False, True], ids=["torch", "cublas"])
def test_sampling(
    plain_error: bool, client: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[5, 9, i] for i in range(8)]
    run = lambda: samples(client, prompts, 4, max_tokens=40)  # noqa: E731
    want, found = limited(run, 0.4, plain_error=plain_error)
    same_samples(found, want)
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("form", ["logprobs", "vocab_logprobs"])
def test_a_batch_is_freed_with_its_result(form: str, client: TrainingClient) -> None:
    """Not at some later time, by the garbage collector, which knows nothing of device memory."""
    loss = squared if form == "logprobs" else over_the_vocabulary
    states = 4 * 32 * sum(datum.model_input.length for datum in DATA)
    gc.collect()
    gc.disable()
    try:
        gradient_of(client, DATA, loss, form)
        first = device.used_bytes()
        for _ in range(5):
            gradient_of(client, DATA, loss, form)
        assert falls_to(first + states - 1)
    finally:
        gc.enable()


def test_a_batch_whose_loss_fails_is_freed(client: TrainingClient) -> None:
    """Its graph never sees a backward; the first one of an engine is counted as it is made."""

    def broken(data: Any, logprobs: Any) -> Any:
        raise ZeroDivisionError

    gradient_of(client, DATA[:1])
    before = device.used_bytes()
    with pytest.raises(CookbookError, match="ZeroDivisionError"):
        client.forward_backward_custom(DATA, broken).result(SECONDS)
    gradient_of(client, DATA[:1])  # until the next call the error's traceback holds the graph
    gc.collect()
    assert falls_to(before)


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_the_table_bounds_the_memory_of_a_row(
    arch: str,
    make_service: Callable[..., tinker.ServiceClient],
    model_folder: Callable[..., str],
) -> None:
    """Layers recomputed: a gradient peaks at 0.5 to 1 of what `cookbook memory` counts."""
    wide = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}
    folder = model_folder(arch, **wide, max_position_embeddings=4096)
    sizes = memory_table.measure(folder, 4)
    made = make_service(device="sim", dtype="bfloat16").create_lora_training_client(folder, rank=4)
    client = made.result(SECONDS)
    engine_of(client).limits.mode = "on"
    rows = make_random_data(1, lengths=(2000, 2000))
    gradient_of(client, rows)
    adapter_of(client).grads = None
    peak = peak_of("sim", lambda: gradient_of(client, rows))
    assert 0.5 < peak / (2000 * sizes.row) < 1.0


def test_a_step_that_does_not_fit_changes_nothing(client: TrainingClient) -> None:
    """The first step allocates Adam's moments."""
    client.forward_backward_custom(DATA[:4], squared).result(SECONDS)
    before = weights_of(client)
    with limited_memory(1000), pytest.raises(RuntimeError, match="out of memory"):
        client.optim_step(tinker.AdamParams(1e-2)).result(SECONDS)
    same_bits(weights_of(client), before)
    assert adapter_of(client).step == 0
    client.optim_step(tinker.AdamParams(1e-2)).result(SECONDS)  # its gradient is still there
    assert adapter_of(client).step == 1
