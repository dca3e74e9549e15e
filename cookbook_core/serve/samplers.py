"""Weights to sample from: saved ones, snapshots of models in training, the bare base model.

Clients never close a sampler, and a reinforcement-learning run makes one every step. The ones used
last stay in memory; others are written to disk, and read again when they are used.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook_core.serve import wire
from cookbook_core.serve.models import Base
from cookbook_core.serve.replies import Promise, Promises, Refused, Repeats
from cookbook_core.types import SampleResponse, TensorData

GATHER_SECONDS = 0.004
"""After a sampling request, how long to wait at least for more of the same weights."""
LONGEST_GAP_SECONDS = 0.03
"""How long to wait at most where requests follow each other slowly."""
LONGEST_GATHER_SECONDS = 0.25
"""From the first request to the decoding of what has come."""

Start = Callable[[Any], Future[SampleResponse]]
"""Submits a request to the backend's sampler."""


@dataclass
class Sampler:
    """One set of weights.

    made: the backend's sampler; None while the weights are on disk alone.
    folder: the weights on disk; None of the base model, or while they are in memory alone.
    spilled: the folder is this server's own, and deleted with the sampler.
    first_at: when the first of the pending requests came.
    """

    sampler_id: str
    session: str
    base: Base
    model_path: str | None
    made: Future[Any] | None
    folder: Path | None = None
    spilled: bool = False
    repeats: Repeats = field(default_factory=Repeats)
    pending: list[tuple[Start, Promise]] = field(default_factory=list)
    due: asyncio.TimerHandle | None = None
    first_at: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request waits for its weights."""
        return not self.pending and (self.made is None or self.made.done())


class Samplers:
    """All samplers by id, the least recently used first. The event loop's thread alone uses it.

    Args:
        promises: of the server.
        folder: for weights written to make room.
        in_memory: samplers whose weights stay in memory.
        on_disk: samplers kept on disk beside them; older ones are deleted.
        most_waiting: sampling requests that may wait.
    """

    def __init__(
        self, promises: Promises, folder: Path, in_memory: int, on_disk: int, most_waiting: int
    ) -> None:
        self._promises, self._folder = promises, folder
        self._in_memory, self._on_disk, self._most = in_memory, on_disk, most_waiting
        self._all: dict[str, Sampler] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._all)

    def add(self, sampler: Sampler) -> Sampler:
        """Register a sampler, and make room for it."""
        self._all[sampler.sampler_id] = sampler
        self._make_room()
        return sampler

    def get(self, sampler_id: str) -> Sampler | None:
        """The sampler of this id, which becomes the most recently used."""
        sampler = self._all.pop(sampler_id, None)
        if sampler is not None:
            self._all[sampler_id] = sampler
        return sampler

    def of_session(self, session: str) -> list[str]:
        """Ids of a session's samplers."""
        return [s.sampler_id for s in self._all.values() if s.session == session]

    def remove(self, sampler_id: str) -> None:
        """Drop a sampler, and the weights that were written for it."""
        sampler = self._all.pop(sampler_id, None)
        if sampler is not None and sampler.spilled and sampler.folder is not None:
            shutil.rmtree(sampler.folder, ignore_errors=True)

    def clear(self) -> None:
        """Drop all samplers."""
        for sampler_id in list(self._all):
            self.remove(sampler_id)

    # ---- requests --------------------------------------------------------------------------------

    def submit(self, sampler: Sampler, seq: int | None, digest: bytes, start: Start) -> Promise:
        """Queue a sampling request; the promise of the same request if it was sent before.

        Raises:
            RequestError: another request had this number.
            Refused: 429, too many wait.
        """
        if seq is not None:
            promise = sampler.repeats.find(sampler.sampler_id, seq, digest)
            if promise is not None:
                return promise
        if self._waiting >= self._most:
            what, fix = f"{self._waiting} sampling requests wait", "Send it again later."
            raise Refused(429, "asample", what, expected=self._most, fix=fix)
        promise = self._promises.add(None, sampled)
        if seq is not None:
            sampler.repeats.keep(seq, digest, promise)
        self._waiting += 1
        loop = asyncio.get_running_loop()
        promise.future.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._finished) if not loop.is_closed() else None
        )
        sampler.first_at = sampler.first_at if sampler.pending else loop.time()
        sampler.pending.append((start, promise))
        if sampler.due is not None:
            sampler.due.cancel()
        gap = gather_seconds(loop.time() - sampler.first_at, len(sampler.pending))
        when = min(loop.time() + gap, sampler.first_at + LONGEST_GATHER_SECONDS)
        sampler.due = loop.call_at(when, self._flush, sampler)
        return promise

    def _finished(self) -> None:
        self._waiting -= 1

    def _flush(self, sampler: Sampler) -> None:
        """Submit what was gathered, once the weights are there."""
        sampler.due = None
        made = sampler.made
        if made is None:
            sampler.made = made = sampler.base.backend.create_sampler(str(sampler.folder))
        if not made.done():
            loop = asyncio.get_running_loop()
            made.add_done_callback(lambda _: loop.call_soon_threadsafe(self._flush, sampler))
            return
        pending, sampler.pending = sampler.pending, []
        try:
            weights = made.result()
        except Exception as error:
            sampler.made = None if sampler.folder is not None else made
            for _, promise in pending:
                promise.fail(error)
            return
        with weights.unit():
            for start, promise in pending:
                _submit(start, weights, promise)
        self._make_room()

    # ---- memory ----------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Write the weights used longest ago to disk, and delete those beyond the limit there."""
        loaded = [s for s in self._all.values() if s.made is not None and s.model_path is not None]
        for sampler in [s for s in loaded if s.idle][: max(0, len(loaded) - self._in_memory)]:
            self._unload(sampler)
        spilled = [s for s in self._all.values() if s.spilled and s.made is None]
        for sampler in spilled[: max(0, len(spilled) - self._on_disk)]:
            self.remove(sampler.sampler_id)

    def _unload(self, sampler: Sampler) -> None:
        made = sampler.made
        if made is None or made.cancelled() or made.exception() is not None:
            return
        if sampler.folder is not None:
            sampler.made = None
            return
        folder = self._folder / sampler.sampler_id.replace(":", "-")
        written = made.result().write(folder)
        sampler.made = Future()  # neither idle nor ready until it is on disk

        def settle() -> None:
            removed = sampler.sampler_id not in self._all
            if removed or written.exception() is not None:  # or the disk refused
                sampler.made = made
            else:
                sampler.made, sampler.folder, sampler.spilled = None, folder, True
            if removed:
                shutil.rmtree(folder, ignore_errors=True)
            if sampler.pending:
                self._flush(sampler)
            if sampler.spilled:
                self._make_room()

        loop = asyncio.get_running_loop()
        written.add_done_callback(lambda _: loop.call_soon_threadsafe(settle))


def gather_seconds(since: float, count: int) -> float:
    """How long to wait for the next request of a burst: three times the mean gap so far, in bounds.

    Args:
        since: seconds between the first request of the burst and the last.
        count: how many have come.
    """
    mean = since / max(1, count - 1)
    return min(max(3 * mean, GATHER_SECONDS), LONGEST_GAP_SECONDS)


def _submit(start: Start, weights: Any, promise: Promise) -> None:
    if promise.future.cancelled():
        return
    inner = promise.start(lambda: start(weights))
    if inner is not None:
        promise.future.add_done_callback(lambda future: future.cancelled() and inner.cancel())


def _as_json(tensor: TensorData) -> dict[str, Any]:
    return {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}


def sampled(response: SampleResponse, proto: bool) -> Any:
    """The reply of a sampling request."""
    if proto:
        return wire.samples_out(response)
    sequences = [
        {
            "stop_reason": s.stop_reason, "tokens": list(s.tokens), "logprobs": s.logprobs,
            "topk_logprobs": s.topk_logprobs,
        }
        for s in response.sequences
    ]  # fmt: skip
    targets, drawn = response.target_prompt_logprobs, response.prompt_alt_tokens
    return {
        "type": "sample", "sequences": sequences, "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt_logprobs": response.topk_prompt_logprobs,
        "target_prompt_logprobs": targets and _as_json(targets),
        "prompt_alt_tokens": drawn
        and {"tokens": _as_json(drawn.tokens), "logprobs": _as_json(drawn.logprobs)},
    }  # fmt: skip
