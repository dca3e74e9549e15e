"""The one path from datums to logprobs, for policy, reference and evaluation alike.

Datums run in micro-batches: packed into one row without padding, shared prefixes computed once
(`packing`), where the architecture allows it; otherwise sorted by length in right-padded rows.
Under a causal mask a real token never sees the padding after it, so padded rows need no attention
mask, positions start at 0 in every row, and the outputs at padding are ignored. Micro-batches are a
function of the tokens alone: two adapters that score the same data run the same kernels on the same
shapes, so equal adapters give equal bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cookbook_core.backend.local.scoring import attention, packing
from cookbook_core.backend.local.scoring.target_logprobs import (
    Head,
    at_least_float32,
    find_head,
    target_logprobs,
)
from cookbook_core.datums import SCORE_MASK
from cookbook_core.types import Datum, ModelInput

MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens per forward, padding included: enough to use the device fully."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """Datums that go through the model together.

    indices: of the datums in the batch they were taken from.
    tokens: number of tokens that go through the model, padding included.
    inputs: the model's keyword arguments.
    rows: of each datum `(N,)`: the index of its positions among the states, rows concatenated.
    """

    indices: list[int]
    data: list[Datum]
    tokens: int
    inputs: dict[str, Any]
    rows: list[torch.Tensor]


class Scorer:
    """Logprobs of target tokens under whatever adapter is active in `model`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.backbone = getattr(model, model.base_model_prefix, model)
        self.head: Head | None = find_head(model)
        self.micro_batch_tokens = MICRO_BATCH_TOKENS.get(device.type, 4096)
        self._switchable = _switchable(model)
        self.packs = self._packing_is_exact()

    def score(
        self, data: Sequence[Datum], micro_batch_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """Logprobs of every datum's target_tokens, in order.

        Args:
            data: D checked datums with target_tokens `(N,)` or `(N, K)`. Where a datum has a
                "score_mask", positions at which that is 0 are not computed and read 0.0.
            micro_batch_tokens: most tokens of a forward; None takes the device's.
        Returns:
            D tensors on the device, nats, shape of target_tokens, float32 or better; they carry
            the graph when gradients are enabled.
        """
        batches = self.batches(data, micro_batch_tokens)
        return in_order((batch, self.score_batch(batch)) for batch in batches)

    def batches(
        self, data: Sequence[Datum], micro_batch_tokens: int | None = None
    ) -> list[MicroBatch]:
        """The micro-batches in which `data` goes through the model: a function of the tokens."""
        budget = micro_batch_tokens or self.micro_batch_tokens
        lists = [datum.model_input.to_ints() for datum in data]
        if self.packs:
            groups = packing.micro_batches(lists, budget)
            return [self._packed(data, lists, group) for group in groups]
        groups = _by_length(lists, budget)
        return [self._padded(data, lists, group) for group in groups]

    def score_batch(self, batch: MicroBatch) -> list[torch.Tensor]:
        """Compute the logprobs of one micro-batch's targets; datums of equal K go together.

        Returns:
            One tensor per datum, shape of its target_tokens, nats, on the device, with graph when
            gradients are enabled.
        """
        states = self._states(batch)
        targets = [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in batch.data]
        masks = [datum.loss_fn_inputs.get(SCORE_MASK) for datum in batch.data]
        positions = [None if m is None else m.to_torch().nonzero()[:, 0] for m in masks]
        out: list[torch.Tensor] = [states.new_empty(0)] * len(targets)
        for k in sorted({t[:1].numel() for t in targets}):
            members = [i for i, t in enumerate(targets) if t[:1].numel() == k]
            at = [_take(batch.rows[i], positions[i]) for i in members]
            wanted = [_take(targets[i], positions[i]).reshape(-1, k) for i in members]
            rows = states.index_select(0, torch.cat(at).to(self.device))
            logprobs = self._target_logprobs(rows, torch.cat(wanted).to(self.device))
            pieces = logprobs.split([len(w) for w in wanted])
            for i, piece in zip(members, pieces, strict=True):
                on = positions[i]
                if on is not None:
                    whole = piece.new_zeros(len(targets[i]), k)
                    piece = whole.index_put((on.to(self.device),), piece)
                out[i] = piece.reshape(targets[i].shape)
        return out

    def hidden_batch(self, batch: MicroBatch) -> list[torch.Tensor]:
        """Compute the input of `vocab_logprobs` for every datum of a micro-batch.

        Returns:
            One tensor per datum: last hidden states `(N, H)`, or logits `(N, V)` if find_head()
            returned None.
        """
        states = self._states(batch)
        return [states.index_select(0, rows.to(self.device)) for rows in batch.rows]

    def vocab_logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows `(R, H)` or `(R, V)` of `hidden_batch` -> log p of every token `(R, V)`, nats."""
        if self.head is None:
            return torch.log_softmax(at_least_float32(hidden), dim=-1)
        return torch.log_softmax(self.head.logits(hidden), dim=-1)

    def _target_logprobs(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return target_logprobs(self.head, rows, targets)
        logits = at_least_float32(rows)
        return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)

    def _states(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states `(rows, H)`, or logits `(rows, V)` if find_head() returned None."""
        with self.attention(packed="layout" in batch.inputs):
            if self.head is None:
                return self.model(**batch.inputs, use_cache=False).logits.flatten(0, 1)
            return self.backbone(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    # ---- micro-batches ---------------------------------------------------------------------------

    def _packed(
        self, data: Sequence[Datum], lists: Sequence[list[int]], indices: list[int]
    ) -> MicroBatch:
        layout = packing.lay_out([lists[i] for i in indices])
        inputs = {
            "input_ids": layout.tokens[None].to(self.device),
            "position_ids": layout.positions[None].to(self.device),
            "layout": layout,
        }
        chosen = [data[i] for i in indices]
        return MicroBatch(indices, chosen, len(layout.tokens), inputs, layout.rows)

    def _padded(
        self, data: Sequence[Datum], lists: Sequence[list[int]], indices: list[int]
    ) -> MicroBatch:
        longest = max(len(lists[i]) for i in indices)
        # any id is right; a row's own last token avoids transformers' warning of a missing mask
        ids = [lists[i] + lists[i][-1:] * (longest - len(lists[i])) for i in indices]
        rows = [torch.arange(len(lists[i])) + n * longest for n, i in enumerate(indices)]
        inputs = {"input_ids": torch.tensor(ids).to(self.device)}
        chosen = [data[i] for i in indices]
        return MicroBatch(indices, chosen, len(indices) * longest, inputs, rows)

    # ---- packed attention ------------------------------------------------------------------------

    @contextmanager
    def attention(self, *, packed: bool) -> Iterator[None]:
        """Inside, the model uses our attention for packed rows, or its own; can be nested."""
        before = [config._attn_implementation for config, _ in self._switchable]
        for config, own in self._switchable:
            config._attn_implementation = attention.NAME if packed else own
        try:
            yield
        finally:
            for (config, _), name in zip(self._switchable, before, strict=True):
                config._attn_implementation = name

    def _packing_is_exact(self) -> bool:
        """Whether a packed row with a shared prefix gives this architecture's own hidden states.

        Checked on the model itself with a few tokens, as its layers may do what a layout cannot
        express (state-space layers, position biases, attention of their own).
        """
        if not self._switchable:
            return False
        vocab = self.model.get_input_embeddings().weight.shape[0]
        stem = [i % vocab for i in range(packing.MIN_SHARED)]
        lists = [[*stem, 3 % vocab, 1], [*stem, 2 % vocab], [1, 0, 2 % vocab]]
        data = [Datum(ModelInput.from_ints(ids)) for ids in lists]
        try:
            with torch.no_grad():
                packed = self.hidden_batch(self._packed(data, lists, [0, 1, 2]))
                alone = [self.hidden_batch(self._padded(data, lists, [i]))[0] for i in range(3)]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            bound = 3e-2 if alone[0].dtype == torch.bfloat16 else 1e-4
            size = max(float(a.abs().max()) for a in alone)
            worst = max(float((a - b).abs().max()) for a, b in zip(alone, packed, strict=True))
            if worst <= bound * size:
                return True
            reason = f"hidden states differ by {worst:.1e}"
        log.warning(
            "%s: sequences are scored in padded batches and shared prefixes recomputed, as packed "
            "rows do not give this architecture's own results (%s).",
            type(self.model).__name__,
            reason.splitlines()[0],
        )
        return False


def in_order(scored: Any) -> list[torch.Tensor]:
    """(batch, a tensor for each of its datums) pairs -> the tensors in the order of the data."""
    by_index = {i: t for batch, each in scored for i, t in zip(batch.indices, each, strict=True)}
    return [by_index[i] for i in range(len(by_index))]


def _take(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    return x if at is None else x[at]


def _by_length(lists: Sequence[list[int]], budget: int) -> Iterator[list[int]]:
    """Groups of indices, longest first, each within the budget of padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lists)), key=lambda i: (-len(lists[i]), i)):
        if batch and (len(batch) + 1) * len(lists[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _switchable(model: Any) -> list[tuple[Any, str]]:
    """(config, its own attention) for each config whose attention transformers can switch."""
    if not model._can_set_attn_implementation():
        return []
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [(config, config._attn_implementation) for config in configs.values()]
