"""A Llama-like model's decoding step in few operations: their number is the time of small models.

transformers computes a layer's step in about 90 operations and a dozen calls of modules. This loop
computes the same with the model's own weights in about 40. It is used on the
CPU in float32 for the classes below, once a model has given the same logits to rounding on random
tokens, and where the LoRA of all layers is merged or disabled.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from cookbook_core.backend.local.model.fused_layer import CLASSES
from cookbook_core.backend.local.model.quantization import is_quantized
from cookbook_core.backend.local.sampling.kv_cache import RowCache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TOLERANCE = 1e-4
"""Largest relative L2 error of a step's logits against the model's own; a wrong formula gives more
than 0.01."""

same: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""By model, whether the loop gives its logits."""


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer; those of products transposed, `(in, out)`."""

    norm: Tensor
    eps: Tensor
    inward: list[tuple[Tensor, Tensor | None]]
    """Of queries, keys, values."""
    head_norm: Tensor | None
    """`(heads + key heads, head_dim)`."""
    head_eps: Tensor
    scale: float
    outward: tuple[Tensor, Tensor | None]
    mlp_norm: Tensor
    mlp_eps: Tensor
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    activation: Any


class LayerLoop:
    """The steps of one decoding loop, during which the model's weights stay as they are.

    Args:
        core: a causal LM of one of CLASSES.
        layers: its weights.
    """

    def __init__(self, core: Any, layers: list[_Layer]) -> None:
        config = core.config
        self._core, self._layers = core, layers
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = core.model.layers[0].self_attn.head_dim

    @classmethod
    def of(cls, core: Any) -> LayerLoop | None:
        """The loop over a model's weights as they are now; None where it cannot be used."""
        known = type(core).__name__ in CLASSES and type(core).__module__.startswith("transformers.")
        # (transformers' norms compute a model in float64 through float32)
        usable = core.device.type == "cpu" and core.dtype == torch.float32
        if not (known and usable and same.get(core, True)):
            return None
        try:
            return cls(core, [_weights(layer) for layer in core.model.layers])
        except (_NotPlain, AttributeError):
            return None

    def step(
        self, cache: RowCache, tokens: Tensor, position: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Append one token to each of R rows.

        Args:
            cache: grows by one column.
            tokens: `(R,)`.
            position: `(R,)`, of these tokens.
            mask: `(R, columns)` bool, False at padding, with the new column; None without any.

        Returns:
            logits `(R, V)`.
        """
        model = self._core.model
        x = self._core.get_input_embeddings()(tokens)
        cos, sin = model.rotary_emb(x, position[:, None])
        half = self._width // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, -torch.inf)[
                :, None, None
            ]
        rows, heads, total = len(tokens), self._heads, self._heads + self._key_heads
        groups = rows, self._key_heads, -1, self._width
        states = x.new_empty(rows, total + self._key_heads, self._width)
        into = [
            part.flatten(1) for part in states.split((heads, self._key_heads, self._key_heads), 1)
        ]
        turned, values = states[:, :total], states[:, total:, None]
        for layer, column in zip(self._layers, cache.layers, strict=True):
            h = _norm(x, layer.norm, layer.eps)
            for (weight, added), out in zip(layer.inward, into, strict=True):
                if added is None:
                    torch.mm(h, weight, out=out)
                else:
                    torch.addmm(added, h, weight, out=out)
            qk = turned
            if layer.head_norm is not None:
                qk = _norm(qk, layer.head_norm, layer.head_eps)
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            keys, kept = column.update(qk[:, heads:, None], values)
            # the queries of a key head as if they were positions: one task for all of them
            attended = scaled_dot_product_attention(
                qk[:, :heads].view(groups), keys, kept, attn_mask=bias, scale=layer.scale
            )
            x = _added(x, attended.reshape(rows, -1), *layer.outward)
            h = _norm(x, layer.mlp_norm, layer.mlp_eps)
            gate = layer.activation(_product(h, *layer.gate))
            x = _added(x, gate.mul_(_product(h, *layer.up)), *layer.down)
        return self._core.get_output_embeddings()(model.norm(x))


class _NotPlain(Exception):
    """A layer computes more than a product with its weight."""


def _weights(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
    inward = [_linear(getattr(attention, f"{name}_proj")) for name in "qkv"]
    head_norm, head_eps = None, torch.zeros(())
    if hasattr(attention, "q_norm"):
        weights = [getattr(attention, f"{name}_norm") for name in "qk"]
        head_eps = _eps(weights[0])
        head_norm = torch.cat(
            [
                module.weight.expand(weight.shape[1] // attention.head_dim, -1)
                for module, (weight, _) in zip(weights, inward, strict=False)
            ]
        )
    return _Layer(
        norm=norm.weight,
        eps=_eps(norm),
        inward=inward,
        head_norm=head_norm,
        head_eps=head_eps,
        scale=attention.scaling,
        outward=_linear(attention.o_proj),
        mlp_norm=mlp_norm.weight,
        mlp_eps=_eps(mlp_norm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=mlp.act_fn,
    )


def _eps(norm: Any) -> Tensor:
    return torch.tensor(norm.variance_epsilon, dtype=norm.weight.dtype)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight, transposed, and the bias of a linear layer."""
    if hasattr(module, "base_layer") and module.disable_adapters:
        module = module.base_layer
    if type(module) is not torch.nn.Linear or is_quantized(module.weight):
        raise _NotPlain
    return module.weight.t(), module.bias


def _norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """weight * x / rms(x) over the last dimension."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + y @ weight + bias."""
    x = torch.addmm(x, y, weight)
    return x if bias is None else x.add_(bias)
