"""A Llama-like model's decoder layer in few operations, forward and backward.

Used on the CPU in float32 for the classes below where the layer gives the model's own values and
gradients, to rounding, on random numbers, and computes with one plain adapter or none;
`layer_functions` says how. A policy whose B are zero gives the bits of its reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

from cookbook_core.backend.local.model.layer_functions import Inward, Linear, Norm, Outward
from cookbook_core.backend.local.model.memory import MICRO_BATCH_TOKENS
from cookbook_core.backend.local.model.quantization import is_quantized

import torch
from torch import Tensor

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of transformers: others of the same structure may depend on the position in other ways."""
TOLERANCE = 1e-3
"""Largest relative L2 error of a value or gradient; a wrong formula gives more than 0.01."""


class _NotPlain(Exception):
    """A layer computes something else than its fused form."""


# ---- a layer ------------------------------------------------------------------------------------


def _linear(module: Any) -> Linear:
    """A linear layer as it is now, with its active adapter.

    Raises:
        _NotPlain: it computes something else, or is trained by other means.
    """
    a = b = None
    scale = 0.0
    if hasattr(module, "base_layer"):
        names = [name for name in module.active_adapters if name in module.lora_A]
        if names and not module.disable_adapters:
            if len(names) > 1 or module.merged or not _is_plain_lora(module, names[0]):
                raise _NotPlain
            a, b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
            scale = module.scaling[names[0]]
        module = module.base_layer
    if type(module) is not torch.nn.Linear or is_quantized(module.weight):
        raise _NotPlain
    if module.weight.requires_grad or (a is not None and a.dtype != module.weight.dtype):
        raise _NotPlain
    return Linear(module.weight, module.bias, a, b, scale)


def _is_plain_lora(module: Any, name: str) -> bool:
    """Whether `fused_lora` has taken the layer: a plain linear one without dropout or bias."""
    return bool(getattr(module.lora_variant.get(name), "factors", ()))


def _norm(module: Any) -> Norm:
    if module.weight.requires_grad:
        raise _NotPlain
    return Norm(module.weight, module.variance_epsilon)


def _head_norm(attention: Any, linears: Sequence[Linear]) -> Norm | None:
    """Norms of queries and keys as one, weight `(heads + key heads, head_dim)`."""
    if not hasattr(attention, "q_norm"):
        return None
    norms = [attention.q_norm, attention.k_norm]
    if norms[0].variance_epsilon != norms[1].variance_epsilon:
        raise _NotPlain
    weights = [
        norm.weight.expand(len(linear.weight) // attention.head_dim, -1)
        for norm, linear in zip(norms, linears, strict=False)
    ]
    return Norm(torch.cat(weights), norms[0].variance_epsilon)


def _linears(module: Any, *names: str) -> list[Linear]:
    return [_linear(getattr(module, f"{name}_proj")) for name in names]


def _computed(
    layer: Any,
    x: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """Compute a layer.

    Args:
        layer: of a model of CLASSES.
        x: `(B, N, d)`.
        attention_mask: for the attention kernel.
        position_embeddings: cosines and sines, `(B or 1, N, head_dim)` each.
        kwargs: more for the attention kernel.
    Raises:
        _NotPlain: it has to be computed by its own forward; nothing was computed.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention, mlp = layer.self_attn, layer.mlp
    attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if attend is None or position_embeddings[0].shape[-1] != attention.head_dim:
        raise _NotPlain
    inward = _linears(attention, "q", "k", "v")
    outward = [*_linears(attention, "o"), *_linears(mlp, "gate", "up", "down")]
    head_norm = _head_norm(attention, inward)
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = attention.config.sliding_window
    cos, sin = (part.unsqueeze(2) for part in position_embeddings)
    norm, factors = _norm(layer.input_layernorm), _factors(inward)
    x, *qkv = Inward.apply(x, norm, inward, head_norm, cos, sin, *factors)
    attended, _ = attend(
        attention,
        *(part.transpose(1, 2) for part in qkv),
        attention_mask,
        dropout=0.0,
        scaling=attention.scaling,
        sliding_window=window,
        **kwargs,
    )
    norm, factors = _norm(layer.post_attention_layernorm), _factors(outward)
    return Outward.apply(x, attended.contiguous(), norm, outward, *factors)


def _factors(linears: Sequence[Linear]) -> Iterator[Tensor | None]:
    """A and B of each layer in turn."""
    for linear in linears:
        yield from (linear.a, linear.b)


@functools.cache
def _fused_class(kind: type[Any]) -> type[Any]:
    """A subclass of a decoder layer's class, to which transformers adds its checkpointing."""

    class Fused(kind):
        few_operations = True

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = False,
            position_embeddings: Any = None,
            **kwargs: Any,
        ) -> Any:
            kwargs["position_ids"] = position_ids
            *lead, width = hidden_states.shape
            # for fewer tokens making the weights takes longer than it saves
            if past_key_values is None and math.prod(lead) >= width:
                arguments = hidden_states, attention_mask, position_embeddings
                with suppress(_NotPlain):
                    return _computed(self, *arguments, **kwargs)
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )

    Fused.__name__, Fused.__qualname__ = kind.__name__, kind.__qualname__
    return Fused


# ---- asked first --------------------------------------------------------------------------------


def fuse(model: Any) -> None:
    """Make a model's layers compute in few operations, if that gives their values and gradients.

    Args:
        model: just loaded, without adapters.
    """
    known = type(model).__name__ in CLASSES and type(model).__module__.startswith("transformers.")
    usable = known and model.device.type == "cpu" and model.dtype == torch.float32
    # (a wider one would hardly ever see a row of as many tokens as it is wide)
    if not usable or 2 * model.config.hidden_size > MICRO_BATCH_TOKENS["cpu"]:
        return
    with suppress(_NotPlain):
        if all(_same(model, layer) for layer in model.model.layers):
            for layer in model.model.layers:
                layer.__class__ = _fused_class(type(layer))


def check_slot(model: Any, params: Collection[torch.nn.Parameter]) -> None:
    """Give a model's layers their own forward back if a slot's gradients are not those of it.

    Layers with a slot that is not plain take it in any case.

    Args:
        model: with the slot's layers, which are active.
        params: of the slot; they get other values and their own back.
    """
    fused = [m for m in model.modules() if getattr(m, "few_operations", False)]
    own = set(params)
    trained = [layer for layer in fused if not own.isdisjoint(layer.parameters())]
    if not trained:
        return
    generator, kept = torch.Generator().manual_seed(0), [p.data for p in params]
    for p in params:  # B is zero at first, and so would the gradient of A be
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5
    try:
        same = _same(model, trained[0])  # the others have the same classes
    except _NotPlain:
        return
    finally:
        for p, data in zip(params, kept, strict=True):
            p.data = data
    if not same:
        for layer in fused:
            layer.__class__ = type(layer).__base__


def _same(model: Any, layer: Any) -> bool:
    """Whether a layer gives the values and gradients of its own forward on random numbers.

    Raises:
        _NotPlain: it takes its own forward.
    """
    generator, tokens = torch.Generator().manual_seed(0), 12
    width, params = model.config.hidden_size, [p for p in layer.parameters() if p.requires_grad]
    x, grad = torch.randn(2, 2, tokens // 2, width, generator=generator, dtype=model.dtype)
    own: Any = type(layer).__base__ if getattr(layer, "few_operations", False) else type(layer)
    results = []
    try:
        position = model.model.rotary_emb(x, 5 + torch.arange(tokens // 2)[None])
        for forward in (own.forward, _computed):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                y = forward(layer, leaf, attention_mask=None, position_embeddings=position)
                results.append([y, *torch.autograd.grad(y, [leaf, *params], grad)])
    except _NotPlain:
        raise
    except Exception:  # whatever it is, they are not the same
        return False
    pairs = zip(*results, strict=True)
    return all(bool((b - a).norm() <= TOLERANCE * a.norm()) for a, b in pairs)
