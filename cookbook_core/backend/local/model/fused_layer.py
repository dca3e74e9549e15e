"""A Llama-like model's decoder layer in few operations, with the backward written out.

Around the attention call a layer is two functions. Each makes the weights of its products anew,
W + scale * B A, times the weights of the norm before it: a hundredth of the work of a product with
2,000 tokens, and what is left of a norm or a LoRA layer is one pass over its input, forward and
backward. Kept for the backward are the layer's input, queries and keys before their norms, what
attention keeps, the sum after attention, and gate and up; all else is computed again.

Used on the CPU in float32 for the classes below where the layer gives the model's own values and
gradients, to rounding, on random numbers; with one adapter or none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from cookbook_core.backend.local.model.quantization import is_quantized

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of transformers: others of the same structure may depend on the position in other ways."""
TOLERANCE = 1e-3
"""Largest relative L2 error of a value or gradient; a wrong formula gives more than 0.01."""


class _Linear(NamedTuple):
    """A frozen linear layer, `(out, in)`, with LoRA or without: A `(r, in)` and B `(out, r)`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


class _NotPlain(Exception):
    """A layer computes something else than its fused form."""


# ---- products -----------------------------------------------------------------------------------


def _merged(linears: Sequence[_Linear], norm: Tensor | None = None) -> Tensor:
    """Weights of layers with one input, LoRA and the norm's weight `(in,)` in them: `(out, in)`.

    Where B is zero they are the bits that they are without LoRA.
    """
    sizes = [len(linear.weight) for linear in linears]
    weight = linears[0].weight.new_empty(sum(sizes), linears[0].weight.shape[1])
    for rows, linear in zip(weight.split(sizes), linears, strict=True):
        if linear.a is None or linear.b is None:
            rows.copy_(linear.weight)
        else:
            torch.addmm(linear.weight, linear.b, linear.a, alpha=linear.scale, out=rows)
    return weight if norm is None else weight.mul_(norm)


def _product(x: Tensor, weight: Tensor, linears: Sequence[_Linear]) -> Tensor:
    y = torch.mm(x, weight.t())
    for part, linear in zip(y.split([len(own.weight) for own in linears], 1), linears, strict=True):
        if linear.bias is not None:
            part.add_(linear.bias)
    return y


def _factor_grads(
    linears: Sequence[_Linear], x: Tensor, grads: Sequence[Tensor], norm: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of the layers' A and B, in turn.

    Args:
        linears: layers with one input, norm * x.
        x: `(T, in)`.
        grads: of their outputs, `(T, out)` each.
        norm: `(in,)`; None: ones.
    """
    found: list[Tensor | None] = [None, None] * len(linears)
    trained = [
        (n, own.a, own.b)
        for n, own in enumerate(linears)
        if own.a is not None and own.b is not None
    ]
    if not trained:
        return found
    a = torch.cat([a for _, a, _ in trained])
    low = torch.mm(x, (a if norm is None else a * norm).t())
    low_grad, ranks = torch.empty_like(low), [len(a) for _, a, _ in trained]
    parts = zip(trained, low.split(ranks, 1), low_grad.split(ranks, 1), strict=True)
    for (n, _, b), own, own_grad in parts:
        torch.mm(grads[n], b, out=own_grad)
        # (with the rank as rows: the other way round the product takes a third longer)
        found[2 * n + 1] = torch.mm(own.t(), grads[n]).mul_(linears[n].scale).t().contiguous()
    a_grad = torch.mm(low_grad.t(), x)
    if norm is not None:
        a_grad.mul_(norm)
    for (n, _, _), own in zip(trained, a_grad.split(ranks), strict=True):
        found[2 * n] = own.mul_(linears[n].scale)
    return found


# ---- norms and positions ------------------------------------------------------------------------


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) over the last dimension, and 1 / rms(x)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


def _norm_grad(grad: Tensor, normal: Tensor) -> Tensor:
    """Of x / rms(x), less the factor 1 / rms(x); in place. d normal = (1 - n n^T / d) dx / rms."""
    along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(-normal.shape[-1])
    return grad.addcmul_(normal, along)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: int) -> Tensor:
    """Rotary positions: x * cos + sign * rotate_half(x) * sin, for sign -1 its transpose."""
    torch.mul(x, cos, out=out)
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    s1, s2 = sin.chunk(2, -1)
    if sign < 0:
        s1, s2 = s2, s1
    y1.addcmul_(x2, s1, value=-sign)
    y2.addcmul_(x1, s2, value=sign)
    return out


# ---- the two functions of a layer ---------------------------------------------------------------


class _Inward(torch.autograd.Function):
    """x `(..., d)` -> x, queries, keys and values `(..., heads, head_dim)`, ready for attention.

    x is passed through so that its two gradients are one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: _Norm,
        linears: Sequence[_Linear],
        head_norm: _Norm | None,
        cos: Tensor,
        sin: Tensor,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        width, lead = cos.shape[-1], x.shape[:-1]
        normal, scale = _normalized(x.flatten(0, -2), norm.eps)
        weight = _merged(linears, norm.weight)
        turning = len(weight) - len(linears[2].weight)
        qk = _product(normal, weight[:turning], linears[:2]).view(*lead, -1, width)
        v = _product(normal, weight[turning:], linears[2:]).view(*lead, -1, width)
        before = head_scale = None
        if head_norm is not None:
            before = qk
            qk, head_scale = _normalized(qk, head_norm.eps)
            qk.mul_(head_norm.weight)
        turned = _turned(qk, cos, sin, torch.empty_like(qk), 1)
        ctx.save_for_backward(x, scale, before, head_scale, cos, sin)
        ctx.norm, ctx.linears, ctx.head_norm = norm, linears, head_norm
        q, k = turned.split([len(own.weight) // width for own in linears[:2]], -2)
        return x, q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, before, head_scale, cos, sin = ctx.saved_tensors
        linears, width = ctx.linears, cos.shape[-1]
        sizes = [len(own.weight) for own in linears]
        heads = [size // width for size in sizes[:2]]
        g = x.new_empty(*x.shape[:-1], sum(heads), width)
        for own, grad in zip(g.split(heads, -2), grads[1:3], strict=True):
            _turned(grad, cos, sin, own, -1)
        if before is not None:
            _norm_grad(g.mul_(ctx.head_norm.weight), before * head_scale).mul_(head_scale)
        g, v_grad = g.view(-1, sum(sizes[:2])), grads[3].reshape(-1, sizes[2])
        normal = x.flatten(0, -2) * scale
        each = [*g.split(sizes[:2], 1), v_grad]
        factors = _factor_grads(linears, normal, each, ctx.norm.weight)
        x_grad = None
        if ctx.needs_input_grad[0]:
            weight = _merged(linears, ctx.norm.weight)
            n_grad = torch.mm(g, weight[: sum(sizes[:2])])
            n_grad.addmm_(v_grad, weight[sum(sizes[:2]) :])
            # in place: only `_Outward` reads x after this function, and its gradient is its own
            x_grad = grads[0].view_as(n_grad).addcmul_(_norm_grad(n_grad, normal), scale)
            x_grad = x_grad.view_as(x)
        return x_grad, None, None, None, None, None, *factors


class _Outward(torch.autograd.Function):
    """x `(..., d)` and attended `(..., heads, head_dim)` -> the layer's output `(..., d)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, norm: _Norm, linears: Sequence[_Linear],
        *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        outward, inner, down = linears[:1], linears[1:3], linears[3:]
        y = _added(x.flatten(0, -2), attended.view(-1, outward[0].weight.shape[1]), outward)
        normal, scale = _normalized(y, norm.eps)
        weight = _merged(inner, norm.weight)
        gate, up = (
            _product(normal, own, [linear])
            for own, linear in zip(weight.chunk(2), inner, strict=True)
        )
        result = _added(y, silu(gate).mul_(up), down)
        ctx.save_for_backward(attended, y, scale, gate, up)
        ctx.norm, ctx.linears = norm, linears
        return result.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        attended, y, scale, gate, up = ctx.saved_tensors
        outward, inner, down = ctx.linears[:1], ctx.linears[1:3], ctx.linears[3:]
        g, flat = grads[0].flatten(0, -2), attended.view(len(y), -1)
        act, h_grad = silu(gate), torch.mm(g, _merged(down))
        up_grad = act * h_grad
        down_grads = _factor_grads(down, act.mul_(up), [g])
        del act
        gate_grad = h_grad.mul_(up)
        torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
        normal = y * scale
        inner_grads = _factor_grads(inner, normal, [gate_grad, up_grad], ctx.norm.weight)
        weight = _merged(inner, ctx.norm.weight).chunk(2)
        n_grad = torch.mm(gate_grad, weight[0]).addmm_(up_grad, weight[1])
        y_grad = torch.addcmul(g, _norm_grad(n_grad, normal), scale)
        outward_grads = _factor_grads(outward, flat, [y_grad])
        a_grad = torch.mm(y_grad, _merged(outward)).view_as(attended)
        factors = *outward_grads, *inner_grads, *down_grads
        return y_grad.view_as(grads[0]), a_grad, None, None, *factors


def _added(x: Tensor, y: Tensor, linears: Sequence[_Linear]) -> Tensor:
    """x plus a linear layer's output for y."""
    total = torch.addmm(x, y, _merged(linears).t())
    return total if linears[0].bias is None else total.add_(linears[0].bias)


# ---- a layer ------------------------------------------------------------------------------------


def _linear(module: Any) -> _Linear:
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
    return _Linear(module.weight, module.bias, a, b, scale)


def _is_plain_lora(module: Any, name: str) -> bool:
    """Whether `fused_lora` has taken the layer: a plain linear one without dropout or bias."""
    return bool(getattr(module.lora_variant.get(name), "factors", ()))


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _head_norm(attention: Any, linears: Sequence[_Linear]) -> _Norm | None:
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
    return _Norm(torch.cat(weights), norms[0].variance_epsilon)


def _linears(module: Any, *names: str) -> list[_Linear]:
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
    x, *qkv = _Inward.apply(x, norm, inward, head_norm, cos, sin, *factors)
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
    return _Outward.apply(x, attended.contiguous(), norm, outward, *factors)


def _factors(linears: Sequence[_Linear]) -> Iterator[Tensor | None]:
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
    if usable and all(_same(model, layer) for layer in model.model.layers):
        for layer in model.model.layers:
            layer.__class__ = _fused_class(type(layer))


def check_slot(model: Any, params: Collection[torch.nn.Parameter]) -> None:
    """Give a model's layers their own forward back unless its gradients are those of a slot.

    Args:
        model: with the slot's layers, which are active.
        params: of the slot; they get other values and their own back.
    """
    fused = [m for m in model.modules() if getattr(m, "few_operations", False)]
    trained = [m for m in fused if any(p is own for p in params for own in m.parameters())]
    if not trained:
        return
    generator, kept = torch.Generator().manual_seed(0), [p.data for p in params]
    for p in params:  # B is zero at first, and so would the gradient of A be
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[1] ** 0.5
    same = _same(model, trained[0])  # the others have the same classes
    for p, data in zip(params, kept, strict=True):
        p.data = data
    if not same:
        for layer in fused:
            layer.__class__ = type(layer).__base__


def _same(model: Any, layer: Any) -> bool:
    """Whether a layer gives the values and gradients of its own forward on random numbers."""
    generator, tokens = torch.Generator().manual_seed(0), 12
    width, params = model.config.hidden_size, [p for p in layer.parameters() if p.requires_grad]
    x, grad = torch.randn(2, 2, tokens // 2, width, generator=generator, dtype=model.dtype)
    own = type(layer).__base__ if getattr(layer, "few_operations", False) else type(layer)
    results = []
    try:
        position = model.model.rotary_emb(x, 5 + torch.arange(tokens // 2)[None])
        for forward in (own.forward, _computed):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                y = forward(layer, leaf, attention_mask=None, position_embeddings=position)
                results.append([y, *torch.autograd.grad(y, [leaf, *params], grad)])
    except (_NotPlain, RuntimeError, TypeError, AttributeError):
        return False
    pairs = zip(*results, strict=True)
    return all(bool((b - a).norm() <= TOLERANCE * a.norm()) for a, b in pairs)
