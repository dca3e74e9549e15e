"""ModelInput: what the model reads, as chunks of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from cookbook_core.errors import DatumError
from cookbook_core.types.tensors import to_array


@dataclass(frozen=True)
class EncodedTextChunk:
    """Consecutive token ids.

    Raises:
        DatumError: tokens that are not a flat list.
    """

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        listed = isinstance(self.tokens, (Sequence, np.ndarray)) and (
            not isinstance(self.tokens, (str, bytes)) and getattr(self.tokens, "ndim", 1) == 1
        )
        require_type(listed, "EncodedTextChunk.tokens", "a flat list of token ids", self.tokens)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


ModelInputChunk: TypeAlias = EncodedTextChunk


@dataclass(frozen=True)
class ModelInput:
    """What the model reads: chunks of token ids, in order. `from_ints` builds it from a list.

    Raises:
        DatumError: chunks that are not a list of EncodedTextChunk (the SDK's own are converted).
    """

    chunks: Sequence[ModelInputChunk]

    def __post_init__(self) -> None:
        rule, listed = "a list of EncodedTextChunk", isinstance(self.chunks, (list, tuple))
        require_type(listed, "ModelInput.chunks", rule, self.chunks)
        if not all(isinstance(chunk, EncodedTextChunk) for chunk in self.chunks):
            object.__setattr__(self, "chunks", _own_chunks(self.chunks))

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """Build a single chunk of these token ids (a list, numpy array or tensor).

        Raises:
            DatumError: nested lists, or values that are not integers.
        """
        ids = to_array("ModelInput.tokens", tokens, np.dtype("int64"))
        if ids.ndim != 1:
            raise DatumError(
                "ModelInput.tokens",
                "not one sequence",
                expected="a flat list of token ids",
                got=f"shape {list(ids.shape)}",
                fix="Build one datum for each sequence.",
            )
        return cls(chunks=[EncodedTextChunk(tokens=ids.tolist())])

    def to_ints(self) -> list[int]:
        """All token ids, in order."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    @classmethod
    def empty(cls) -> ModelInput:
        """An input without tokens, to append to."""
        return cls(chunks=[])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Return a new input with `chunk` at the end."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """Return a new input with one more token at the end."""
        return self.append(EncodedTextChunk(tokens=[token]))


def own_input(value: Any) -> Any:
    """Convert the SDK's ModelInput, recognised by its list of chunks; return other values as is.

    Raises:
        DatumError: a chunk that is not text.
    """
    if isinstance(value, ModelInput) or not isinstance(getattr(value, "chunks", None), list):
        return value
    return ModelInput(value.chunks)


def _own_chunks(chunks: Sequence[Any]) -> list[EncodedTextChunk]:
    """Convert the SDK's chunks, recognised by their type tag."""
    for i, chunk in enumerate(chunks):
        text = getattr(chunk, "type", None) == "encoded_text" and hasattr(chunk, "tokens")
        rule = "EncodedTextChunk (text only)"
        require_type(text, f"ModelInput.chunks[{i}]", rule, chunk)
    return [EncodedTextChunk(chunk.tokens) for chunk in chunks]


def require_type(good: bool, where: str, rule: str, value: object) -> None:
    """Raise DatumError for a value of the wrong type, unless it is `good`."""
    if not good:
        got = f"{type(value).__name__} {value!r:.80}"
        raise DatumError(where, "wrong type", expected=rule, got=got)
