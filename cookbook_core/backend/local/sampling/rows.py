"""One sample being decoded: its tokens so far, its random numbers, and when it stops."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook_core.backend.local.sampling.decoder import OPEN_ENDED, Prompt
from cookbook_core.backend.local.sampling.draw import StopRule, TextWatch, Uniforms
from cookbook_core.errors import ModelError
from cookbook_core.types import SampledSequence, SamplingParams, StopReason, TopkLogprobs

import numpy as np


@dataclass
class Row:
    """One sample being decoded."""

    prompt: Prompt
    params: SamplingParams
    limit: int
    stop: StopRule
    seed: int
    sample: int
    tokenizer: Any = None
    top_k: int = 0
    """Likeliest tokens to report at each position."""
    on_token: Callable[[int, int, int], None] | None = None
    """See `SampleRequest`."""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget what was decoded: the next token is the first."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]] | None] = []
        self.stop_reason: StopReason | None = None
        self.uniforms = Uniforms(self.seed, self.sample)
        strings = self.stop.strings
        self.watch = TextWatch(strings, self.tokenizer) if strings else None
        self.prompt.forget()

    @property
    def completion(self) -> int:
        """Tokens of the completion to count on."""
        return min(self.limit, max(OPEN_ENDED, self.params.max_tokens or 0))

    def push(self, token: int, logprob: float) -> bool:
        """Append a token; return whether the row ends with it."""
        if not math.isfinite(logprob):
            raise ModelError(
                "sample",
                "the model's output is not finite",
                expected="finite logits",
                got=f"logprob {logprob} at completion token {len(self.tokens)}",
                fix="Lower learning_rate if training diverged; use float32 if bfloat16 does.",
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(self.sample, len(self.tokens), token)
        if token in self.stop.ids or (self.watch is not None and self.watch.matches(self.tokens)):
            self.stop_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.stop_reason = "length"
        return bool(self.stop_reason)

    def result(self) -> SampledSequence:
        """The sample, once the row has ended."""
        assert self.stop_reason is not None, "a row has a result once it has ended"
        return SampledSequence(
            stop_reason=self.stop_reason,
            sequence_id=uuid.uuid4().hex,
            tokens_np=np.array(self.tokens, dtype=np.int64),
            logprobs_np=np.array(self.logprobs),
            topk_logprobs_np=TopkLogprobs.from_lists(self.top, self.top_k) if self.top_k else None,
        )


def columns_of(rows: Sequence[Row]) -> int:
    """Columns of a KV cache in which all prompts end at the same one."""
    return max(len(row.prompt.tokens) for row in rows) + max(row.completion for row in rows)


def close_gaps(ended: list[bool]) -> list[int]:
    """The former index of each remaining row: rows keep their place, the last fill the gaps."""
    alive = [i for i, end in enumerate(ended) if not end]
    late = [i for i in alive if i >= len(alive)]
    return [late.pop() if ended[i] else i for i in range(len(alive))]
