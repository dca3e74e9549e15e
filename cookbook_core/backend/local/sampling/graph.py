"""Decoding in CUDA graphs: one step, model and draw, is captured once and replayed.

Launching the kernels of a step one by one takes several times longer than running them. A captured
step is launched at once, but its shapes and addresses are fixed. So rows and columns are rounded up
to a few sizes, all inputs and outputs are tensors made once per loop, and what changes from step to
step (the column, the random numbers) is read from the device. The host reads the tokens of CHUNK
steps at a time; rows that stopped meanwhile have run on, and what they did then is dropped.

Graphs last as long as their loop: addresses of adapters and weights are fixed within it, and no
memory is held while training. A model whose step cannot be captured raises GraphError, and is
decoded by launching every operation.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.model.sharding import is_sharded
from cookbook_core.backend.local.sampling.decoder import Decoder
from cookbook_core.backend.local.sampling.draw import (
    DRAWS,
    SamplingTensors,
    draw_tokens,
    in_use,
    pack,
    take_uniforms,
)
from cookbook_core.backend.local.sampling.kv_cache import move_indices
from cookbook_core.backend.local.sampling.rows import Row, close_gaps, columns_of

import torch
from torch import Tensor

CHUNK = 8
"""Steps between two transfers to the host; a divisor of DRAWS."""
COLUMNS = 256
"""Columns are rounded up to a multiple of this."""
SMALLEST = 8
"""Rows are rounded up to a multiple of this."""
WORTH = 16
"""Completion tokens from which capturing costs less than it saves: a graph costs about two steps
per size, and saves most of each."""

_refused: weakref.WeakSet[Any] = weakref.WeakSet()
_checked: weakref.WeakSet[Any] = weakref.WeakSet()


class GraphError(Exception):
    """This model's step cannot be captured, for the reason given."""


def can_capture(decoder: Decoder, rows: Sequence[Row]) -> bool:
    """Whether to decode these rows in graphs: by device, model and request alone."""
    usable = decoder.device.type == "cuda" and decoder.pads and decoder.core not in _refused
    usable = usable and not is_sharded(decoder.core)  # gathering weights is not captured
    plain = not any(row.top_k for row in rows)  # a graph reports no likeliest tokens
    return usable and plain and max(row.limit for row in rows) >= WORTH


def refuse(decoder: Decoder) -> None:
    """Never capture this model again."""
    _refused.add(decoder.core)


def allocation(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the KV cache for so many."""
    unit = SMALLEST if rows <= 4 * SMALLEST else 4 * SMALLEST
    return _round_up(rows, unit), _round_up(columns, COLUMNS)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def decode(decoder: Decoder, rows: list[Row]) -> None:
    """Read the prompts of `rows`, then sample until every row has stopped.

    Raises:
        GraphError: the step cannot be captured; rows may have tokens already.
    """
    loop = StaticLoop(decoder, rows)
    done = 0
    while rows:
        steps = min(CHUNK, max(row.limit for row in rows) - done)
        if done % DRAWS == 0:
            loop.uniforms[:, : len(rows)] = take_uniforms([row.uniforms for row in rows])
        tokens, logprobs = loop.run(len(rows), done, steps)
        done += steps
        ended = [
            any(row.push(int(token), logprob) for token, logprob in zip(*own, strict=True))
            for row, *own in zip(rows, tokens, logprobs, strict=True)
        ]
        if any(ended):
            order = close_gaps(ended)
            rows = [rows[i] for i in order]
            loop.keep(order)


class StaticLoop:
    """The tensors of a loop, at fixed addresses, and the step over them.

    With B rows and C columns, live rows first:

    tokens: `(B,)`, drawn last. pad: `(B,)`, columns of padding. ahead: `(B,)`, see `Decoder`.
    last: `(B,)`, the largest position; rows that have stopped stay there.
    mask: `(B, C)`, False at padding.
    column: the column that the next step fills. count: steps so far. Both 0-d.
    uniforms: `(DRAWS, B)`. params: `(4, B)`, see `pack`.
    drawn: `(2, CHUNK, B)`, tokens and logprobs.
    """

    def __init__(self, decoder: Decoder, rows: Sequence[Row]) -> None:
        """Read the prompts."""
        self.decoder, device = decoder, decoder.device
        size, columns = allocation(len(rows), columns_of(rows))
        prompts = [row.prompt for row in rows]
        tokens = decoder.prefill(prompts, [row.limit for row in rows], (size, columns))
        self.ints = torch.zeros(4, size, dtype=torch.int64, device=device)
        self.tokens, self.pad, self.ahead, self.last = self.ints
        self.last[: len(rows)] = torch.tensor([len(r.prompt.tokens) + r.limit - 1 for r in rows])
        self.last[: len(rows)] += decoder.ahead + decoder.pad
        self.pad[: len(rows)] = decoder.pad
        self.ahead[: len(rows)] = decoder.ahead
        self.tokens[: len(rows)] = tokens
        self.mask = torch.arange(columns, device=device) >= self.pad[:, None]
        self.width = decoder.width
        self.column = torch.full((), self.width, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(DRAWS, size, dtype=torch.float64, device=device)
        packed = pack([row.params for row in rows])
        self.used = in_use(packed)
        self.params = torch.ones(4, size, dtype=torch.float64, device=device)
        self.params[1:3] = 0
        self.params[:, : len(rows)] = packed.to(device)
        self.drawn = torch.zeros(2, CHUNK, size, dtype=torch.float64, device=device)
        self.graphs = Graphs(device)
        if decoder.core not in _checked:
            self._check(len(rows))
            _checked.add(decoder.core)

    def _check(self, rows: int) -> None:
        """Compare a static step's logits with those of a plain step of the same tokens.

        A model that attends by its own rules, and not by transformers' masks, would differ.
        """
        plain = self.decoder.step(self.tokens[:rows]).float()
        error = (self.logits(*self._fix(rows, self.width + 1))[:rows].float() - plain).norm()
        bound = 1e-3 if self.decoder.core.dtype.itemsize >= 4 else 0.1
        if not error <= bound * plain.norm():  # NaN differs too, and is reported by the other loop
            raise GraphError(
                f"its logits over static tensors differ by {float(error / plain.norm()):.0%}"
            )

    def _fix(self, rows: int, columns: int) -> tuple[int, int]:
        """Fix the cache to sizes that hold so many rows and columns; return the sizes."""
        cache, (size, capacity) = self.decoder.cache, self.mask.shape
        if columns > capacity:
            cache.reserve(2 * capacity)
            self.mask = torch.arange(2 * capacity, device=self.mask.device) >= self.pad[:, None]
            self.graphs.clear()
        # the rows allocated, then powers of two: few graphs, and never twice the rows needed
        rows = min(size, max(SMALLEST, 1 << (rows - 1).bit_length()))
        columns = min(_round_up(columns, COLUMNS), cache.capacity)
        cache.fix(rows, columns, self.column)
        return rows, columns

    def logits(self, rows: int, columns: int) -> Tensor:
        """Append `tokens` to the first `rows` rows; `(rows, V)`."""
        position = torch.minimum(self.column + self.ahead[:rows], self.last[:rows])
        ids, mask = self.tokens[:rows, None], self.mask[:rows, :columns]
        return self.decoder.forward(self.decoder.cache, ids, position, mask, False)[:, -1]

    def step(self, rows: int, columns: int) -> None:
        """Append `tokens`, draw the next ones, count."""
        logits = self.logits(rows, columns)
        uniforms = self.uniforms.index_select(0, (self.count % DRAWS).view(1))[0, :rows]
        tensors = SamplingTensors.unpack(self.params[:, :rows], self.used)
        tokens, logprobs = draw_tokens(logits, uniforms, tensors)
        self.tokens[:rows] = tokens
        drawn = torch.stack([tokens.double(), logprobs.double()])[:, None]
        self.drawn[:, :, :rows].index_copy_(1, (self.count % CHUNK).view(1), drawn)
        self.column += 1
        self.count += 1

    def run(self, rows: int, done: int, steps: int) -> list[list[list[float]]]:
        """Take `steps` steps; return tokens and logprobs, by row and step."""
        size = self._fix(rows, self.width + done + steps)
        self.graphs.run(size, lambda: self.step(*size), steps)
        return self.drawn[:, :steps, :rows].transpose(1, 2).tolist()

    def keep(self, order: list[int]) -> None:
        """Row i becomes the former row order[i] >= i."""
        _, moved, source = move_indices(order, self.decoder.device)
        self.decoder.cache.keep(len(order), moved, source)
        if len(moved):
            for x in (self.ints, self.uniforms, self.params):
                x[:, moved] = x[:, source]
            self.mask[moved] = self.mask[source]


class Graphs:
    """Captured steps by their sizes, which share one pool of memory.

    On a stream of their own, as torch demands of captures. The first step of a size is not
    captured: it loads kernels and libraries, and shows whether the step waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Hashable, Any] = {}

    def run(self, key: Hashable, step: Callable[[], None], times: int) -> None:
        """Run a step of the sizes `key` so many times."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                if key not in self.captured:
                    _refuse_syncs(step)
                    times -= 1
                    if times:
                        self.captured[key] = self._capture(step)
                for _ in range(times):
                    self.captured[key].replay()
        finally:
            current.wait_stream(self.stream)

    def _capture(self, step: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the device meanwhile
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                step()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise GraphError(f"the capture failed: {error}") from error
        return graph

    def clear(self) -> None:
        """Free the graphs, whose addresses are about to change."""
        torch.cuda.synchronize(self.stream.device)
        self.captured.clear()


def _refuse_syncs(step: Callable[[], None]) -> None:
    """Run a step; raise GraphError if it waits for the device.

    A capture that waits fails, and may leave torch's CUDA state unusable: so it is not tried.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            raise GraphError(f"a step of this model waits for the device: {warning.message}")
