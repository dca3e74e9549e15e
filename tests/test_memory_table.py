"""`cookbook memory`: its figures are those that a run counts; the error of a model too large."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cookbook_core.backend.local import memory_table
from cookbook_core.backend.local.model import loading, memory
from cookbook_core.backend.local.sampling import cache_budget
from cookbook_core.commands import cli
from cookbook_core.commands.memory import read_size
from cookbook_core.errors import ConfigError, ModelError
from cookbook_core.tinker import AdamParams, ServiceClient
from scripts.memory_table import SHAPES, make_folders
from tests.conftest import make_random_data
from tests.oracles.logprobs import adapter_of, engine_of
from tests.test_gradient_parity import squared

import pytest
import torch

SECONDS = 60
ROOT = Path(__file__).parents[1]
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_the_table_is_what_a_run_counts(
    arch: str, model_folder: Callable[..., str], make_service: Callable[..., ServiceClient]
) -> None:
    """Weights, adapter and keys exactly; bytes that autograd saves within 0.75 to 1.35."""
    folder = model_folder(arch, **WIDE)
    sizes = memory_table.measure(folder, 4)
    weights = memory.weight_bytes(loading.load_base_model(folder, "cpu", "bfloat16").model)
    assert sizes.weights["bfloat16"] == weights
    made = make_service(dtype="bfloat16").create_lora_training_client(folder, rank=4)
    client = made.result(SECONDS)
    engine, adapter = engine_of(client), adapter_of(client)
    assert sizes.slot == engine.budget.slot_bytes
    counted = {}
    for mode in ("off", "on"):
        engine.limits.mode, engine.limits.graph_tokens = mode, 10**9
        rows = make_random_data(1, lengths=(1000, 1000))
        client.forward_backward_custom(rows, squared).result(SECONDS)
        counted[mode] = engine.limits.graph_bytes(list(adapter.slot.params.values()))
    whole, checkpointed = counted["off"].whole, counted["on"].checkpointed
    assert 0.75 < sizes.whole / whole < 1.35
    assert 0.75 < sizes.row / (checkpointed + whole / 4 / memory.SHARE) < 1.35
    client.optim_step(AdamParams(1e-4)).result(SECONDS)
    client.forward_backward_custom(rows, squared).result(SECONDS)
    moments = [s[k] for s in adapter.ready_optimizer().state.values() for k in s if k != "step"]
    assert adapter.slot.rounded is not None
    assert adapter.grad is not None
    tensors = [adapter.flat, adapter.grad, adapter.slot.rounded, *moments]
    assert sizes.adapter == sum(tensor.nbytes for tensor in tensors)


def test_what_fits_follows_the_limits_of_a_run(
    model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = memory_table.measure(model_folder("qwen3", **WIDE), 4)
    total = sizes.fixed("bfloat16") + 10**8
    fit = sizes.fit("bfloat16", total)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**8)
    assert fit.whole == memory.tokens_that_fit(torch.device("cpu"), sizes.whole)
    assert fit.recomputed == int(10**8 / sizes.row) > fit.whole
    base = loading.load_base_model(model_folder("qwen3", **WIDE), "cpu", "bfloat16")
    monkeypatch.setattr(cache_budget, "total_bytes", lambda _: total)
    monkeypatch.setattr(cache_budget, "CPU_TOKENS", 10**12)
    assert fit.sampling == cache_budget.CacheBudget.of(base).tokens
    assert sizes.fit("nf4", total).recomputed > fit.recomputed
    nothing = sizes.fit("bfloat16", 1000)
    assert (nothing.whole, nothing.recomputed, nothing.sampling) == (0, 0, 0)


def test_the_document_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """And 8B trains on rows of 16k tokens in the memory of a 24 GB card, in NF4 alone."""
    folders = make_folders(tmp_path, {name: SHAPES[name] for name in ("Qwen3-0.6B", "Qwen3-8B")})
    assert cli.main(["memory", *folders, "--device_memory", "24GB", "--device-memory", "80GB"]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in document] == []
    eight = memory_table.measure(folders[1], 32)
    assert eight.fit("bfloat16", 24e9).recomputed < 16_384 < eight.fit("nf4", 24e9).recomputed


def test_a_sharded_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A quarter of each layer, all of the ends and a quarter of them, and two layers whole."""
    folders = make_folders(tmp_path, {"Qwen3-32B": SHAPES["Qwen3-32B"]})
    sizes = memory_table.measure(folders[0], 32, shards=4)
    model = memory_table.skeleton(folders[0])
    layers = memory.weight_bytes(model.model.layers)
    ends = memory.weight_bytes(model) - layers
    expected = layers // 4 + ends + ends // 4 + 2 * layers // len(model.model.layers)
    assert sizes.weights == {"bfloat16 over 4": expected}
    assert cli.main(["memory", *folders, "--device_memory", "48GB", "--shard", "4"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert cli.main(["memory", "tiny", "--shard", "0"]) == 2


def test_a_row_is_no_longer_than_the_context(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["memory", "tiny"]) == 0
    assert "| 512, all |" in capsys.readouterr().out
    assert cli.main(["memory", "tiny", "--device_memory", "1GB"]) == 0
    assert "| tiny | 1GB | nf4 | 0.00 | 0.01 | none | does not fit |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("1.5 GiB", 1.5 * 2**30), ("80", 80e9), ("512mb", 512e6)]
)
def test_sizes(text: str, size: float) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24TB", "0", "24 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--device_memory: not a size"):
        read_size(text)


def test_a_model_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}), encoding="utf-8")
    assert cli.main(["memory", str(tmp_path), "--device_memory", "1GB"]) == 1
    assert "no configuration of a causal language model" in capsys.readouterr().err
    assert cli.main(["memory", "tiny", "--rank", "100000"]) == 2
    assert "rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("total", "fix"),
    [
        (24e9, 'With dtype="nf4" rows of up to 10,'),
        (8e9, "A device of 16 GB trains it in nf4 on rows of 2,048 tokens."),
    ],
)
def test_a_base_model_that_does_not_fit_says_what_would(
    total: float,
    fix: str,
    tmp_path: Path,
    make_service: Callable[..., ServiceClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device runs out of memory while 14B is loaded."""
    from transformers import AutoModelForCausalLM

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (folder,) = make_folders(tmp_path, {"Qwen3-14B": SHAPES["Qwen3-14B"]})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    monkeypatch.setattr(memory_table, "total_bytes", lambda _: int(total))
    service = make_service(dtype="bfloat16")
    with pytest.raises(ModelError) as caught:
        service.create_lora_training_client(folder, rank=32).result(SECONDS)
    assert "29.5 GB in bfloat16, 9.9 GB in nf4" in caught.value.got
    assert fix in caught.value.fix
