"""ModelInput: what the model reads, as chunks of token ids and images."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from cookbook_core.errors import DatumError
from cookbook_core.types.tensors import to_array

import numpy as np


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


@dataclass(frozen=True)
class ImageChunk:
    """One image, as the bytes of a PNG or JPEG file.

    Args:
        data: the file; a str is base64.
        format: "png" or "jpeg".
        expected_tokens: the number of positions that it takes. A model that makes another number
            of them refuses the datum.

    Raises:
        DatumError: no bytes, another format, or a number of tokens that is not positive.
    """

    data: bytes = field(repr=False)
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", base64.b64decode(self.data))
        given = isinstance(self.data, bytes) and bool(self.data)
        require_type(given, "ImageChunk.data", "the bytes of a PNG or JPEG file", self.data)
        known = self.format in ("png", "jpeg")
        require_type(known, "ImageChunk.format", '"png" or "jpeg"', self.format)
        count = self.expected_tokens
        counted = count is None or (isinstance(count, (int, np.integer)) and count > 0)
        require_type(counted, "ImageChunk.expected_tokens", "an integer >= 1, or None", count)

    @property
    def length(self) -> int:
        """Number of positions.

        Raises:
            DatumError: expected_tokens is None.
        """
        if self.expected_tokens is None:
            raise DatumError(
                "ImageChunk.expected_tokens",
                "missing, so the length is not known",
                expected="the number of positions that the image takes",
                fix="Make the chunk with the model's ImageReader, which counts them.",
            )
        return int(self.expected_tokens)

    @functools.cached_property
    def key(self) -> int:
        """61 bits of the SHA-256 of the file: equal for equal images."""
        return key_of(self.data)


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageChunk


@dataclass(frozen=True)
class ModelInput:
    """What the model reads: chunks of token ids and images, in order.

    `from_ints` builds it from a list. An image takes as many positions as it has expected_tokens.

    Raises:
        DatumError: chunks that are not a list of EncodedTextChunk and ImageChunk (the SDK's own are
            converted).
    """

    chunks: Sequence[ModelInputChunk]

    def __post_init__(self) -> None:
        rule, listed = "a list of chunks", isinstance(self.chunks, (list, tuple))
        require_type(listed, "ModelInput.chunks", rule, self.chunks)
        if not all(isinstance(chunk, (EncodedTextChunk, ImageChunk)) for chunk in self.chunks):
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
        """All token ids, in order.

        Raises:
            DatumError: there is an image.
        """
        for i, chunk in enumerate(self.chunks):
            text = isinstance(chunk, EncodedTextChunk)
            require_type(text, f"ModelInput.chunks[{i}]", "text only", chunk)
        return self.ids()

    @property
    def images(self) -> list[ImageChunk]:
        """Its images, in order."""
        return [chunk for chunk in self.chunks if isinstance(chunk, ImageChunk)]

    def ids(self, image: int = 0) -> list[int]:
        """One id per position: of text the token ids, at all positions of images `image`."""
        return [
            token
            for chunk in self.chunks
            for token in ([image] * chunk.length if isinstance(chunk, ImageChunk) else chunk.tokens)
        ]

    def keys(self) -> list[int]:
        """One integer per position, with which inputs can be compared as lists of token ids can.

        Of text the token ids. Of an image negative numbers made from its key: an odd one at its
        first position, the same even one at the others, so that two equal images in a row stay two.
        """
        keys: list[int] = []
        for chunk in self.chunks:
            if isinstance(chunk, ImageChunk):
                first = -2 * chunk.key - 1
                keys += [first, *[first - 1] * (chunk.length - 1)]
            else:
                keys += chunk.tokens
        return keys

    def first(self, length: int) -> ModelInput:
        """Return the first `length` positions, without an image that does not fit whole.

        An image before the cut is left out too: nothing comes after it that could be predicted.
        """
        chunks: list[ModelInputChunk] = []
        for chunk in self.chunks:
            if chunk.length > length:
                if isinstance(chunk, EncodedTextChunk) and length:
                    chunks.append(EncodedTextChunk(list(chunk.tokens)[:length]))
                break
            chunks.append(chunk)
            length -= chunk.length
        else:
            return self
        while chunks and isinstance(chunks[-1], ImageChunk):
            chunks.pop()
        return ModelInput(chunks)

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(chunk.length for chunk in self.chunks)

    def __len__(self) -> int:
        """Number of positions, so that prompts with images are used as lists of token ids are."""
        return self.length

    def __add__(self, tokens: Sequence[int]) -> ModelInput:
        """This input, followed by token ids."""
        return self.append(EncodedTextChunk(tokens=tokens))

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


def key_of(data: bytes) -> int:
    """61 bits of the SHA-256 of a file."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 3


def own_input(value: Any) -> Any:
    """Convert the SDK's ModelInput, recognised by its list of chunks; return other values as is.

    Raises:
        DatumError: a chunk that is neither text nor an image.
    """
    if isinstance(value, ModelInput) or not isinstance(getattr(value, "chunks", None), list):
        return value
    return ModelInput(value.chunks)


def _own_chunks(chunks: Sequence[Any]) -> list[ModelInputChunk]:
    """Convert the SDK's chunks, recognised by their type tag."""
    own: list[ModelInputChunk] = []
    for i, chunk in enumerate(chunks):
        kind = getattr(chunk, "type", None)
        if kind == "image" and hasattr(chunk, "data"):
            own.append(ImageChunk(chunk.data, chunk.format, chunk.expected_tokens))
            continue
        text = kind == "encoded_text" and hasattr(chunk, "tokens")
        require_type(text, f"ModelInput.chunks[{i}]", "EncodedTextChunk or ImageChunk", chunk)
        own.append(EncodedTextChunk(chunk.tokens))
    return own


def require_type(good: bool, where: str, rule: str, value: object) -> None:
    """Raise DatumError for a value of the wrong type, unless it is `good`."""
    if not good:
        got = f"{type(value).__name__} {value!r:.80}"
        raise DatumError(where, "wrong type", expected=rule, got=got)
