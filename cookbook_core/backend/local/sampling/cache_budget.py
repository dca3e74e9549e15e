"""How large a KV cache may be: rows decoded together follow from it.

The budget is a constant of the machine and the model, from *total* memory, so that which rows
share a loop, and with it the last bits of their logprobs, never depends on what else runs. Where
it does not fit all the same, it is halved, with a warning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.backend.local.model.memory import (
    attention_shape,
    feature_bytes,
    free_bytes,
    total_bytes,
    weight_bytes,
)
from cookbook_core.errors import RequestError

import torch

CPU_TOKENS = 65_536
"""Most rows x columns of a KV cache on the CPU, where larger ones decode no faster."""
SHARE = 0.6
"""The part of the memory beside the model that a KV cache may take; the rest is for prefills,
logits, adapters and their optimizers."""

log = logging.getLogger(__name__)


@dataclass
class CacheBudget:
    """Most rows x columns of one KV cache.

    Attributes:
        tokens: rows x columns, one token each.
        slot_bytes: bytes of keys and values that one token takes in all layers.
        device: where the cache is.
        lowered: after running out of memory: used in place of `tokens`.
    """

    tokens: int = CPU_TOKENS
    slot_bytes: int = 1
    device: torch.device | str = "cpu"
    lowered: int | None = None

    @classmethod
    def of(cls, base: BaseModel) -> CacheBudget:
        """The budget of a model, without adapters, on its device."""
        config = base.model.config.get_text_config(decoder=True)
        slot = slot_bytes(config, base.model.dtype)
        taken = weight_bytes(base.model) + feature_bytes(base.model, base.device)
        tokens = tokens_in(total_bytes(base.device) - taken, slot)
        if base.device.type == "cpu":
            tokens = min(tokens, CPU_TOKENS)
        return cls(tokens, slot, base.device)

    @property
    def now(self) -> int:
        """Most rows x columns from now on."""
        return self.tokens if self.lowered is None else self.lowered

    def lower(self, rows: int, columns: int) -> None:
        """Take half of the rows x columns that did not fit into memory, after a warning.

        Raises:
            RequestError: it was one row.
        """
        if rows == 1:
            fits = free_bytes(torch.device(self.device)) // self.slot_bytes
            raise RequestError(
                "sample",
                "a prompt and its completion do not fit into memory",
                expected=f"about {fits} tokens or fewer in the memory now free",
                got=f"{columns} tokens",
                fix="Lower max_tokens, shorten the prompt, or use a smaller model.",
            )
        before, self.lowered = self.now, min(self.now, rows * columns) // 2
        log.warning(
            "out of memory: sampling with KV caches of at most %d tokens (rows x columns) instead "
            "of %d. Samples are the same; their logprobs may change in their last bits.",
            self.lowered,
            before,
        )


def tokens_in(room: float, slot: int) -> int:
    """Most rows x columns of a KV cache with `room` bytes beside the model.

    Args:
        room: bytes.
        slot: bytes of a token, see `slot_bytes`.
    """
    return max(1, int(SHARE * room) // slot)


def slot_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token: 2 x layers x heads x head_dim x itemsize.

    Args:
        config: of the language model.
        dtype: of the cache.
    """
    _, heads, width = attention_shape(config)
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize
