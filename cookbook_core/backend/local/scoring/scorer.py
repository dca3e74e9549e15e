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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cookbook_core.backend.local.model.memory import feature_bytes, micro_batch_tokens
from cookbook_core.backend.local.model.sharding import architecture, backbone
from cookbook_core.backend.local.model.vision import VisionTower, language_model, missing_support
from cookbook_core.backend.local.scoring import attention, packing
from cookbook_core.backend.local.scoring.image_check import (
    has_images,
    image_batch,
    probe_inputs,
    reading_problem,
)
from cookbook_core.backend.local.scoring.micro_batches import (
    MicroBatch,
    by_length,
    idle,
    packed,
    padded,
)
from cookbook_core.backend.local.scoring.packing_check import packing_problem, probe_sequences
from cookbook_core.backend.local.scoring.target_logprobs import (
    Head,
    Targets,
    at_least_float32,
    find_head,
    scaled,
    sum_by_row,
    target_logprobs,
)
from cookbook_core.errors import CookbookError, ModelError
from cookbook_core.images import ImageReader
from cookbook_core.types import Datum, ModelInput

import numpy as np
import torch

log = logging.getLogger(__name__)


class Scorer:
    """Logprobs of target tokens under whatever adapter is active in `model`.

    Args:
        model: the causal LM.
        device: where it is.
        image_reader: gives what reads the model's images.
        agree: over a sharded model, whose forwards all processes make together: the largest of
            their numbers, place by place.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        image_reader: Callable[[], ImageReader] | None = None,
        agree: Callable[[Sequence[int]], Sequence[int]] = list,
    ) -> None:
        self.model = model
        self._image_reader = image_reader
        self._tower: VisionTower | str | None = None
        """Why there is none, or the tower; None before the first image."""
        self._packs_images = False
        self.device, self.agree = device, agree
        self.backbone = backbone(model)
        self.head: Head | None = find_head(model)
        self.micro_batch_tokens = micro_batch_tokens(model, device)
        self._switchable = _switchable(model)
        self.packs = self._packing_is_exact()

    def score(
        self, data: Sequence[Datum], micro_batch_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """Logprobs of every datum's target_tokens, in order.

        Args:
            data: D checked datums with target_tokens `(N,)` or `(N, K)`. Where a datum has a
                "score_mask", positions at which that is 0 are not computed and read 0.0; where it
                has a "temperature", logits are divided by it.
            micro_batch_tokens: most tokens of a forward; None takes the device's.
        Returns:
            D tensors on the CPU, nats, shape of target_tokens, float32 or better; they carry the
            graph when gradients are enabled.
        """
        batches = self.batches(data, micro_batch_tokens)
        return logprobs_of_data(batches, [self.score_batch(batch) for batch in batches])

    def hidden(
        self, data: Sequence[Datum], micro_batch_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """Like `score`, but the input of `vocab_logprobs` for every position: detached `(N, H)`."""
        batches = self.batches(data, micro_batch_tokens)
        each = [self.hidden_of_data(batch, self.hidden_batch(batch)) for batch in batches]
        return in_order(batches, each)

    def batches(
        self, data: Sequence[Datum], micro_batch_tokens: int | None = None
    ) -> list[MicroBatch]:
        """The micro-batches in which `data` goes through the model: a function of the tokens.

        Over a sharded model there are as many as in the process that has most; the last are idle.
        """
        budget = micro_batch_tokens or self.micro_batch_tokens
        lists = [datum.model_input.keys() for datum in data]
        in_rows = self.packs_all(data)
        make, cut = (packed, packing.micro_batches) if in_rows else (padded, by_length)
        batches = [make(data, lists, group) for group in cut(lists, budget)]
        (most,) = self.agree([len(batches)])
        return batches + [idle(in_a_row=in_rows) for _ in range(most - len(batches))]

    def score_batch(self, batch: MicroBatch) -> torch.Tensor:
        """Compute the logprobs of one micro-batch's targets.

        Returns:
            `(E,)`, one for each of `batch.targets`, nats, on the device, with graph when gradients
            are enabled.
        """
        entries = batch.targets
        arrays = entries.rows, entries.targets, entries.row_of, entries.starts
        states, ids, rows, starts = self._states(batch, *arrays)
        scale = None
        if entries.temperatures is not None:
            dtype = at_least_float32(states[:0]).dtype  # some devices have no float64
            scale = torch.tensor(1 / entries.temperatures, dtype=dtype)[:, None].to(self.device)
        bounds = [*entries.starts.tolist(), len(entries.targets)]
        targets = Targets(ids, rows, starts, bounds, scale)
        if self.head is not None:
            return target_logprobs(self.head, states, targets)
        logits = scaled(at_least_float32(states), scale)
        return logits[rows, ids] - logits.logsumexp(1)[rows]

    def hidden_batch(self, batch: MicroBatch) -> torch.Tensor:
        """Compute the input of `vocab_logprobs` for every position of a micro-batch.

        Returns:
            `(U, H)`, one for each row of `batch.positions`: last hidden states, or logits `(U, V)`
            if find_head() returned None; with graph when gradients are enabled.
        """
        return self._states(batch, batch.positions.rows)[0]

    def hidden_of_data(self, batch: MicroBatch, hidden: torch.Tensor) -> list[torch.Tensor]:
        """`(U, H)` from `hidden_batch` -> detached copies for each datum, `(N, H)`."""
        entries = batch.positions
        row_at = np.empty_like(entries.row_of)
        row_at[entries.places] = entries.row_of
        (at,) = self._send(row_at)
        each = hidden.detach().index_select(0, at)
        return list(each.split([len(rows) for rows in batch.rows]))

    def hidden_cotangent(self, batch: MicroBatch, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """d loss / d hidden states of each datum, `(N, H)` -> of `hidden_batch`, `(U, H)`."""
        starts, order = self._send(batch.positions.starts, batch.positions.places)
        return sum_by_row(torch.cat(list(grads)), starts, order)

    def vocab_logprobs(
        self,
        hidden: torch.Tensor,
        temperature: float = 1.0,
        linear: torch.nn.Linear | None = None,
    ) -> torch.Tensor:
        """Rows `(R, H)` or `(R, V)` of `hidden_batch` -> log p of every token `(R, V)`, nats.

        linear: what `head.frozen()` returned earlier, if the adapter may have changed since.
        """
        if self.head is None:
            logits = at_least_float32(hidden)
        else:
            logits = self.head.logits(hidden, linear)
        return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)

    def _states(
        self, batch: MicroBatch, rows: np.ndarray, *arrays: np.ndarray
    ) -> tuple[torch.Tensor, ...]:
        """Run the model.

        Args:
            batch: what to compute.
            rows: `(U,)`, the rows of the states to return.
            arrays: int64, to be sent to the device with the tokens in one copy.
        Returns:
            Hidden states `(U, H)`, or logits `(U, V)` if find_head() returned None, and the arrays
            on the device.
        """
        sent = [] if np.array_equal(rows, np.arange(batch.tokens)) else [rows]
        places = [] if batch.layout is None else [batch.layout.positions.numpy()]
        ids, *rest = self._send(batch.ids.flatten().numpy(), *places, *sent, *arrays)
        inputs: dict[str, Any] = {"input_ids": ids.view(batch.ids.shape)}
        if batch.layout is not None:
            inputs |= {"position_ids": rest.pop(0)[None], "layout": batch.layout}
        if has_images(batch.data):
            inputs = image_batch(batch, self.tower())
        with self.attention(packed=batch.layout is not None):
            if self.head is None:
                states = self.model(**inputs, use_cache=False).logits
            else:
                states = self.backbone(**inputs, use_cache=False).last_hidden_state
        states = states.flatten(0, 1)
        if sent:
            states = states.index_select(0, rest.pop(0))
        return states, *rest

    def _send(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """int64 arrays on the device, after one copy."""
        whole = torch.from_numpy(np.concatenate(arrays)).to(self.device)
        return list(whole.split([len(array) for array in arrays]))

    # ---- images ----------------------------------------------------------------------------------

    def tower(self) -> VisionTower:
        """The model's vision tower, after a comparison with the model's own forward on first use.

        Raises:
            ModelError: this model is not given images, with the reason.
        """
        if self._tower is None:
            self._tower = self._checked_tower()
        if isinstance(self._tower, str):
            raise ModelError(
                "base_model",
                "it is given no images",
                got=self._tower,
                fix="Take a model that reads images, or leave them out.",
            )
        return self._tower

    def _checked_tower(self) -> VisionTower | str:
        problem = missing_support(self.model)
        if problem or self._image_reader is None:
            return problem or "its images have no reader"
        try:
            reader = self._image_reader()
            bound = feature_bytes(self.model, self.device)
            tower = VisionTower(self.model, reader, self.device, bound)
            problem = reading_problem(self, tower)
        except CookbookError as error:
            return str(error)
        if problem:
            return f"images would be read in another way than the model's own ({problem})"
        self._tower = tower
        if self.packs:
            lists = probe_sequences(self.model, self.device)
            data = [Datum(value) for value in probe_inputs(tower, lists)]
            self._packs_images = self._packs_exactly(data, "sequences with images")
        return tower

    def bytes_to_come(self) -> int:
        """Bytes by which the kept features of images may still grow."""
        tower = self._tower
        return max(0, tower.bound - tower.nbytes) if isinstance(tower, VisionTower) else 0

    def packs_all(self, data: Sequence[Datum]) -> bool:
        """Whether all of a batch goes through the model in packed rows: a function of its tokens.

        A batch with images goes padded as a whole if the model cannot pack images.
        """
        if not has_images(data):
            return self.packs
        self.tower()
        return self._packs_images

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
        """Whether packed rows give this model's own results on this device; else warn why not."""
        if not self._switchable:
            return False
        lists = probe_sequences(self.model, self.device)
        return self._packs_exactly([Datum(ModelInput.from_ints(ids)) for ids in lists], "sequences")

    def _packs_exactly(self, data: Sequence[Datum], what: str) -> bool:
        lists = [datum.model_input.keys() for datum in data]
        every = list(range(len(lists)))
        problem = packing_problem(self, packed(data, lists, every), padded(data, lists, every))
        if problem:
            log.warning(
                "%s: %s are scored in padded batches and shared prefixes recomputed, as "
                "packed rows do not give this architecture's own results on %s (%s).",
                architecture(self.model),
                what,
                self.device.type,
                problem,
            )
        return not problem


def logprobs_of_data(
    batches: Sequence[MicroBatch], scores: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What `score_batch` gave for each micro-batch -> each datum's, on the CPU, after one copy."""
    if not scores:
        return []
    flat = torch.cat(list(scores)).cpu()
    pieces = flat.split([len(own) for own in scores])
    return in_order(
        batches, [b.targets.spread(own) for b, own in zip(batches, pieces, strict=True)]
    )


def logprob_cotangents(
    batches: Sequence[MicroBatch], grads: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """d loss / d logprobs of each datum -> of what `score_batch` gave, after one copy."""
    each = [b.targets.collect([grads[i] for i in b.indices]) for b in batches]
    if not each:
        return []
    return list(torch.cat(each).to(device).split([len(own) for own in each]))


def in_order(
    batches: Sequence[MicroBatch], each: Sequence[Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """A tensor for each datum of each micro-batch -> the tensors in the order of the data."""
    by_index = {
        i: t
        for b, own in zip(batches, each, strict=True)
        for i, t in zip(b.indices, own, strict=True)
    }
    return [by_index[i] for i in range(len(by_index))]


def _switchable(model: Any) -> list[tuple[Any, str]]:
    """(config, its own attention) for each config whose attention transformers can switch."""
    if not model._can_set_attn_implementation():
        return []
    modules = language_model(model).modules()
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return [(config, config._attn_implementation) for config in configs.values()]
