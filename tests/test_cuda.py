"""The same numbers on a GPU as on the CPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cookbook_core import clients, tinker
from cookbook_core.tinker import TrainingClient
from tests.oracles.logprobs import adapter_of, engine_of, randomize, take_gradient
from tests.test_gradient_parity import squared
from tests.test_packing import SECONDS, family_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")

ARCHS = ["qwen3", "llama", "mistral", "gemma2", "gpt2"]


def client_on(device: str, folder: str, tmp_path: Path, dtype: str = "float32") -> TrainingClient:
    service = tinker.ServiceClient(device=device, dtype=dtype, checkpoint_dir=tmp_path / device)
    client = service.create_lora_training_client(folder, rank=4, seed=0, train_unembed=False)
    randomize(client.result(SECONDS))
    return client.result(SECONDS)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_and_gradients(
    arch: str, dtype: str, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    data, folder = family_data(), model_folder(arch)
    torch.backends.cuda.matmul.allow_tf32 = False
    found: list[Any] = []
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        client = client_on(device, folder, tmp_path, precision)
        logprobs = torch.cat(clients.score(client, data))
        client.forward_backward_custom(data, squared).result(SECONDS)
        gradient = torch.cat([g.flatten().cpu().double() for g in take_gradient(client).values()])
        found.append((logprobs.double(), gradient))
        assert engine_of(client).scorer.packs
    (logprobs, gradient), (other, other_gradient) = found
    bound = 1e-4 if dtype == "float32" else 0.1
    assert float((logprobs - other).abs().max()) < bound * float(logprobs.abs().max())
    assert float((gradient - other_gradient).norm()) < bound * float(gradient.norm())


def test_training_and_sampling_in_bfloat16(tmp_path: Path) -> None:
    """The bundled model: the loss falls, the adapter stays float32, samples score as sampled."""
    client = client_on("cuda", "tiny", tmp_path, "bfloat16")
    data = family_data()
    losses = []
    for _ in range(10):
        backward = client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(5e-3)).result(SECONDS)
        losses.append(backward.result(SECONDS).loss)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in adapter_of(client).params} == {torch.float32}
    prompt = tinker.ModelInput.from_ints([5, 9, 33])
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)
    params = tinker.SamplingParams(max_tokens=12, seed=1, stop=[])
    (sequence,) = sampler.sample(prompt, 1, params).result(SECONDS).sequences
    whole = tinker.ModelInput.from_ints([5, 9, 33, *sequence.tokens])
    scored = sampler.compute_logprobs(whole).result(SECONDS)[3:]
    for sampled, again in zip(sequence.logprobs or [], scored, strict=True):
        assert again == pytest.approx(sampled, abs=0.1)


def test_a_batch_larger_than_the_card_goes_in_smaller_pieces(
    model_folder: Callable[..., str], tmp_path: Path
) -> None:
    """A third of a gigabyte of the card is left free; the gradient is that of a free card."""
    client = client_on("cuda", model_folder("qwen3"), tmp_path)
    data = family_data() * 200
    client.forward_backward_custom(data, squared).result(SECONDS)
    want = take_gradient(client)
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
    client.forward_backward_custom(data, squared).result(SECONDS)
    del hog
    for key, gradient in take_gradient(client).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-3, atol=1e-3)
