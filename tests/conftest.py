"""What the tests share: tiny random models of several architectures, a tokenizer, random datums.

Everything is made in memory from a seed and saved once per session; nothing is downloaded.
"""

from __future__ import annotations

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start; see below

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cookbook_core.tinker import Datum, ModelInput, ServiceClient, TrainingClient
from tests.oracles.logprobs import randomize

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

# one: on layers this small two threads cost more than they give, many times more on a busy machine
torch.set_num_threads(1)
hf_logging.disable_progress_bar()

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCAB = len(SPECIAL) + 96  # + printable ASCII and the newline

_SHARED = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_DECODER = {
    **_SHARED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False},
    # attention and final logits soft-capped low enough to bend them
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
    },
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "tie_word_embeddings": True},
    # absolute positions, Conv1D layers
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    # more than a linear layer between the hidden states and the logits: find_head gives None
    "bert": {
        "model_type": "bert",
        "is_decoder": True,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
}


def _config(arch: str, changes: dict[str, Any]) -> Any:
    own = {**ARCHITECTURES[arch], **changes}
    common = _SHARED if arch in ("gpt2", "bert") else _DECODER
    return AutoConfig.for_model(own.pop("model_type"), **{**common, **own})


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII: 100 ids, <s> = 1, </s> = 2, <pad> = 0."""
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(SPECIAL + letters)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., str]:
    """`model_folder(arch="qwen3", **config)`: the folder of a random float32 model of that kind.

    Architectures: qwen3 (tied), llama (untied), mistral (window 8), gemma2 (soft-capped),
    granite (scaled logits), gpt2 (absolute positions), bert (no plain head). vocab 100,
    hidden 32, 2 layers, heads of 8, unless `config` says otherwise.
    """
    made: dict[str, str] = {}

    def folder(arch: str = "qwen3", **config: Any) -> str:
        key = f"{arch} {config}" if config else arch
        if key not in made:
            path = tmp_path_factory.mktemp(f"model_{arch}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(_config(arch, config))
                for p in model.parameters():
                    if p.dim() == 1:  # biases and norms start at 0 or 1: make them matter
                        p.data.add_(0.2 * torch.randn_like(p))
            model.save_pretrained(path)
            small_tokenizer.save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return folder


@pytest.fixture
def accelerator() -> str:
    """The device that tests/test_cuda.py checks: "cuda"; tests/simulated puts "sim" here."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    return "cuda"


@pytest.fixture(scope="module")
def connect(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., str]
) -> Iterator[Callable[..., TrainingClient]]:
    """Clients by architecture, dtype and train_unembed, each made once, with random A and B."""
    services: list[ServiceClient] = []

    @functools.cache
    def make(
        arch: str = "qwen3", dtype: str = "float64", train_unembed: bool = False
    ) -> TrainingClient:
        service = ServiceClient(
            device="cpu", dtype=dtype, checkpoint_dir=tmp_path_factory.mktemp("checkpoints")
        )
        services.append(service)
        made = service.create_lora_training_client(
            model_folder(arch), rank=4, seed=0, train_unembed=train_unembed
        )
        client = made.result(60)
        randomize(client)
        return client

    yield make
    for service in services:
        service.close()


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., ServiceClient]]:
    """`make_service(**kwargs)`: a ServiceClient on the CPU in float32, closed after the test."""
    made: list[ServiceClient] = []

    def make(**kwargs: Any) -> ServiceClient:
        defaults = {"device": "cpu", "dtype": "float32", "checkpoint_dir": tmp_path / "checkpoints"}
        made.append(ServiceClient(**{**defaults, **kwargs}))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., ServiceClient]) -> ServiceClient:
    """A ServiceClient with the defaults of `make_service`."""
    return make_service()


def make_random_data(
    n: int = 4,
    vocab: int = VOCAB,
    seed: int = 0,
    k: int | None = None,
    lengths: tuple[int, int] = (3, 14),
) -> list[Datum]:
    """Make n datums of unequal lengths; targets and weights `(N,)`, or `(N, K)` when k is given.

    About a third of the weights are 0, at least one of every datum is not; targets are random, so
    they are *not* the shifted inputs.
    """
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(n):
        length = int(rng.integers(lengths[0], lengths[1] + 1))
        shape = (length,) if k is None else (length, k)
        weights = rng.uniform(0.2, 1.5, shape) * (rng.random(shape) > 0.35)
        weights[-1] = 1.0
        inputs = {"target_tokens": rng.integers(0, vocab, shape), "weights": weights}
        data.append(Datum(ModelInput.from_ints(rng.integers(0, vocab, length)), inputs))
    return data


@pytest.fixture
def random_data() -> Callable[..., list[Datum]]:
    """`random_data(n=4, vocab=100, seed=0, k=None, lengths=(3, 14))`: see `make_random_data`."""
    return make_random_data
