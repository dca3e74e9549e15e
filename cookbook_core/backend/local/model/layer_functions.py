"""The two functions of a Llama-like decoder layer around its attention, with their backward.

Each makes the weights of its products anew, W + scale * B A, times the weights of the norm before
it: a hundredth of the work of a product with 2,000 tokens, and what is left of a norm or a LoRA
layer is one pass over its input, forward and backward. Kept for the backward are the layer's input,
queries and keys before their norms, the sum after attention, and gate and up (attention keeps
queries, keys, values and its output); all else is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


class Linear(NamedTuple):
    """A frozen linear layer, `(out, in)`, with LoRA or without: A `(r, in)` and B `(out, r)`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0


class Norm(NamedTuple):
    """A frozen RMS norm: its weight, and what is added to the mean square."""

    weight: Tensor
    eps: float


# ---- products -----------------------------------------------------------------------------------


def _merged(linears: Sequence[Linear], norm: Tensor | None = None) -> Tensor:
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


def _product(x: Tensor, weight: Tensor, linears: Sequence[Linear]) -> Tensor:
    y = torch.mm(x, weight.t())
    for part, linear in zip(y.split([len(own.weight) for own in linears], 1), linears, strict=True):
        if linear.bias is not None:
            part.add_(linear.bias)
    return y


def _factor_grads(
    linears: Sequence[Linear], x: Tensor, grads: Sequence[Tensor], norm: Tensor | None = None
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


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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


class Inward(torch.autograd.Function):
    """x `(..., d)` -> x, queries, keys and values `(..., heads, head_dim)`, ready for attention.

    x is passed through so that its two gradients are one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Norm,
        linears: Sequence[Linear],
        head_norm: Norm | None,
        cos: Tensor,
        sin: Tensor,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Compute x, q, k and v.

        Args:
            ctx: autograd's.
            x: `(B, N, d)`.
            norm: before the projections.
            linears: of queries, keys, values; their A and B are the last arguments too.
            head_norm: of queries and keys, `(heads + key heads, head_dim)`.
            cos: `(B or 1, N, 1, head_dim)`.
            sin: like cos.
        """
        width, lead = cos.shape[-1], x.shape[:-1]
        normal, scale = normalized(x.flatten(0, -2), norm.eps)
        weight = _merged(linears, norm.weight)
        turning = len(weight) - len(linears[2].weight)
        qk = _product(normal, weight[:turning], linears[:2]).view(*lead, -1, width)
        v = _product(normal, weight[turning:], linears[2:]).view(*lead, -1, width)
        before = head_scale = None
        if head_norm is not None:
            before = qk
            qk, head_scale = normalized(qk, head_norm.eps)
            qk.mul_(head_norm.weight)
        turned = _turned(qk, cos, sin, torch.empty_like(qk), 1)
        ctx.save_for_backward(x, scale, before, head_scale, cos, sin)
        ctx.norm, ctx.linears, ctx.head_norm = norm, linears, head_norm
        q, k = turned.split([len(own.weight) // width for own in linears[:2]], -2)
        return x, q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, and of A and B."""
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
            # in place: only `Outward` reads x after this function, and its gradient is its own
            x_grad = grads[0].view_as(n_grad).addcmul_(_norm_grad(n_grad, normal), scale)
            x_grad = x_grad.view_as(x)
        return x_grad, None, None, None, None, None, *factors


class Outward(torch.autograd.Function):
    """x `(..., d)` and attended `(..., heads, head_dim)` -> the layer's output `(..., d)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, norm: Norm, linears: Sequence[Linear],
        *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Compute the output.

        Args:
            ctx: autograd's.
            x: `(B, N, d)`, of `Inward`.
            attended: `(B, N, heads, head_dim)`.
            norm: before gate and up.
            linears: of the attention's output, gate, up, down; their A and B are the last
                arguments too.
        """
        outward, inner, down = linears[:1], linears[1:3], linears[3:]
        y = _added(x.flatten(0, -2), attended.view(-1, outward[0].weight.shape[1]), outward)
        normal, scale = normalized(y, norm.eps)
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
        """Gradients of x, of attended, and of A and B."""
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


def _added(x: Tensor, y: Tensor, linears: Sequence[Linear]) -> Tensor:
    """x plus a linear layer's output for y."""
    total = torch.addmm(x, y, _merged(linears).t())
    return total if linears[0].bias is None else total.add_(linears[0].bias)
