"""log p of the whole vocabulary at every position of a datum, computed only for indexed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cookbook_core.alignment import check_rows

import torch
from torch.utils.checkpoint import checkpoint

MAP_CELLS = 2**24
"""Logprobs that `VocabLogprobs.map` has in memory at a time: 64 MiB of float32. That is above the
size from which glibc maps blocks (`keep_freed_memory`): smaller ones fragment its heap, which then
grows with the number of rows."""

_OPERATORS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __matmul__ "
    "__rmatmul__ __pow__ __neg__ __abs__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__"
).split()


class VocabLogprobs:
    """A tensor `(T, V)`, nats, float32 or better, of which only indexed rows are computed.

    Row t is the log-distribution of the token after input position t. `lp[t]`, `lp[t][ids]`,
    `lp[t, ids]`, `lp[rows]`, `lp[a:b]` compute the rows they name, each once per indexing (`lp[t]`
    once in total); any other use as a tensor (torch functions, methods, arithmetic) computes all T
    rows first. Gradient flows back to the hidden states.

    Args:
        hidden: `(T, D)`, from which the rows are computed.
        to_logprobs: `(R, D)` -> `(R, V)`.
        vocab_size: V.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        to_logprobs: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
    ) -> None:
        self._hidden, self._to_logprobs = hidden, to_logprobs
        self._single: dict[int, torch.Tensor] = {}
        self.shape = torch.Size((len(hidden), vocab_size))
        self.device = hidden.device

    def __len__(self) -> int:
        return len(self._hidden)

    def __repr__(self) -> str:
        return f"VocabLogprobs(shape={tuple(self.shape)})"

    def __getitem__(self, key: Any) -> torch.Tensor:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if hasattr(first, "dim") and first.dim() == 0 and first.dtype != torch.bool:
            first = int(first)
        if isinstance(first, int) and not isinstance(first, bool):
            row = self._row(first)
            return row[tuple(self._index(key) for key in rest)] if rest else row
        if isinstance(first, slice):
            rows: Any = slice(None)
            logprobs = self._to_logprobs(self._hidden[first])
        elif isinstance(first, (list, range, torch.Tensor)) or hasattr(first, "__array__"):
            wanted, rows = self._positions(first).unique(return_inverse=True)
            logprobs = self._to_logprobs(self._hidden[wanted.to(self.device)])
            rows = rows.to(self.device)
        else:  # None, ..., a bool
            return self.dense()[key]
        return logprobs[(rows, *(self._index(key) for key in rest))]

    def subset(self, rows: Any) -> VocabLogprobs:
        """Some rows, still computed when they are used.

        Args:
            rows: positions `(R,)`, or a mask `(T,)`.
        Returns:
            The table `(R, V)`; gradient flows to the hidden states.
        """
        hidden = self._hidden[self._positions(rows).to(self.device)]
        return VocabLogprobs(hidden, self._to_logprobs, self.shape[1])

    def map(self, fn: Callable[..., Any], *others: Any) -> Any:
        """Apply a function to the rows, a few at a time, and keep none of them.

        The backward computes the rows again. Memory holds about `MAP_CELLS` logprobs, and the
        tensors that fn makes of them, instead of those of all T rows; every row is computed twice.

        Args:
            fn: `fn(logprobs, *others)` takes logprobs `(r, V)`, nats, and the same r rows of each
                of the others; it returns a tensor of r rows, such as `(r,)`, or a tuple of such
                tensors. Each row of a result depends on the same row of the arguments alone. It
                is called again in the backward.
            *others: tensors of T rows, such as targets `(T,)`, moved to the logprobs' device with
                their rows; or VocabLogprobs of T rows, such as a teacher's, computed with them.
        Returns:
            The results of all T rows, in order; gradient flows to the hidden states, to others
            that require it, and to parameters of to_logprobs.
        Raises:
            DatumError: one of the others, or a result, has another number of rows.
        """
        check_rows("others", others, len(self))
        tables = (self, *others)
        sources = [t._hidden if isinstance(t, VocabLogprobs) else t for t in tables]

        def of_piece(*piece: torch.Tensor) -> Any:
            logprobs = self._to_logprobs(piece[0])
            rest = [
                other._to_logprobs(own) if isinstance(other, VocabLogprobs) else own
                for other, own in zip(others, piece[1:], strict=True)
            ]
            return fn(logprobs, *(own.to(logprobs.device) for own in rest))

        size, results, several = _piece_size(*self.shape), [], False
        for piece in zip(*(source.split(size) for source in sources), strict=True):
            result = checkpoint(of_piece, *piece, use_reentrant=False)
            several = isinstance(result, tuple)
            results.append(result if several else (result,))
            check_rows("result of fn", results[-1], len(piece[0]))
        joined = tuple(torch.cat(parts) for parts in zip(*results, strict=True))
        return joined if several else joined[0]

    def _positions(self, rows: Any) -> torch.Tensor:
        """Positions `(R,)`, negative ones included, or a mask `(T,)` -> positions on the CPU."""
        return torch.arange(len(self))[torch.as_tensor(rows).cpu()]

    def _index(self, key: Any) -> Any:
        """An index tensor of the CPU on the device, where the backward needs it again."""
        return key.to(self.device) if isinstance(key, torch.Tensor) else key

    def _row(self, at: int) -> torch.Tensor:
        if not -len(self) <= at < len(self):
            raise IndexError(f"position {at} is out of range for {len(self)} positions")
        at %= len(self)
        if at not in self._single:
            self._single[at] = self._to_logprobs(self._hidden[at : at + 1])[0]
        return self._single[at]

    def dense(self) -> torch.Tensor:
        """All rows, as a plain tensor `(T, V)`."""
        return self._to_logprobs(self._hidden)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return func(*_dense(args), **{k: _dense(v) for k, v in (kwargs or {}).items()})


def _piece_size(rows: int, vocab_size: int) -> int:
    """Rows of a piece: at most `MAP_CELLS` logprobs, and no small rest at the end."""
    most = max(1, MAP_CELLS // max(1, vocab_size))
    pieces = max(1, -(-rows // most))
    return max(1, -(-rows // pieces))


def _dense(value: Any) -> Any:
    if isinstance(value, VocabLogprobs):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(v) for v in value)
    return value


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: VocabLogprobs, *others: Any) -> Any:
        return getattr(self.dense(), name)(*_dense(others))

    return apply


for _name in _OPERATORS:
    setattr(VocabLogprobs, _name, _operator(_name))
