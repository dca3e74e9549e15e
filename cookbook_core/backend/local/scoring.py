"""The one path from datums to logprobs: policy, reference and evaluation all come through here.

Datums are sorted by length and run in right-padded micro-batches. Under a causal mask a real token
never sees the padding after it, so no attention mask is needed, positions start at 0 in every row,
and padded rows are simply not read. The batches are a function of the lengths alone: the same data
scored by two adapters meets the same kernels in the same shapes, so equal adapters give equal
bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cookbook_core.backend.local.linear_logprobs import Head, find_head, target_logprobs, wide
from cookbook_core.tinker.types import Datum

MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Padded tokens per forward: enough to fill the device, few enough to keep padding small."""


class Scorer:
    """Logprobs of target tokens under whatever adapter is active in `model`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.backbone = getattr(model, model.base_model_prefix, model)
        self.head: Head | None = find_head(model)
        self.micro_batch_tokens = MICRO_BATCH_TOKENS.get(device.type, 4096)

    def score(self, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Logprobs of every datum's target_tokens, in order.

        Args:
            data: D checked datums with target_tokens `(N,)` or `(N, K)`.
        Returns:
            D tensors on the device, nats, shape of target_tokens, float32 or better; they carry
            the graph when gradients are enabled.
        """
        logprobs: list[torch.Tensor | None] = [None] * len(data)
        for indices in self.micro_batches(data):
            scored = self._score_batch([data[i] for i in indices])
            for i, lp in zip(indices, scored, strict=True):
                logprobs[i] = lp
        return [lp for lp in logprobs if lp is not None]

    def hidden_states(self, data: Sequence[Datum]) -> list[torch.Tensor]:
        """What `vocab_logprobs` takes, of every datum in order: D tensors `(N, width)`.

        The last hidden states; logits, `width` = V, where the head is not a plain one.
        """
        states: list[torch.Tensor] = [torch.empty(0)] * len(data)
        for indices in self.micro_batches(data):
            batch = self._states([data[i] for i in indices])
            for i, row in zip(indices, batch, strict=True):
                states[i] = row[: data[i].model_input.length]
        return states

    def vocab_logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(R, width)` of `hidden_states` -> log p of every token `(R, V)`, nats, by autograd."""
        if self.head is None:
            return torch.log_softmax(wide(hidden), dim=-1)
        return torch.log_softmax(self.head.finish(wide(self.head.module(hidden))), dim=-1)

    def padded_tokens(self, data: Sequence[Datum]) -> int:
        """Tokens that go through the model, padding included."""
        longest_first = ((b, data[b[0]].model_input.length) for b in self.micro_batches(data))
        return sum(len(batch) * longest for batch, longest in longest_first)

    def micro_batches(self, data: Sequence[Datum]) -> Iterator[list[int]]:
        """Indices of `data`, longest first, cut where padded tokens would exceed the budget."""
        lengths = [datum.model_input.length for datum in data]
        batch: list[int] = []
        for i in sorted(range(len(data)), key=lambda i: (-lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.micro_batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _states(self, data: Sequence[Datum]) -> torch.Tensor:
        """`(B, longest, width)`: hidden states, or logits where the head is not a plain one."""
        ids = [datum.model_input.to_ints() for datum in data]
        longest = max(map(len, ids))
        # any id will do; a row's own last token keeps transformers from warning of a missing mask
        padded = torch.tensor([row + row[-1:] * (longest - len(row)) for row in ids])
        inputs = {
            "input_ids": padded.to(self.device),
            "use_cache": False,
        }
        if self.head is None:
            return self.model(**inputs).logits
        return self.backbone(**inputs).last_hidden_state

    def _score_batch(self, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Logprobs of the targets of one micro-batch; datums of equal K go together."""
        states = self._states(data)
        longest = states.shape[1]
        targets = [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data]
        flat = states.flatten(0, 1)
        out: list[torch.Tensor] = [flat.new_empty(0)] * len(data)
        for k in sorted({t[:1].numel() for t in targets}):
            members = [i for i, t in enumerate(targets) if t[:1].numel() == k]
            at = torch.cat([torch.arange(len(targets[i])) + i * longest for i in members])
            wanted = torch.cat([targets[i].reshape(-1, k) for i in members]).to(self.device)
            rows = flat.index_select(0, at.to(self.device))
            if self.head is None:
                logits = wide(rows)
                found = logits.gather(1, wanted) - logits.logsumexp(1, keepdim=True)
            else:
                found = target_logprobs(self.head, rows, wanted)
            pieces = found.split([len(targets[i]) for i in members])
            for i, piece in zip(members, pieces, strict=True):
                out[i] = piece.reshape(targets[i].shape)
        return out
