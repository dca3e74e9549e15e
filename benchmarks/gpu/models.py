"""Random models made in place, clients on them, datums, and the arithmetic of a training step."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from benchmarks.gpu.card import Card
from cookbook_core import clients, tinker
from cookbook_core.backend.local.scoring import packing
from cookbook_core.tinker import Datum, ModelInput
from tests.oracles.logprobs import randomize, take_gradient

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

SECONDS = 600
"""Longest wait for one request."""
SHAPES = {  # Qwen3: hidden, inner, layers, heads, key-value heads, head_dim, vocabulary, tied
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "8B": (4096, 12_288, 36, 32, 8, 128, 151_936, False),
}
TOY = (64, 96, 2, 4, 2, 16, 320, True)
RANK = 32


def qwen3(shape: tuple[Any, ...], window: int | None = None, **more: Any) -> Any:
    """A configuration of that shape: Qwen3's or, with a window, Mistral's."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads head_dim vocab_size tie_word_embeddings"
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    given = {**dict(zip(names.split(), shape, strict=True)), **special, **more}
    given["max_position_embeddings"] = 32_768
    if window is None:
        return transformers.Qwen3Config(**given)
    return transformers.MistralConfig(sliding_window=window, **given)


def named(card: Card, name: str) -> Any:
    """The configuration of a Qwen3 of that size; a toy of its form in a smoke run."""
    return qwen3(card.pick(SHAPES[name], TOY))


def build(config: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of that configuration with seeded weights, made on the device."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plain_peft(card: Card, config: Any, adapter: Any) -> Any:
    """The same base and adapter without the package; peft keeps the adapter in float32."""
    base = build(config, card.device, card.pick(torch.bfloat16, torch.float32))
    model = peft.get_peft_model(base, adapter.slot.config)
    peft.set_peft_model_state_dict(model, adapter.named())
    return model


@contextlib.contextmanager
def connect(card: Card, model: Any, dtype: str = "auto", rank: int = RANK) -> Iterator[Any]:
    """Open a client through the package's own loading; its adapter is filled with noise.

    model: a folder or the name of a bundled model; or a configuration, whose weights are then made
        on the device.
    """
    folder, loading = model, contextlib.nullcontext()
    if not isinstance(model, str):
        folder = tempfile.mkdtemp(dir=card.folder)
        model.save_pretrained(folder)

        def made_in_place(_: str, dtype: torch.dtype, **__: Any) -> Any:
            return build(model, card.device, dtype)

        loading = mock.patch.object(AutoModelForCausalLM, "from_pretrained", made_in_place)
    service = tinker.ServiceClient(
        device=str(card.device),
        dtype="float32" if card.smoke and dtype == "auto" else dtype,
        checkpoint_dir=card.folder / "checkpoints",
    )
    try:
        with loading:
            made = service.create_lora_training_client(folder, rank, 0, train_unembed=False)
            client = made.result(SECONDS)
        del made
        randomize(client, scale=0.05)
        yield client
        vars(client).clear()  # the caller's name for it would keep the model alive
    finally:
        service.close()
        del service
        card.free()


def score(client: Any, data: Sequence[Datum]) -> torch.Tensor:
    """Logprobs of all targets, float64 on the CPU."""
    return torch.cat([lp.flatten().double() for lp in clients.score(client, data)])


def gradient(client: Any) -> torch.Tensor:
    """The accumulated gradient as one float64 vector on the CPU; none is left."""
    return torch.cat([g.flatten().double().cpu() for g in take_gradient(client).values()])


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error by norms."""
    return float((found - want).norm() / want.norm())


def train_step(client: Any, data: list[Datum], loss: Any = "cross_entropy") -> float:
    """A built-in loss, or one's own, and an optimizer step; returns the number of passes."""
    forward_backward = client.forward_backward_custom if callable(loss) else client.forward_backward
    backward = forward_backward(data, loss)
    client.optim_step(tinker.AdamParams(1e-5)).result(SECONDS)
    return backward.result(SECONDS).metrics["passes"]


def datums(lists: Sequence[Sequence[int]]) -> list[Datum]:
    """Every token after the first is a target, and the first the last; weights are equal."""
    weight, made = 1.0 / sum(map(len, lists)), []
    for ids in lists:
        weights = np.full(len(ids), weight, dtype=np.float32)
        inputs = {"target_tokens": [*ids[1:], ids[0]], "weights": weights}
        made.append(Datum(ModelInput.from_ints(list(ids)), inputs))
    return made


def sequences(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids that every model here has."""
    return np.random.default_rng(seed).integers(1, 90, (count, length)).tolist()


def families(prompts: int, group: int, prompt: int, answer: int) -> list[list[int]]:
    """As GRPO has them: `group` sequences on each of `prompts` prompts."""
    stems, tails = sequences(prompts, prompt, seed=1), sequences(prompts * group, answer, seed=2)
    return [stems[i // group] + tail for i, tail in enumerate(tails)]


def training_flops(config: Any, lists: Sequence[list[int]]) -> float:
    """Operations of a training step on a LoRA; recomputation and the LoRA itself are not counted.

    Two operations a weight and token forward, two for the gradient of activations; 14 d a pair of
    attention (two products forward, five backward, d = heads x head_dim); 4 V H a scored row, which
    is every token of every sequence. A shared prefix goes through the layers once.
    """
    c, layout = config, packing.lay_out(lists)
    attended = 0
    for s in layout.segments:
        own, above = s.stop - s.start, sum(stop - start for start, stop in s.above)
        attended += own * (own + 1) // 2 + own * above
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * wide + 2 * narrow + 3 * c.intermediate_size)
    linear = 4 * c.num_hidden_layers * layer * len(layout.tokens)
    head = 4 * c.vocab_size * c.hidden_size * sum(map(len, lists))
    return linear + head + 14 * wide * c.num_hidden_layers * attended
