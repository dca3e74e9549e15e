"""Decoder layers in few operations against transformers' and peft's own."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

from cookbook_core.backend.local.model import fused_layer, layer_functions
from cookbook_core.backend.local.model.fused_lora import fuse as fuse_lora
from cookbook_core.backend.local.scoring.memory_limits import recomputed
from tests.test_layer_loop import MODELS, make

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 100, (2, 21), generator=torch.Generator().manual_seed(3))


def with_lora(model: Any, targets: list[str] = ALL) -> list[Any]:
    """Add a slot whose B is not zero; its parameters."""
    model.requires_grad_(False)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    peft.get_peft_model(model, config, adapter_name="slot0")
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.data = torch.randn(p.shape, dtype=p.dtype) / 4
    return params


def fused_copy(model: Any) -> tuple[Any, list[Any]]:
    """A copy in few operations, whatever its dtype; its parameters."""
    fused = copy.deepcopy(model)
    fuse_lora(fused, "slot0")
    for layer in fused.model.layers:
        layer.__class__ = fused_layer._fused_class(type(layer))
    return fused, [p for p in fused.parameters() if p.requires_grad]


def result(model: Any, params: list[Any]) -> list[torch.Tensor]:
    """Hidden states, and the gradients of a sum of their numbers times fixed ones."""
    states = model.model(IDS, use_cache=False).last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    return [states.detach(), *torch.autograd.grad((states * weights).sum(), params)]


def exact_norms(model: Any) -> None:
    """Norms in float64, which transformers computes through float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x / (x.square().mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
            )


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients_are_those_of_plain_autograd(kind: str, targets: list[str]) -> None:
    model = make(kind).double()
    if kind == "mistral":
        model.config.sliding_window = 5
    exact_norms(model)
    params = with_lora(model, targets)
    fused, own = fused_copy(model)
    for want, found in zip(result(model, params), result(fused, own), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


def test_without_the_adapter_the_bits_are_those_of_one_that_is_zero() -> None:
    """In float32; and those of layers recomputed in the backward are those of layers kept."""
    model = make("qwen3")
    with_lora(model)
    fused, params = fused_copy(model)
    kept = result(fused, params)
    with recomputed(fused, on=True):
        again = result(fused, params)
    assert all(map(torch.equal, kept, again))
    for name, p in fused.named_parameters():
        if ".lora_B" in name:
            p.data.zero_()
    with torch.no_grad():
        zero = fused.model(IDS, use_cache=False).last_hidden_state
    for module in fused.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.enable_adapters(False)
    assert torch.equal(fused.model(IDS, use_cache=False).last_hidden_state, zero)
    assert not torch.equal(kept[0], zero)


def computed_in_few(model: Any) -> list[bool]:
    return [getattr(layer, "few_operations", False) for layer in model.model.layers]


def more(_module: Any, _args: Any, output: Any) -> Any:
    return 1.5 * output


@pytest.mark.parametrize("where", ["mlp", "self_attn.q_proj", "input_layernorm"])
def test_a_model_that_computes_something_else_is_refused(where: str) -> None:
    model = make("llama").requires_grad_(False)
    model.model.layers[1].get_submodule(where).register_forward_hook(more)
    fused_layer.fuse(model)
    assert computed_in_few(model) == [False] * 3


@pytest.mark.parametrize("changed", [False, True])
def test_a_slot_is_compared_too(changed: bool) -> None:
    """With values of its own, which are put back."""
    model = make("llama").requires_grad_(False)
    fused_layer.fuse(model)
    assert computed_in_few(model) == [True] * 3
    params = with_lora(model)
    fuse_lora(model, "slot0")
    if changed:
        model.model.layers[0].mlp.down_proj.register_forward_hook(more)
    before = [p.data_ptr() for p in params]
    fused_layer.check_slot(model, params)
    assert computed_in_few(model) == [not changed] * 3
    assert [p.data_ptr() for p in params] == before


def test_a_slot_with_biases_takes_the_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama").requires_grad_(False)
    fused_layer.fuse(model)
    config = peft.LoraConfig(r=3, target_modules=ALL, lora_bias=True)
    peft.get_peft_model(model, config, adapter_name="slot0")
    params = [p for p in model.parameters() if p.requires_grad]
    fuse_lora(model, "slot0")
    before = [p.data_ptr() for p in params]
    fused_layer.check_slot(model, params)
    assert [p.data_ptr() for p in params] == before
    assert computed_in_few(model) == [True] * 3
    monkeypatch.setattr(layer_functions, "_merged", mock.Mock(side_effect=AssertionError))
    assert all(torch.isfinite(x).all() for x in result(model, params))


@pytest.mark.parametrize("kind", ["gemma", "float64", "trained", "qwen3"])
def test_models_that_are_asked(kind: str) -> None:
    model = make("gemma" if kind == "gemma" else "qwen3").requires_grad_(kind == "trained")
    model = model.double() if kind == "float64" else model
    fused_layer.fuse(model)
    assert computed_in_few(model) == [kind == "qwen3"] * 3


def test_few_tokens_and_adapters_of_other_kinds_take_the_own_forward(monkeypatch: Any) -> None:
    model = make("qwen3")
    with_lora(model)
    fused, _ = fused_copy(model)
    product = mock.Mock(wraps=layer_functions._merged)
    monkeypatch.setattr(layer_functions, "_merged", product)

    def layers_in_few(ids: torch.Tensor) -> float:
        product.reset_mock()
        with torch.no_grad():
            found, want = (m.model(ids, use_cache=False)[0] for m in (fused, model))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        return product.call_count / 4

    assert layers_in_few(IDS) == 3
    assert layers_in_few(IDS[:, :15]) == 0  # 30 tokens, 32 wide
    fused.model.layers[1].mlp.up_proj.lora_variant.clear()
    assert layers_in_few(IDS) == 2


class Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **kwargs or {})


def costs(model: Any, params: list[Any]) -> tuple[int, int]:
    """Operations forward and backward, and numbers kept for each token."""
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Count() as count:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            states = model.model(IDS, use_cache=False).last_hidden_state
            numbers = sum(size for at, size in kept.items() if at not in own)
        torch.autograd.grad(states.sum(), params)
    return count.number, numbers // IDS.numel()


def test_a_layer_takes_few_operations_and_keeps_few_numbers() -> None:
    """Views included, forward and backward; in torch 2.13 and transformers 5.23."""
    model = make("qwen3")
    with_lora(model)
    pair = model, fused_copy(model)[0]

    def each() -> list[tuple[int, int]]:
        return [costs(m, [p for p in m.parameters() if p.requires_grad]) for m in pair]

    three = each()
    for m in pair:
        m.model.layers = m.model.layers[:2]
        m.config.num_hidden_layers, m.config.layer_types = 2, m.config.layer_types[:2]
    own, few = (tuple(map(int.__sub__, a, b)) for a, b in zip(three, each(), strict=True))
    assert few[0] <= 280
    assert 1.5 * few[0] < own[0]
    # x, y, gate, up; queries and keys twice, values, attended; for each norm and query head one
    assert few[1] == 2 * 32 + 2 * 48 + 2 * (48 + 16) + 16 + 48 + (1 + 1 + 8 + 6)
    assert 1.4 * few[1] < own[1]
