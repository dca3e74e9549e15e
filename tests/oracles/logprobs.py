"""Slow and obvious: logprobs and gradients by plain autograd through a plain peft model.

Nothing here goes through the package's scoring, packing, chunking or surrogates: one datum at a
time, unpadded, all logits in memory. The last section is the one place where tests reach into a
client for what the API does not show: its adapter and its accumulated gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.tinker import Datum, TrainingClient

import peft
import torch
from transformers import AutoModelForCausalLM


def plain_model(
    folder: str, adapter: Any, dtype: torch.dtype = torch.float64, attention: str | None = None
) -> Any:
    """Load the base model anew and let peft put a copy of `adapter` on it."""
    more = {} if attention is None else {"attn_implementation": attention}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()
    if getattr(base.config, "attn_logit_softcapping", None):
        base.set_attn_implementation("eager")  # transformers' sdpa knows no cap
    model = peft.get_peft_model(base, adapter.slot.config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    tensors = {key: t.clone() for key, t in adapter.named().items()}
    loaded = peft.set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    return model


def slow_logprobs(model: Any, datum: Datum) -> torch.Tensor:
    """log_softmax(logits[t] / T)[target] in a loop over positions (and targets), `(N,)` or
    `(N, K)`; T is the datum's "temperature"."""
    ids = torch.tensor([datum.model_input.to_ints()])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    if "temperature" in datum.loss_fn_inputs:
        logits = logits / float(datum.loss_fn_inputs["temperature"].to_numpy())
    rows = []
    for t, target in enumerate(datum.loss_fn_inputs["target_tokens"].tolist()):
        row = torch.log_softmax(logits[t], dim=-1)
        if isinstance(target, list):
            rows.append(torch.stack([row[k] for k in target]))
        else:
            rows.append(row[target])
    return torch.stack(rows)


def slow_gradient(
    model: Any, data: Sequence[Datum], loss_fn: Callable[..., Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and d loss / d params by backward() through everything, by peft's keys."""
    model.zero_grad()
    loss, _ = loss_fn(list(data), [slow_logprobs(model, datum) for datum in data])
    loss.backward()
    grads = {
        name.replace(".default.", "."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return loss.item(), grads


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Per tensor: |found - expected| <= tolerance * |expected|; and no expected gradient is 0."""
    assert found.keys() == expected.keys()
    total = torch.stack([e.norm() for e in expected.values()]).norm()
    for key, want in expected.items():
        size = want.norm()
        assert size > 0, f"{key}: the expected gradient is zero, so this shows nothing"
        error = (found[key] - want).norm() / torch.maximum(size, 1e-3 * total)
        assert error <= tolerance, f"{key}: relative error {float(error):.2e} > {tolerance}"


# ---- inside a client ----------------------------------------------------------------------------


def adapter_of(client: TrainingClient) -> Any:
    """The client's adapter."""
    return client._backend._adapter


def engine_of(client: TrainingClient) -> Any:
    """The engine that serves the client."""
    return client._backend._backend.engine()


def randomize(client: TrainingClient, seed: int = 0, scale: float = 0.1) -> None:
    """Fill A and B with noise: with B = 0, as it starts, A has no gradient and errors hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_of(client).params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(scale * noise)


def take_gradient(client: TrainingClient) -> dict[str, torch.Tensor]:
    """The accumulated gradient by peft's keys; the client is left with none."""
    adapter = adapter_of(client)
    assert adapter.grads is not None, "no gradient was accumulated"
    grads = dict(zip(adapter.slot.params, adapter.grads, strict=True))
    adapter.grads = None
    return grads
