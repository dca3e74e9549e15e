"""A device without float64, as Apple's GPUs are: everything works, and gives the same."""

from __future__ import annotations

from collections.abc import Iterator

from cookbook_core import clients, tinker
from cookbook_core.backend.local.sampling.draw import draw_device
from cookbook_core.tinker import ModelInput
from tests.oracles.logprobs import assert_close
from tests.simulated.device import without_float64
from tests.simulated.test_memory import over_the_vocabulary
from tests.test_cuda import (
    PROMPTS,
    SECONDS,
    Connect,
    connect_to,  # noqa: F401  a fixture
    gradient_of,
    same_samples,
    sampler_of,
    samples,
    train_steps,
)
from tests.test_packing import family_data

import pytest
import torch


@pytest.fixture(autouse=True)
def no_float64() -> Iterator[None]:
    with without_float64():
        draw_device.cache_clear()  # asked once per device
        yield
    draw_device.cache_clear()


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "gpt2"])
def test_training(arch: str, connect_to: Connect) -> None:  # noqa: F811
    data = family_data()
    cpu, client = connect_to("cpu", arch)(), connect_to("sim", arch)()
    torch.testing.assert_close(
        clients.score(client, data), clients.score(cpu, data), rtol=1e-4, atol=1e-4
    )
    for loss in ("logprobs", "vocab_logprobs"):
        function = {"vocab_logprobs": over_the_vocabulary}.get(loss)
        arguments = (data[:4], function, loss) if function else (data,)
        assert_close(gradient_of(client, *arguments), gradient_of(cpu, *arguments), 1e-4)
    train_steps(client, data, 1)
    path = client.save_state("state").result(SECONDS).path
    client.load_state_with_optimizer(path).result(SECONDS)
    train_steps(client, data, 1)


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_sampling(arch: str, connect_to: Connect) -> None:  # noqa: F811
    cpu, client = connect_to("cpu", arch)(), connect_to("sim", arch)()
    for params in (
        {"max_tokens": 20},
        {"max_tokens": 8, "stop": list(range(10, 60))},
        {"max_tokens": 6, "top_k": 9, "top_p": 0.8, "temperature": 0.7},
        {"max_tokens": 4, "temperature": 0.0},
    ):
        want, found = (samples(c, PROMPTS, 3, **params) for c in (cpu, client))
        same_samples(found, want)
    prompt = ModelInput.from_ints(PROMPTS[1])
    params = tinker.SamplingParams(max_tokens=2, seed=0)
    response = sampler_of(client).sample(prompt, 1, params, True, 2).result(SECONDS)
    assert response.prompt_logprobs is not None
    assert len(response.prompt_logprobs) == len(PROMPTS[1])
