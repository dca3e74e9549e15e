"""Whether packed rows give a model's own results: asked of the model itself, with a gradient.

Its layers may do what a layout cannot express (state-space layers, position biases, attention of
their own), and the kernel for packed rows may not compile for the device, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.scoring.micro_batches import MicroBatch
from cookbook_core.backend.local.scoring.packing import MIN_SHARED

import torch

BOUNDS = {torch.bfloat16: (0.05, 0.15), torch.float16: (0.05, 0.15)}
"""Of hidden states and of gradients, the largest root mean square of the difference, as a share of
that of the values. Rounding gives up to 0.032 and 0.058 in 36 layers; a wrong mask 0.3 and more."""
STRICT = (1e-4, 1e-4)
"""The same for wider dtypes, where rounding gives 4e-6."""
SHORT, LONG = (MIN_SHARED, 2, 1, 3), (100, 60, 90, 150)
"""Tokens of a prefix, of two sequences after it and of another sequence. The long ones fill more
than two of the blocks of 128 tokens in which accelerators compute attention: other kernels than
one block does."""


def probe_sequences(model: Any, device: torch.device) -> list[list[int]]:
    """Token ids of three sequences, two of which share a prefix."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONG[0]
    lengths = SHORT if device.type == "cpu" or limit < LONG[0] + LONG[2] else LONG
    vocab = model.get_input_embeddings().weight.shape[0]
    stem, *own = ([(5 * i + n) % vocab for i in range(m)] for n, m in enumerate(lengths))
    return [stem + own[0], stem + own[1], own[2]]


def packing_problem(scorer: Any, packed: MicroBatch, padded: MicroBatch) -> str:
    """What speaks against packing the same datums, scored by a `Scorer`; "" if nothing does.

    Compares hidden states, and the gradient of their projection on random directions with respect
    to the embedded tokens: of a shared token, the sum over its sequences.
    """
    try:
        states, gradient = _states_and_gradient(scorer, packed, packed)
        own_states, own_gradient = _states_and_gradient(scorer, padded, packed)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    ratios = rms_ratio(states, own_states), rms_ratio(gradient, own_gradient)
    bounds = BOUNDS.get(states.dtype, STRICT)
    for name, ratio, bound in zip(("hidden states", "gradients"), ratios, bounds, strict=True):
        if not ratio <= bound:
            return f"{name} differ by {ratio:.1e} of their size"
    return ""


def rms_ratio(found: torch.Tensor, want: torch.Tensor) -> float:
    """|found - want| / |want|, root mean squares of tensors of one shape."""
    difference = (found.double() - want.double()).norm()
    return float(difference / want.double().norm())


def _states_and_gradient(
    scorer: Any, batch: MicroBatch, packed: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of all datums, concatenated, and the gradient for each token of the packed row.

    On the CPU: its kernels exist for every dtype.
    """
    with torch.enable_grad(), _embedded_as_leaves(scorer.model) as leaves:
        hidden = scorer.hidden_batch(batch)
    each = scorer.hidden_of_data(batch, hidden)
    generator = torch.Generator().manual_seed(0)
    by_index = {
        i: torch.randn(x.shape, generator=generator).to(x)
        for i, x in sorted(zip(batch.indices, each, strict=True), key=lambda pair: pair[0])
    }
    cotangent = scorer.hidden_cotangent(batch, [by_index[i] for i in batch.indices])
    (gradient,) = torch.autograd.grad(hidden, leaves[0], cotangent)
    gradient = gradient.flatten(0, -2).cpu().double()
    if batch is not packed:
        rows, apart = dict(zip(packed.indices, packed.rows, strict=True)), gradient
        gradient = apart.new_zeros(packed.tokens, apart.shape[-1])
        for i, own in zip(batch.indices, batch.rows, strict=True):
            gradient.index_add_(0, rows[i], apart[own])
    states = dict(zip(batch.indices, each, strict=True))
    return torch.cat([states[i] for i in sorted(states)]).cpu(), gradient


@contextmanager
def _embedded_as_leaves(model: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, the embedded tokens of each forward become leaves of its graph, and are listed."""
    leaves: list[torch.Tensor] = []

    def cut(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        del module, args
        leaves.append(out.detach().requires_grad_(True))
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
