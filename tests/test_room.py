"""What gives when memory does not do: gradients are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cookbook_core.backend.local.scoring import memory_limits
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import ServiceClient, TrainingClient
from tests.oracles.logprobs import adapter_of, assert_close, engine_of, randomize, take_gradient
from tests.test_gradient_parity import squared
from tests.test_packing import SECONDS, family_data

NORMS = 1e-6
"""Relative error of float64 gradients: RMS norms, and Gemma's softmax, compute in float32."""


def gradient(client: TrainingClient, data: list[Any]) -> dict[str, torch.Tensor]:
    client.forward_backward_custom(data, squared).result(SECONDS)
    return take_gradient(client)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gemma2", "gpt2", "mistral"])
def test_gradient_checkpointing_changes_nothing(
    arch: str, connect: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows with shared prefixes, whose attention is not the model's own."""
    client, data = connect(arch), family_data()
    engine = engine_of(client)
    engine.room.one_pass_tokens = 10**9
    want = gradient(client, data)
    flags = [m.training for m in engine.base.model.modules()]
    calls: list[int] = []
    checkpoint = memory_limits._checkpoint

    def counted(*args: Any) -> Any:
        calls.append(1)
        return checkpoint(*args)

    monkeypatch.setattr(memory_limits, "_checkpoint", counted)
    for mode, limit in (("on", 10**9), ("auto", 20), ("off", 20)):
        monkeypatch.setattr(engine.room, "mode", mode)
        monkeypatch.setattr(engine.room, "one_pass_tokens", limit)
        before = len(calls)
        assert_close(gradient(client, data), want, NORMS)
        assert (len(calls) > before) == (mode != "off")
    assert [m.training for m in engine.base.model.modules()] == flags


def test_recomputation_keeps_less(connect: Callable[..., TrainingClient]) -> None:
    client, data = connect(), family_data()
    engine = engine_of(client)

    def kept(mode: str) -> int:
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        engine.room.mode = mode
        score = engine.room.recomputing(engine.scorer.score_batch)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
        with engine.bank.active(adapter_of(client)), torch.enable_grad(), hooks:
            held = [score(batch) for batch in engine.scorer.batches(data)]
        del held
        return sum(sizes.values())

    whole, less = kept("off"), kept("on")
    engine.room.mode = "auto"
    assert less < 0.6 * whole


def test_an_unknown_mode_is_refused(make_service: Callable[..., ServiceClient]) -> None:
    service = make_service(gradient_checkpointing="sometimes")
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .*\"auto\".*'sometimes'"):
        service.create_lora_training_client("tiny", rank=4)


class OutOfMemory:
    """A scorer whose device holds `tokens` at a time."""

    def __init__(self, engine: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[int] = []
        score_batch = engine.scorer.score_batch

        def limited(batch: Any) -> Any:
            self.tried.append(batch.tokens)
            if batch.tokens > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score_batch(batch)

        monkeypatch.setattr(engine.scorer, "score_batch", limited)
        monkeypatch.setattr(engine.scorer, "micro_batch_tokens", 1000)


@pytest.fixture
def client(
    make_service: Callable[..., ServiceClient], model_folder: Callable[..., str]
) -> TrainingClient:
    made = make_service(dtype="float64").create_lora_training_client(model_folder("qwen3"), rank=4)
    randomize(made.result(SECONDS))
    return made.result(SECONDS)


def test_out_of_memory_halves_the_micro_batch(
    client: TrainingClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it fits; one warning a size; the loss runs once; what was accumulated stays."""
    data = family_data()
    first = gradient(client, data)
    client.forward_backward_custom(data, squared).result(SECONDS)
    device = OutOfMemory(engine_of(client), 70, monkeypatch)
    losses: list[float] = []

    def loss_fn(data: Any, logprobs: Any) -> Any:
        losses.append(1.0)
        return squared(data, logprobs)

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            client.forward_backward_custom(data, loss_fn).result(SECONDS)
        client.forward(data, "cross_entropy").result(SECONDS)
    assert len(losses) == 2
    assert max(device.tried) > 70
    assert engine_of(client).scorer.micro_batch_tokens == 62
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert [int(text.split()[8]) for text in said] == [500, 250, 125, 62]
    assert_close(take_gradient(client), {k: 3 * g for k, g in first.items()}, NORMS)


def test_a_datum_too_large_says_how_many_tokens_fit(
    client: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, the gradient accumulated so far and the client are as they were."""
    data = family_data()
    first = gradient(client, data)
    client.forward_backward_custom(data, squared).result(SECONDS)
    with monkeypatch.context() as patch:
        OutOfMemory(engine_of(client), 30, patch)
        with pytest.raises(DatumError) as error:
            client.forward_backward_custom(data, squared).result(SECONDS)
        longest = max(range(len(data)), key=lambda i: data[i].model_input.length)
        assert f"data[{longest}].model_input: does not fit" in str(error.value)
        assert "tokens or fewer" in str(error.value)
    assert_close(take_gradient(client), first, 1e-12)
    assert_close(gradient(client, data), first, NORMS)
