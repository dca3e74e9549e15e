"""The layer loop: the model's own samples, in half of the operations, or not at all."""

from __future__ import annotations

from typing import Any
from unittest import mock

from cookbook_core.backend.local.sampling import layer_loop
from cookbook_core.backend.local.sampling.decoder import Decoder, Prompt
from cookbook_core.backend.local.sampling.layer_loop import LayerLoop
from cookbook_core.backend.local.sampling.sampler import sample_batch
from cookbook_core.errors import ModelError
from tests.test_sampler import ids, request, rescored, tokens_of

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_theta": 100.0},
    "mistral": {"sliding_window": None},
    "qwen2": {},  # biases at queries, keys and values
    "qwen3": {"tie_word_embeddings": True, "num_attention_heads": 6},
}


def make(kind: str) -> Any:
    """A random float32 model of 3 layers whose biases and norms matter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes | MODELS.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


REQUESTS = [
    request(ids(n), k, max_tokens=x, temperature=0.7, seed=n, stop=[20, 21, 22])
    for n, k, x in [(1, 2, 9), (5, 3, 30), (17, 2, 12), (20, 1, 4)]
]


def own_samples(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Samples of the model's own forward."""
    with monkeypatch.context() as patch:
        patch.setattr(LayerLoop, "of", lambda _: None)
        return sample_batch(model, None, REQUESTS)


@pytest.mark.parametrize("kind", MODELS)
def test_the_samples_are_the_models_own(kind, monkeypatch):
    """Prompts of unequal length, and rows that stop."""
    model = make(kind)
    expected = own_samples(model, monkeypatch)
    found = sample_batch(model, None, REQUESTS)
    assert layer_loop.same[model]
    assert tokens_of(found) == tokens_of(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.sequences, b.sequences, strict=True):
            assert abs(x.logprobs_np - y.logprobs_np).max() < 2e-5


@pytest.mark.parametrize("where", ["mlp", "self_attn.q_proj"])
def test_a_model_that_computes_more_keeps_its_own_forward(where):
    model = make("llama")
    module = model.model.layers[1].get_submodule(where)
    module.register_forward_hook(lambda _module, _args, output: 1.5 * output)
    found = sample_batch(model, None, REQUESTS)
    assert layer_loop.same[model] is False
    for asked, response in zip(REQUESTS, found, strict=True):
        for sequence in response.sequences:
            expected = rescored(model, asked.prompt, sequence.tokens, 0.7)
            assert sequence.logprobs_np == pytest.approx(expected, abs=1e-4)


def test_a_model_whose_modules_take_other_arguments_keeps_its_own_forward(monkeypatch):
    """As in another version of transformers."""
    model = make("qwen3")
    expected = own_samples(model, monkeypatch)
    refused = mock.Mock(side_effect=TypeError("unexpected argument"))
    monkeypatch.setattr(LayerLoop, "step", refused)
    assert tokens_of(sample_batch(model, None, REQUESTS)) == tokens_of(expected)
    assert layer_loop.same[model] is False


@pytest.mark.parametrize("change", ["float64", "gemma", "window", "quantized"])
def test_other_models_are_not_tried(change):
    model = make({"gemma": "gemma", "window": "mistral"}.get(change, "qwen3"))
    if change == "float64":
        model = model.double()
    elif change == "window":
        model.config.sliding_window = 8
    elif change == "quantized":
        layer = model.model.layers[2].mlp
        layer.up_proj = torch.nn.Sequential(layer.up_proj)
    assert Decoder(model)._loop is None
    assert model not in layer_loop.same


def test_weights_that_are_not_finite_say_nothing_about_the_model():
    model = make("qwen3")
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        sample_batch(model, None, REQUESTS)
    assert model not in layer_loop.same
    weight.data = kept
    sample_batch(model, None, REQUESTS)
    assert layer_loop.same[model]


class Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_layer_takes_few_operations():
    """39 in torch 2.13, where Qwen3's own forward takes 88 in transformers 5.23."""
    model = make("qwen3")

    def operations(loop: bool, layers: int) -> int:
        decoder = Decoder(model)
        prompts = [Prompt(ids(9)), Prompt(ids(9, 1))]
        tokens = decoder.prefill(prompts, [4, 4])
        if not loop:
            decoder._loop = None
        with Count() as count:
            decoder.step(tokens)
        return count.number

    deep = [operations(loop, 3) for loop in (True, False)]
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = model.config.layer_types[:2]
    per_layer = [a - operations(loop, 2) for a, loop in zip(deep, (True, False), strict=True)]
    assert per_layer[0] <= 42
    assert 1.8 * per_layer[0] <= per_layer[1]
