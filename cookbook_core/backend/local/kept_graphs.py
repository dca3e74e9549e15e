"""Graphs of forwards that a backward is expected to follow, kept while there is memory for them.

A client that computes its loss on another machine sends two requests: a forward, and then a
backward of the linear surrogate for the same tokens. With the first one's graph still in memory the
second needs no forward. Graphs are kept for an adapter once such a pair has been seen; each is used
once, and dropped when the weights change or a request needs its memory. None of this moves a
result: scoring again gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.adapters import Adapter
from cookbook_core.backend.local.scoring.backward import BatchScores
from cookbook_core.custom_loss import LossFn
from cookbook_core.datums import temperature_of
from cookbook_core.types import Datum, ForwardBackwardOutput

MOST = 64
"""Graphs kept at a time, and forwards remembered for each adapter."""


class KeptGraphs:
    """The kept graphs of one backend. One thread uses it, the backend's worker."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bytes], BatchScores] = {}
        """By number of the adapter and digest of the tokens, the oldest first."""
        self._forwards: dict[int, list[bytes]] = {}
        """By number of the adapter, digests of forwards under its present weights."""
        self._two_passes: set[int] = set()
        """Numbers of adapters of which a backward has followed a forward."""

    def __len__(self) -> int:
        return len(self._kept)

    def forward(
        self, engine: Engine, adapter: Adapter, data: Sequence[Datum], loss_fn: LossFn
    ) -> ForwardBackwardOutput:
        """`Engine.forward`; the graph is kept if a backward will follow and all of it fits."""
        self.make_room(engine, data)
        key = adapter.number, digest(data)
        known = self._forwards.setdefault(adapter.number, [])
        known.append(key[1])
        del known[:-MOST]
        if adapter.number not in self._two_passes:
            return engine.forward(adapter, data, loss_fn)
        output, scored = engine.forward_with_graph(adapter, data, loss_fn)
        if scored.passes == 1:
            self._kept[key] = scored
        while len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return output

    def take(self, adapter: Adapter, data: Sequence[Datum]) -> tuple[int, BatchScores | None]:
        """What is left of an earlier forward of the same tokens.

        Returns:
            The number of such forwards (0 or 1), and its graph, which is then no longer kept.
        """
        known = self._forwards.get(adapter.number)
        if not known or (tokens := digest(data)) not in known:
            return 0, None
        known.remove(tokens)
        self._two_passes.add(adapter.number)
        return 1, self._kept.pop((adapter.number, tokens), None)

    def weights_change(self, adapter: Adapter) -> None:
        """Drop the graphs of an adapter, and forget its forwards."""
        self._forwards.pop(adapter.number, None)
        for key in [key for key in self._kept if key[0] == adapter.number]:
            del self._kept[key]

    def forget(self, adapter: Adapter) -> None:
        """Drop everything of an adapter that is no longer used."""
        self.weights_change(adapter)
        self._two_passes.discard(adapter.number)

    def make_room(self, engine: Engine, data: Sequence[Datum]) -> None:
        """Drop graphs, the oldest first, until a batch's own graph fits beside them."""
        lengths = [datum.model_input.length for datum in data]
        while self._kept and engine.limits.limits(max(lengths)).graph_tokens < sum(lengths):
            del self._kept[next(iter(self._kept))]


def digest(data: Sequence[Datum]) -> bytes:
    """Identify what a batch scores: tokens, targets, temperatures, and the order of its datums."""
    total = hashlib.sha256()
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        scored = datum.model_input.keys(), targets.shape, temperature_of(datum)
        total.update(repr(scored).encode())
        total.update(targets.tobytes())
    return total.digest()
