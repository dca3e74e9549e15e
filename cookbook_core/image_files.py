"""Image files: measured when a dataset's rows are read, and read when a batch needs them.

A file of the dataset stays where it is. Bytes that come with a row go to one temporary file of this
process, each once, so that images do not sit in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cookbook_core.errors import DataError, DatumError
from cookbook_core.types import ImageChunk
from cookbook_core.types.model_input import key_of

MOST_PIXELS = 89_478_485
"""Of one image, Pillow's own limit: a file of a few kilobytes can say that it has more."""
FORMATS: dict[str, Literal["png", "jpeg"]] = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg"}
"""What a chunk's format is, by Pillow's name; phones write several images to one JPEG."""

_ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
"""Where Pillow finds the orientation of a PNG."""
_READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_UPRIGHT = (None, 0, 1)
_ENDS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}
_FORMS = "a file's path, its bytes, {bytes, path}, or a PIL image"


@dataclass(frozen=True)
class _OnDisk:
    """A file of the dataset, as it was when it was measured."""

    path: Path
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> _OnDisk:
        return cls(path, cls._stamp_of(path))

    @staticmethod
    def _stamp_of(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns

    def stream(self) -> BinaryIO:
        return open(self.path, "rb")

    def read(self, place: str) -> bytes:
        try:
            now, data = self._stamp_of(self.path), self.path.read_bytes()
        except OSError as error:
            what = "the image file cannot be read any more"
            raise DatumError(place, what, got=error, fix="Put it back, and resume.") from error
        if now != self.stamp:
            what = "the image file is not the one that was counted when the rows were read"
            fix = "Put the old one back to resume, or start over."
            raise DatumError(place, what, got=self.path, fix=fix)
        return data


@dataclass(frozen=True)
class _InRow:
    """Bytes that came with a row, in this process's temporary file."""

    offset: int
    length: int

    def stream(self) -> BinaryIO:
        return io.BytesIO(self.read(""))

    def read(self, place: str) -> bytes:
        del place
        return _spool.read(self)


@dataclass(frozen=True)
class _InMemory:
    """Bytes that are needed once, as those of a request to a server."""

    data: bytes = field(repr=False)

    def stream(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def read(self, place: str) -> bytes:
        del place
        return self.data


class _Spool:
    """One temporary file, which the system deletes with the process."""

    def __init__(self) -> None:
        self._file: Any = None
        self._known: dict[bytes, _InRow] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes) -> _InRow:
        digest = hashlib.sha256(data).digest()
        with self._lock:
            if digest not in self._known:
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  kept open
                offset = self._file.seek(0, os.SEEK_END)
                self._file.write(data)
                self._known[digest] = _InRow(offset, len(data))
            return self._known[digest]

    def read(self, place: _InRow) -> bytes:
        with self._lock:
            self._file.seek(place.offset)
            return self._file.read(place.length)


_spool = _Spool()
_decoding = threading.Lock()
"""One image at a time: a small file may be large in memory, and a server is sent many at once."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a dataset's row; equal to another of the same file.

    place: its row and column, for errors.
    width, height: in pixels, of the image turned as its EXIF orientation says.
    format: of `data`.
    rewritten: the file is none that a chunk can hold, or is to be turned: `data` is a new PNG.
    """

    place: str = field(compare=False)
    width: int
    height: int
    format: Literal["png", "jpeg"]
    rewritten: bool
    _source: Any = field(repr=False)

    def data(self) -> bytes:
        """The bytes of a PNG or JPEG file: those of the file, except where they are rewritten.

        Raises:
            DatumError: the file is gone, or is another than was measured.
        """
        data = self._source.read(self.place)
        if not self.rewritten:
            return data
        with _decoding:
            return as_png(opened(data, self.place), self.place)

    @cached_property
    def key(self) -> int:
        """That of a chunk with the same data."""
        return key_of(self.data())


class StoredImage(ImageChunk):
    """An image whose bytes are read each time that they are asked for, and not kept."""

    def __init__(self, file: ImageFile, expected_tokens: int) -> None:
        for name, value in (
            ("file", file),
            ("format", file.format),
            ("expected_tokens", expected_tokens),
            ("type", "image"),
        ):
            object.__setattr__(self, name, value)

    file: ImageFile

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bytes of the file; raises DatumError as `ImageFile.data`."""
        return self.file.data()

    @property
    def key(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `ImageChunk.key`; the file is read one time."""
        return self.file.key


def image_file(value: Any, place: str, folder: Path | None = None) -> ImageFile:
    """Find and measure an image of a row.

    Args:
        value: a file's path, its bytes, {"bytes": ..., "path": ...}, a PIL image, or an ImageFile,
            which is returned.
        place: its row and column, for errors.
        folder: where relative paths start; None: at the working directory.
    Raises:
        DataError: none of these, no such file, not an image, too many pixels, or a file that was
            cut short.
    """
    if isinstance(value, ImageFile):
        return value
    return _opened_once(_source_of(value, place, folder), place)


def image_in_memory(data: bytes, place: str) -> ImageFile:
    """Measure an image whose bytes are freed with it.

    Raises:
        DataError: not an image, too many pixels, or a file that was cut short.
    """
    return _opened_once(_InMemory(data), place)


def _opened_once(source: Any, place: str) -> ImageFile:
    try:
        with source.stream() as file:
            return _measured(source, file, place)
    except DatumError as error:
        raise DataError(**error.slots()) from error
    except OSError as error:
        raise _no_file(place, error) from error


def _no_file(place: str, error: OSError) -> DataError:
    fix = "Paths are relative to the dataset's file."
    return DataError(place, "no such image file", got=f"{error}"[:200], fix=fix)


def _source_of(value: Any, place: str, folder: Path | None) -> _OnDisk | _InRow:
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return _spool.add(bytes(value))
    if isinstance(value, (str, Path)) and str(value):
        if "://" in str(value) or str(value).startswith("data:"):
            fix = "Download it, and give the file's path."
            raise DataError(place, "not a file", expected=_FORMS, got=f"{value!r:.80}", fix=fix)
        try:
            return _OnDisk.of((folder or Path()) / Path(value).expanduser())
        except OSError as error:
            raise _no_file(place, error) from error
    if hasattr(value, "convert") and hasattr(value, "getexif"):
        try:
            return _spool.add(as_png(value, place))
        except DatumError as error:
            raise DataError(**error.slots()) from error
    got = f"{type(value).__name__} {value!r:.80}"
    fix = "Rename the column if it holds no images."
    raise DataError(place, "not an image", expected=_FORMS, got=got, fix=fix)


def _measured(source: Any, file: BinaryIO, place: str) -> ImageFile:
    """Read an image's header, and all of it only if it does not end as its format does."""
    with _header(file, place) as picture:
        form = FORMATS.get(picture.format)
        # of a PNG Pillow's getexif() decodes the pixels where the header has none
        exif = form != "png" or not _ORIENTED.isdisjoint(picture.info)
        try:
            turned = picture.getexif().get(_ORIENTATION) if exif else None
        except Exception as error:
            raise _unreadable(place, error) from error
        width, height = picture.size
    file.seek(-8, os.SEEK_END)
    if not form or not file.read().endswith(_ENDS[form]):
        file.seek(0)
        with _decoding:
            opened(file.read(), place)
    if turned in (5, 6, 7, 8):
        width, height = height, width
    rewritten = form is None or turned not in _UPRIGHT
    kind = "png" if rewritten or form is None else form
    return ImageFile(place, width, height, kind, rewritten, source)


# ---- decoding ------------------------------------------------------------------------------------


def rgb(chunk: ImageChunk, where: str) -> Any:
    """Decode an image as a PIL image in RGB, turned as its EXIF orientation says.

    Raises:
        DatumError: a broken file, another format than the chunk names, or too many pixels.
    """
    return upright(opened(chunk.data, where, chunk.format), where)


def upright(picture: Any, where: str) -> Any:
    """A PIL image in RGB, turned as its EXIF orientation says."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        raise _unreadable(where, error) from error


def as_png(picture: Any, where: str) -> bytes:
    """A PIL image as the bytes of a PNG, turned as its EXIF orientation says."""
    file = io.BytesIO()
    upright(picture, where).save(file, "PNG", compress_level=1, exif=b"")
    return file.getvalue()


def opened(data: bytes, where: str, form: str = "") -> Any:
    """A PIL image whose pixels are decoded.

    Args:
        data: a file.
        where: the image's name in errors.
        form: "png" or "jpeg"; "" takes other formats too.
    Raises:
        DatumError: a broken file, one of another format, or too many pixels.
    """
    picture = _header(io.BytesIO(data), where)
    if form and FORMATS.get(picture.format) != form:
        what, got = "another format than the chunk names", f"a {picture.format} file"
        raise DatumError(where, what, expected=form.upper(), got=got)
    try:
        picture.load()
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise _unreadable(where, error) from error
    return picture


def _header(file: BinaryIO, where: str) -> Any:
    """A PIL image whose pixels are not decoded yet."""
    from PIL import Image

    try:
        picture = Image.open(file, formats=_READ)  # the reader of JPEG finds MPO
    except Exception as error:
        raise _unreadable(where, error) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise _too_many(where, f"{picture.width} x {picture.height}")
    return picture


def _unreadable(where: str, error: Exception) -> DatumError:
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        return _too_many(where, str(error))
    return DatumError(
        where,
        "the image cannot be read",
        expected="a whole PNG or JPEG file",
        got=f"{type(error).__name__}: {error}",
        fix="Look for a download that was cut short; write other formats as PNG.",
    )


def _too_many(where: str, got: str) -> DatumError:
    return DatumError(
        where,
        "the image has too many pixels to be decoded",
        expected=f"at most {MOST_PIXELS:,} pixels",
        got=got,
        fix="Resize it.",
    )
