"""Adapters of a base model: which layers carry LoRA, and which are merged for sampling."""

from __future__ import annotations

from pathlib import Path

from cookbook_core import clients, tinker
from cookbook_core.backend.local.model import adapters
from cookbook_core.backend.local.model.adapters import AdapterBank
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.types import LoraConfig
from tests.conftest import VOCAB, make_random_data
from tests.oracles.counts import Count
from tests.oracles.logprobs import adapter_of, engine_of, randomize

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast


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


def test_an_adapter_is_one_tensor_whatever_is_done_to_it(service, model_folder) -> None:
    """Steps, snapshots and switching leave the parameters views of the flat tensor, aligned."""
    client = service.create_lora_training_client(model_folder(), rank=3, seed=0).result(60)
    adapter, bank = adapter_of(client), engine_of(client).bank
    randomize(client)
    client.forward_backward(make_random_data(3), "cross_entropy").result(60)
    client.optim_step(tinker.AdamParams(learning_rate=0.1)).result(60)
    with bank.active(adapter), bank.merged(adapter):
        pass
    start = adapter.flat.data_ptr()
    for each in (adapter, adapter.copy()):
        offsets = [p.data_ptr() - each.flat.data_ptr() for p in each.params]
        assert all(offset % 256 == 0 for offset in offsets)
        assert sorted(offsets) == offsets
        values = [p.flatten() for p in each.params]
        assert torch.equal(torch.cat(values).norm(), each.flat[each.flat != 0].norm())
    assert adapter.flat.data_ptr() == start


def test_a_step_needs_as_many_kernels_for_any_number_of_tensors(service, model_folder) -> None:
    counts = []
    for train_mlp in (False, True):
        client = service.create_lora_training_client(
            model_folder(), rank=4, seed=0, train_mlp=train_mlp
        ).result(60)
        adapter = adapter_of(client)
        grads = [torch.randn_like(p) for p in adapter.params]
        adapter.accumulate(grads)
        adapter.optim_step(tinker.AdamParams())
        with Count() as count:
            adapter.accumulate(grads)
            adapter.accumulate(grads)
            adapter.optim_step(tinker.AdamParams())
            adapter.copy()
        counts.append((len(adapter.params), count.seen))
    (few, one), (many, other) = counts
    assert few < many
    assert one == other
    assert sum(one.values()) < 50
    assert one["aten::_local_scalar_dense"] <= 2  # one per accumulate; `tolist` is the step's


def test_the_rounded_adapter_is_never_stale(model_folder, make_service) -> None:
    """Made once per use: equal to a new client with the same values after every kind of change."""
    service, data = make_service(dtype="bfloat16"), make_random_data(3)
    client, other = (
        service.create_lora_training_client(model_folder(), rank=4, seed=s).result(60)
        for s in (0, 1)
    )
    randomize(client)
    seen = [scores_of(client, data)]
    for _ in range(2):
        client.forward_backward(data, "cross_entropy").result(60)
        client.optim_step(tinker.AdamParams(learning_rate=0.1)).result(60)
        scores_of(other, data)  # another adapter in the same slot
        seen.append(scores_of(client, data))
    path = client.save_state("saved").result(60).path
    fresh = make_service(dtype="bfloat16").create_training_client_from_state(path).result(60)
    assert torch.equal(scores_of(fresh, data), seen[-1])
    assert len({scores.sum().item() for scores in seen}) == 3
    other.load_state(path).result(60)
    assert torch.equal(scores_of(other, data), seen[-1])


def test_a_graph_does_not_outlive_the_use_of_its_adapter(model_folder, make_service) -> None:
    """The next use overwrites the rounded values: an error then, not a wrong gradient."""
    service, data = make_service(dtype="bfloat16"), make_random_data(1)
    client = service.create_lora_training_client(model_folder(), rank=4, seed=0).result(60)
    bank, scorer = engine_of(client).bank, engine_of(client).scorer
    with bank.active(adapter_of(client)) as params:
        loss = scorer.score_batch(scorer.batches(data)[0]).sum()
    with bank.active(adapter_of(client)), pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_kept_beyond_its_block_gives_the_same_gradient(
    model_folder, make_service, dtype: str
) -> None:
    """As `cookbook serve` keeps it, while no other adapter is used and no weight changes."""
    service, data = make_service(dtype=dtype), make_random_data(3)
    client = service.create_lora_training_client(model_folder(), rank=4, seed=0).result(60)
    randomize(client)
    engine, adapter = engine_of(client), adapter_of(client)

    def square(data, logprobs):
        return sum(lp.square().sum() for lp in logprobs), {}

    engine.forward_with_graph(adapter, data, square)  # the first is counted, by hooks
    _, scored = engine.forward_with_graph(adapter, data, square)
    output = engine.forward_backward(adapter, data, square, kept=scored)
    assert output.metrics["passes"] == 1.0
    kept, adapter.grads = adapter.grads, None
    engine.forward_backward(adapter, data, square)
    assert all(map(torch.equal, kept, adapter.grads))


def scores_of(client: tinker.TrainingClient, data: list[tinker.Datum]) -> torch.Tensor:
    return torch.cat(clients.score(client, data))
