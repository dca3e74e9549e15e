"""Random models made in place, clients on them, and datums of given shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.gpu.card import Card
from cookbook_core import tinker
from cookbook_core.backend.local.scoring import packing
from cookbook_core.tinker import Datum, ModelInput

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
    given = dict(zip(names.split(), shape, strict=True))
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    given |= {"max_position_embeddings": 32_768, **special, **more}
    if window is None:
        return transformers.Qwen3Config(**given)
    return transformers.MistralConfig(sliding_window=window, **given)


def named(card: Card, name: str) -> Any:
    """The configuration of a Qwen3 of that size; a toy of its form in a smoke run."""
    return qwen3(card.pick(SHAPES[name], TOY))


def build(
    config: Any, device: torch.device | str, dtype: torch.dtype, *, rough: bool = False
) -> Any:
    """A model of that configuration with seeded weights, made on the device.

    rough: norms differ from 1 and biases from 0, so that leaving one out shows.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if rough:
            for p in model.parameters():
                if p.dim() == 1:
                    p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


@dataclass
class Side:
    """A client of the package, with what the battery reads behind it."""

    service: Any
    client: Any
    config: Any
    folder: str

    @property
    def engine(self) -> Any:
        return self.client._backend._backend.engine()

    @property
    def adapter(self) -> Any:
        return self.client._backend._adapter

    def randomize(self, scale: float = 0.05) -> None:
        """Fill A and B with noise, equal on every device: with B = 0, A has no gradient."""
        generator = torch.Generator().manual_seed(0)
        for p in self.adapter.params:
            p.data.copy_(scale * torch.randn(p.shape, generator=generator))

    def gradient(self) -> torch.Tensor:
        """The accumulated gradient as one float64 vector on the CPU; none is left."""
        grads, self.adapter.grads = self.adapter.grads, None
        parts = [grads] if isinstance(grads, torch.Tensor) else grads
        return torch.cat([g.detach().flatten().double().cpu() for g in parts])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().double().cpu() for p in self.adapter.params])

    def score(self, data: Sequence[Datum]) -> torch.Tensor:
        """Logprobs of all targets, float64 on the CPU."""
        scored = self.client.forward(list(data), "cross_entropy").result(SECONDS)
        arrays = [out["logprobs"].to_torch().flatten() for out in scored.loss_fn_outputs]
        return torch.cat(arrays).double()

    def sampler(self) -> Any:
        return self.client.save_weights_and_get_sampling_client().result(SECONDS)


@contextlib.contextmanager
def connect(
    card: Card,
    config: Any,
    dtype: str = "auto",
    *,
    device: str | torch.device | None = None,
    rank: int = RANK,
    made_on: str | torch.device | None = None,
    rough: bool = False,
) -> Iterator[Side]:
    """Open a client on a random model through the package's own loading.

    Args:
        card: the device, unless `device` says another.
        config: of the model, or the name of a bundled one.
        dtype: of the base.
        device: other than the card's: "cpu" for a reference.
        rank: of the adapter, which is filled with noise.
        made_on: where weights are drawn; None: on the device. "cpu" gives each device the same.
        rough: see `build`.
    """
    where = torch.device(device or card.device)
    if card.smoke and dtype == "auto":
        dtype = "float32"
    folder = config
    if not isinstance(config, str):
        folder = str(card.folder / f"model{len(list(card.folder.iterdir()))}")
        config.save_pretrained(folder)

    def from_pretrained(_: str, dtype: torch.dtype, device_map: Any = None, **__: Any) -> Any:
        # drawn in float32 where references of other dtypes are to start from the same numbers
        drawn = dtype if made_on is None else torch.float32
        model = build(config, made_on or where, drawn, rough=rough).to(dtype=dtype)
        return model if device_map is None else model.to(where)

    service = tinker.ServiceClient(
        device=str(where), dtype=dtype, checkpoint_dir=card.folder / "checkpoints"
    )
    in_place = mock.patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    try:
        with contextlib.nullcontext() if isinstance(config, str) else in_place:
            made = service.create_lora_training_client(folder, rank, 0, train_unembed=False)
            side = Side(service, made.result(SECONDS), config, folder)
        del made
        side.randomize()
        yield side
        side.__dict__.clear()  # the caller's name for it would keep the model alive
    finally:
        service.close()
        del service
        card.free()


# ---- datums --------------------------------------------------------------------------------------


def datum(ids: Sequence[int], weight: float = 1.0) -> Datum:
    """Every token after the first is a target; all weights are equal."""
    targets = [*ids[1:], ids[0]]
    inputs = {"target_tokens": targets, "weights": np.full(len(ids), weight, dtype=np.float32)}
    return Datum(ModelInput.from_ints(list(ids)), inputs)


def sequences(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(1, vocab, (count, length)).tolist()


def families(prompts: int, group: int, prompt: int, answer: int, vocab: int) -> list[list[int]]:
    """As GRPO has them: `group` sequences on each of `prompts` prompts."""
    stems = sequences(prompts, prompt, vocab, seed=1)
    tails = sequences(prompts * group, answer, vocab, seed=2)
    return [stems[i // group] + tail for i, tail in enumerate(tails)]


def own_cross_entropy(data: Any, logprobs: Any) -> Any:
    """The built-in cross entropy, written as a user would."""
    weights = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    return -(weights * torch.cat(list(logprobs))).sum(), {}


def squared(data: Any, logprobs: Any) -> Any:
    """A loss whose gradient differs from token to token."""
    return sum((lp**2).sum() for lp in logprobs), {}


# ---- arithmetic ----------------------------------------------------------------------------------


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
