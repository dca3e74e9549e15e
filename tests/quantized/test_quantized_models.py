"""Quantized base models: the results of the dequantized ones, exactly; wrong layers are refused.

`make test` puts bitsandbytes and torchao into a folder of their own:

    PYTHONPATH=.venv/quantized python -m pytest tests/quantized
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.model import fused_layer, loading, memory, quantization
from cookbook_core.backend.local.model.loading import BaseModel, load_base_model
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.backend.local.multiprocess.engine import SharedEngine
from cookbook_core.backend.local.sampling.layer_loop import LayerLoop
from cookbook_core.clients import score
from cookbook_core.commands.export import export
from cookbook_core.errors import CheckpointError, ConfigError, ModelError
from cookbook_core.tinker import ModelInput, SamplingParams, ServiceClient, TrainingClient
from tests.conftest import make_random_data
from tests.follower import Two
from tests.oracles.logprobs import adapter_of, assert_close, engine_of, randomize, slow_logprobs
from tests.test_client_contract import logprobs_of
from tests.test_export import read
from tests.test_gradient_parity import squared

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MISSING = [n for n in ("bitsandbytes", "torchao") if importlib.util.find_spec(n) is None]
if MISSING and os.environ.get("QUANTIZED") != "required":
    pytest.skip(f"not on the path: {', '.join(MISSING)}", allow_module_level=True)

SECONDS = 60
DATA = make_random_data(6, vocab=94, lengths=(5, 30))  # `tests.follower` acts on other tokens

Client = Callable[..., TrainingClient]


def quantize(folder: str, out: Path, config: Any) -> str:
    """Let transformers quantize a folder and write it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return str(out)


def in_4_bits(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def in_8_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(autouse=True)
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers over quantized weights take their own forward: here those that they are compared with
    do too, so that no difference but the weights' remains."""
    monkeypatch.setattr(fused_layer, "fuse", lambda model: None)


@pytest.fixture(scope="module")
def dequantized(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., str]
) -> Callable[[str], str]:
    """By architecture, a folder with the values of the model in NF4, as transformers says."""

    def make(arch: str) -> str:
        out = tmp_path_factory.mktemp("dequantized")
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(arch), quantization_config=in_4_bits(), device_map={"": "cpu"}
        )
        model.dequantize().save_pretrained(out)
        AutoTokenizer.from_pretrained(model_folder(arch)).save_pretrained(out)
        return str(out)

    return make


@pytest.fixture
def client_of(make_service: Callable[..., ServiceClient]) -> Client:
    """`client_of(folder, dtype)`: a client with random A and B, the same for all."""

    def make(folder: str, dtype: str = "auto", train_unembed: bool = False) -> TrainingClient:
        made = make_service(dtype=dtype).create_lora_training_client(
            folder, rank=4, seed=0, train_unembed=train_unembed
        )
        client = made.result(SECONDS)
        randomize(client, scale=0.05)
        return client

    return make


def gradient_of(client: TrainingClient) -> dict[str, torch.Tensor]:
    client.forward_backward_custom(DATA, squared).result(SECONDS)
    adapter = adapter_of(client)
    grads = dict(zip(adapter.slot.params, [g.clone() for g in adapter.grads or []], strict=True))
    adapter.grads = None
    return grads


def base_of(client: TrainingClient) -> BaseModel:
    return engine_of(client).base


def sampled(client: TrainingClient) -> list[int]:
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)
    params = SamplingParams(max_tokens=20, temperature=0)
    request = sampler.sample(ModelInput.from_ints([5, 17, 40]), 1, params)
    return list(request.result(SECONDS).sequences[0].tokens)


# ---- the same results ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "train_unembed"), [("qwen3", False), ("qwen3", True), ("llama", True)]
)
def test_results_are_those_of_the_dequantized_folder(
    arch: str,
    train_unembed: bool,
    model_folder: Callable[..., str],
    dequantized: Callable[[str], str],
    client_of: Client,
) -> None:
    """Before and after scoring and sampling; and far from those of the unquantized folder."""
    ours = client_of(model_folder(arch), "nf4", train_unembed)
    plain = client_of(dequantized(arch), "float32", train_unembed)
    assert base_of(ours).quantized == "nf4"
    identity = dict(base_of(ours).identity())
    for _ in range(2):
        for a, b in zip(logprobs_of(ours, DATA), logprobs_of(plain, DATA), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert_close(gradient_of(ours), gradient_of(plain), 1e-6)
        score(ours, DATA)
        assert sampled(ours) == sampled(plain)
    base_of(ours)._identity = None
    assert base_of(ours).identity() == identity
    for key in ("fingerprint", "parameters", "architecture"):
        assert identity[key] == base_of(plain).identity()[key]
    bare = client_of(model_folder(arch), "float32", train_unembed)
    pairs = zip(logprobs_of(ours, DATA), logprobs_of(bare, DATA), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 0.01
    assert identity["fingerprint"] != base_of(bare).identity()["fingerprint"]


def test_what_makes_training_quick_is_used(
    model_folder: Callable[..., str], client_of: Client
) -> None:
    """LoRA in one product, packed rows, tiles of the unembedding; adapters stay float32."""
    client = client_of(model_folder("qwen3"), "nf4")
    engine = engine_of(client)
    layers = [m for m in engine.base.model.modules() if hasattr(m, "lora_variant")]
    assert len(layers) == 14
    assert all(layer.lora_variant for layer in layers)
    assert engine.scorer.packs
    assert engine.scorer.head is not None
    assert adapter_of(client).flat.dtype == torch.float32
    assert engine.bank.merged_bytes(adapter_of(client)) == 0


def test_nf4_works_for_layers_that_transformers_transposes(
    model_folder: Callable[..., str], client_of: Client, tmp_path: Path
) -> None:
    """GPT-2's Conv1D: the shapes of the unquantized model, and the function that was trained."""
    client = client_of(model_folder("gpt2"), "nf4")
    plain = load_base_model(model_folder("gpt2"), "cpu", "float32")
    assert base_of(client).identity()["parameters"] == plain.identity()["parameters"]
    for name, p in plain.model.named_parameters():
        own = base_of(client).weight(name)
        assert own is not None
        torch.testing.assert_close(own, p, rtol=0, atol=0.3 * float(p.abs().max()))
    path = client.save_weights_for_sampler("final").result(SECONDS).path
    merged = AutoModelForCausalLM.from_pretrained(export(path, "merged", tmp_path / "merged"))
    with torch.no_grad():
        theirs = [slow_logprobs(merged.double().eval(), datum) for datum in DATA]
    for a, b in zip(logprobs_of(client, DATA), theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["nf4", "torchao"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_that_is_quantized_already(
    form: str, dtype: str, model_folder: Callable[..., str], client_of: Client, tmp_path: Path
) -> None:
    """It needs no flag, and computes in the dtype that was asked for, whatever its config says."""
    config = int8_weights() if form == "torchao" else in_4_bits(bnb_4bit_compute_dtype="bfloat16")
    folder = quantize(model_folder("llama"), tmp_path / "quantized", config)
    ours = client_of(folder, dtype)
    base = base_of(ours)
    assert base.quantized == form
    assert base.model.dtype == getattr(torch, dtype)
    if form == "nf4":
        flagged = load_base_model(model_folder("llama"), "cpu", "nf4")
        assert base.identity()["fingerprint"] == flagged.identity()["fingerprint"]
    assert LayerLoop.of(base.model) is None  # which takes plain weights
    assert all(g.isfinite().all() and g.any() for g in gradient_of(ours).values())
    path = ours.save_weights_for_sampler("final").result(SECONDS).path
    out = export(path, "merged", tmp_path / "merged", dtype="float32")
    assert "quantization_config" not in read(out / "config.json")
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        theirs = [slow_logprobs(merged, datum) for datum in DATA]
    tolerance = 1e-5 if dtype == "float32" else 0.3
    for a, b in zip(logprobs_of(ours, DATA), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_two_processes_over_a_quantized_base(
    model_folder: Callable[..., str],
    client_of: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes, each with the whole base in NF4, compute what one does."""
    two = Two(tmp_path)
    try:
        shared = client_of(model_folder("llama"), "nf4")
        assert type(engine_of(shared)) is SharedEngine
        with monkeypatch.context() as patch:
            patch.setattr(group, "_group", None)
            alone = client_of(model_folder("llama"), "nf4")
        for a, b in zip(logprobs_of(shared, DATA), logprobs_of(alone, DATA), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert_close(gradient_of(shared), gradient_of(alone), 1e-6)
    finally:
        assert two.end() == 0


def test_a_merged_export_is_the_function_that_was_trained(
    model_folder: Callable[..., str], client_of: Client, tmp_path: Path
) -> None:
    client = client_of(model_folder("qwen3"), "nf4")
    path = client.save_weights_for_sampler("final").result(SECONDS).path
    out = export(path, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = [slow_logprobs(merged.double(), datum) for datum in DATA]
    for a, b in zip(logprobs_of(client, DATA), theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


def test_an_adapter_goes_back_onto_the_weights_it_was_trained_on(
    model_folder: Callable[..., str], dequantized: Callable[[str], str], client_of: Client
) -> None:
    """Those in NF4 or their dequantized values; for others the error names the dtype."""
    client = client_of(model_folder("qwen3"), "nf4")
    path = client.save_state("state").result(SECONDS).path
    expected = logprobs_of(client, DATA)
    for folder, dtype in ((model_folder("qwen3"), "nf4"), (dequantized("qwen3"), "float32")):
        other = client_of(folder, dtype)
        other.load_state(path).result(SECONDS)
        for a, b in zip(logprobs_of(other, DATA), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError) as caught:
        client_of(model_folder("qwen3"), "float32").load_state(path).result(SECONDS)
    assert 'dtype="nf4"' in caught.value.fix
    assert "in nf4" in caught.value.expected
    plain = client_of(model_folder("qwen3"), "float32").save_state("plain").result(SECONDS).path
    with pytest.raises(CheckpointError) as caught:
        client.load_state(plain).result(SECONDS)
    assert 'dtype="auto"' in caught.value.fix


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_bytes_in_nf4_are_predicted(arch: str, model_folder: Callable[..., str]) -> None:
    plain = load_base_model(model_folder(arch), "cpu", "float32").model
    own = load_base_model(model_folder(arch), "cpu", "nf4").model
    assert len(list(quantization.quantized_layers(own))) == {"gpt2": 8}.get(arch, 14)
    assert memory.weight_bytes(own) == memory.nf4_weight_bytes(plain) < memory.weight_bytes(plain)


# ---- layers that cannot be trained through -------------------------------------------------------


class Layer(torch.nn.Linear):
    """A linear layer of 64 x 48 with a bias much larger than its products."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(64, 48)
        generator = torch.Generator().manual_seed(0)
        self.weight.data = torch.randn(48, 64, generator=generator)
        self.bias.data.fill_(1000.0)
        self.to(dtype)


class Repacking(Layer):
    """As bitsandbytes on a CPU with AVX512-BF16: packed by the first forward without a graph."""

    support_avx512bf16_for_cpu = True
    packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.packed |= self.support_avx512bf16_for_cpu and not x.requires_grad
        y = super().forward(x)
        return y.detach() if self.packed else y


class Rounding(Layer):
    """Its inputs are rounded to 8 bits, as by LLM.int8; the gradient is that of no rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class Halved(Layer):
    """Its gradient is half of the right one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / 2 + x.detach() / 2)


class Broken(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel for this device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "figure"),
    [
        (Layer, ""),
        (Repacking, "no gradient passes them"),
        (Rounding, "outputs"),
        (Halved, "gradients 50.0% off"),
        (Broken, "NotImplementedError: no kernel for this device"),
    ],
)
def test_one_layer_of_each_kind_is_checked(
    kind: type[Layer], figure: str, dtype: torch.dtype
) -> None:
    right, layer = Layer(dtype), kind(dtype)
    if not figure:
        quantization.check_layers([right, layer], dtype, torch.device("cpu"), "folder")
        return
    bias = layer.bias
    with pytest.raises(ModelError) as caught:
        quantization.check_layers([right, layer], dtype, torch.device("cpu"), "folder")
    assert layer.bias is bias
    assert kind.__name__ in caught.value.what
    assert figure in caught.value.got
    assert 'dtype="nf4"' in caught.value.fix


def repack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes do on this CPU what it does on one with AVX512-BF16, kernels apart."""
    from bitsandbytes.nn import modules

    forward = modules.Linear4bit.forward

    def forward_there(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.packed = True
        y = forward(self, x)
        return y.detach() if getattr(self, "packed", False) else y

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *both: both)
    monkeypatch.setattr(modules.Linear4bit, "forward", forward_there)


def test_repacking_for_avx512_is_turned_off(
    model_folder: Callable[..., str],
    dequantized: Callable[[str], str],
    client_of: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: scoring repacked the weights, and from then on no gradient passed the layers."""
    repack(monkeypatch)
    ours, plain = (
        client_of(model_folder("llama"), "nf4"),
        client_of(dequantized("llama"), "float32"),
    )
    score(ours, DATA)
    assert_close(gradient_of(ours), gradient_of(plain), 1e-6)


def test_repacking_that_stays_on_is_refused(
    model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant: a version of bitsandbytes that does not read the switch."""
    from bitsandbytes.nn import modules

    repack(monkeypatch)
    switch = property(lambda _: True, lambda _, value: None)
    monkeypatch.setattr(modules.Linear4bit, "support_avx512bf16_for_cpu", switch, raising=False)
    with pytest.raises(ModelError, match=r"Linear4bit.*no gradient passes them"):
        load_base_model(model_folder("llama"), "cpu", "nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llm_int8_is_refused_with_the_figure(
    dtype: str, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    folder = quantize(model_folder("llama"), tmp_path / "int8", in_8_bits())
    with pytest.raises(ModelError, match=r"Linear8bitLt.*outputs \d\.\d% off"):
        load_base_model(folder, "cpu", dtype)


# ---- bad input -----------------------------------------------------------------------------------


def test_a_quantized_unembedding_is_refused(
    model_folder: Callable[..., str], tmp_path: Path
) -> None:
    config = in_4_bits(llm_int8_skip_modules=["embed_tokens"])
    folder = quantize(model_folder("llama"), tmp_path / "whole", config)
    with pytest.raises(ModelError, match="unembedding is quantized"):
        load_base_model(folder, "cpu", "float32")


def test_the_missing_package_is_one_line(
    model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = {
        "bitsandbytes": quantize(model_folder("llama"), tmp_path / "nf4", in_4_bits()),
        "torchao": quantize(model_folder("llama"), tmp_path / "int8", int8_weights()),
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        load_base_model(model_folder("llama"), "cpu", "nf4")
    assert str(caught.value) == (
        'dtype: needs bitsandbytes, not installed. Run: pip install "cookbook-core[quantized]".'
    )
    for name, folder in folders.items():
        with pytest.raises(ConfigError, match=f"base_model: needs {name}.*Run: pip install"):
            load_base_model(folder, "cpu", "auto")


def test_nf4_on_a_folder_quantized_otherwise_is_refused(
    model_folder: Callable[..., str], tmp_path: Path
) -> None:
    folder = quantize(model_folder("llama"), tmp_path / "int8", int8_weights())
    with pytest.raises(ConfigError) as caught:
        load_base_model(folder, "cpu", "nf4")
    assert (caught.value.expected, caught.value.got) == ("torchao", "'nf4'")


def test_an_unknown_dtype_lists_nf4() -> None:
    with pytest.raises(ConfigError) as caught:
        loading.choose_dtype("nf5", torch.device("cpu"))
    assert caught.value.expected == "one of auto, bfloat16, float32, float64, nf4"
    assert caught.value.fix == 'Did you mean "nf4"?'
