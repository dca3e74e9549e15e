"""Adapters of a base model: which layers carry LoRA, and which are merged for sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from cookbook_core.backend.local.model import adapters
from cookbook_core.backend.local.model.adapters import AdapterBank
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.types import LoraConfig
from tests.conftest import VOCAB, make_random_data


@pytest.fixture(scope="module")
def gemma3(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Gemma 3 with a vision tower, whose layers are named as the language model's."""
    folder = tmp_path_factory.mktemp("gemma3")
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 99, "boi_token_index": 97, "eoi_token_index": 98}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, pad_token_id=0, **tokens
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


def test_lora_goes_on_the_language_model_only(gemma3: Path, make_service) -> None:
    """Training is on text: no gradient would reach LoRA in a vision tower."""
    client = make_service().create_lora_training_client(str(gemma3), rank=2, seed=0).result(60)
    adapter = client._backend._adapter
    assert len(adapter.params) == 2 * (2 * 7 + 1)  # A and B: 7 layers in 2 blocks, unembedding
    assert not [key for key in adapter.named() if "vision" in key or "projector" in key]
    for p in adapter.params:  # A's gradient is 0 where B is
        torch.nn.init.normal_(p, std=0.3)
    client.forward_backward(make_random_data(3), "cross_entropy").result(60)
    assert all(g.norm() > 0 for g in adapter.grads)
    path = client.save_state("saved").result(60).path
    again = make_service().create_training_client_from_state(path).result(60)
    assert again._backend._adapter.named().keys() == adapter.named().keys()


@pytest.mark.parametrize("train_mlp", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_depends_on_the_model_alone(
    model_folder, monkeypatch: pytest.MonkeyPatch, dtype: str, train_mlp: bool
) -> None:
    """W + scale * B A in a second copy whose size is known before; nothing below float32."""
    monkeypatch.setattr(adapters, "free_bytes", lambda _: 0, raising=False)
    base = load_base_model(model_folder("qwen3"), "cpu", dtype)
    bank = AdapterBank(base)
    adapter = bank.create(LoraConfig(rank=4, seed=0, train_mlp=train_mlp))
    for p in adapter.params:
        torch.nn.init.normal_(p, std=0.3)
    weights = {name: p.data for name, p in base.model.named_parameters() if ".lora_" not in name}
    with bank.active(adapter), bank.merged(adapter):
        changed = {n: p.data for n, p in base.model.named_parameters() if n in weights}
        merged = [n for n in weights if changed[n].data_ptr() != weights[n].data_ptr()]
        assert all(not torch.equal(changed[n], weights[n]) for n in merged)
    assert bank.merged_bytes(adapter) == sum(weights[n].nbytes for n in merged)
    blocks = 2 * (4 + 3 * train_mlp)  # the unembedding is tied to the embedding
    assert len(merged) == (blocks if dtype == "float32" else 0)
    after = {name: p.data for name, p in base.model.named_parameters() if name in weights}
    assert all(after[n].data_ptr() == weights[n].data_ptr() for n in weights)
    assert bank.merged_bytes(None) == 0
