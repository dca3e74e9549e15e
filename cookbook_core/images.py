"""Read images: the bytes of a file to what one model's own processor makes of them.

Pillow does all of it. A model's image takes several positions of a sequence; the processor says how
many, and which token ids they have.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cookbook_core.errors import DatumError, ModelError
from cookbook_core.types import ImageChunk

KEPT_BYTES = 1 << 28
"""Most bytes of pixels kept of images that were read last."""
MOST_PIXELS = 89_478_485
"""Of one image, Pillow's own limit: a file of a few kilobytes can say that it has more."""

_FORMATS = {"png": ("PNG",), "jpeg": ("JPEG", "MPO")}
"""Pillow's names of what a chunk's format may be; phones write several images to one JPEG."""
_NOT_PIXELS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Pixels:
    """What a model is given of one image.

    ids: token ids of its positions.
    inputs: tensors for the vision tower, by name.
    """

    ids: tuple[int, ...]
    inputs: dict[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


class ImageReader:
    """The image side of one model's processor; can be used by several threads.

    Args:
        processor: see `load_processor`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._kept: OrderedDict[int, Pixels] = OrderedDict()
        self._counts: dict[int, int] = {}
        """Positions of every image read so far, by key."""
        self._lock = threading.Lock()

    def chunk(self, data: bytes, where: str = "image") -> ImageChunk:
        """The bytes of a PNG or JPEG file as a chunk with the number of positions that it takes.

        Raises:
            DatumError: not such a file, or one that the model's processor refuses.
        """
        picture = _opened(data, where, ("PNG", "JPEG"))
        given = next(name for name, known in _FORMATS.items() if picture.format in known)
        chunk = ImageChunk(data, given)  # pyright: ignore[reportArgumentType]
        return ImageChunk(data, chunk.format, len(self.pixels(chunk, where).ids))

    def check(self, chunk: ImageChunk, where: str) -> None:
        """Read an image, unless it was read before, and check its number of positions.

        Raises:
            DatumError: a broken file, or another number than expected_tokens.
        """
        count = self._counts.get(chunk.key)
        count = len(self.pixels(chunk, where).ids) if count is None else count
        if chunk.expected_tokens != count:
            raise DatumError(
                f"{where}.expected_tokens",
                "not the number of positions that this model makes of the image",
                expected=count,
                got=chunk.expected_tokens,
                fix="Make the chunk with this model's ImageReader, which counts them.",
            )

    def pixels(self, chunk: ImageChunk, where: str = "image") -> Pixels:
        """What the model is given of an image: a function of its bytes.

        Raises:
            DatumError: a broken file, or one that the model's processor refuses.
        """
        with self._lock:
            if chunk.key in self._kept:
                self._kept.move_to_end(chunk.key)
                return self._kept[chunk.key]
            found = self._read(chunk, where)
            self._counts[chunk.key] = len(found.ids)
            self._kept[chunk.key] = found
            total = sum(pixels.nbytes for pixels in self._kept.values())
            while total > KEPT_BYTES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].nbytes
            return found

    def own_inputs(self, text: str, images: Sequence[ImageChunk]) -> dict[str, Any]:
        """The processor's own output for images, each after a copy of `text`, and one at the end:
        the model's arguments."""
        processor = self._processor
        written = processor.image_token.join([text] * (len(images) + 1))
        pictures = [rgb(image, "image") for image in images]
        return dict(processor(text=[written], images=[pictures], return_tensors="pt"))

    def _read(self, chunk: ImageChunk, where: str) -> Pixels:
        picture = rgb(chunk, where)
        processor = self._processor
        try:
            batch = processor(
                text=[processor.image_token],
                images=[picture],
                add_special_tokens=False,
                return_tensors="pt",
            )
        except ValueError as error:
            raise DatumError(
                where,
                "refused by the model's image processor",
                got=f"{picture.width} x {picture.height} pixels ({error})",
                fix="Resize or crop the image.",
            ) from error
        ids = self._without_text_around(batch["input_ids"][0].tolist())
        inputs = {name: value for name, value in batch.items() if name not in _NOT_PIXELS}
        return Pixels(tuple(ids), inputs)

    def _without_text_around(self, ids: list[int]) -> list[int]:
        """Leave out what a processor puts around an image in plain text: blank lines."""
        tokenizer = self._processor.tokenizer
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        at = [i for i, token in enumerate(ids) if token in added]
        return ids[at[0] : at[-1] + 1]


def rgb(chunk: ImageChunk, where: str) -> Any:
    """Decode an image as a PIL image in RGB, turned as its EXIF orientation says.

    Raises:
        DatumError: a broken file, another format than the chunk names, or too many pixels.
    """
    from PIL import ImageOps

    picture = _opened(chunk.data, where, _FORMATS[chunk.format])
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        raise _unreadable(where, error) from error


def _opened(data: bytes, where: str, formats: tuple[str, ...]) -> Any:
    """A PIL image whose pixels are decoded."""
    from PIL import Image

    try:
        # MPO is found by the reader of JPEG
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        size = picture.width * picture.height
        if size <= MOST_PIXELS and picture.format in formats:
            picture.load()
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise _unreadable(where, error) from error
    if size > MOST_PIXELS:
        raise _too_many(where, f"{picture.width} x {picture.height}")
    if picture.format not in formats:
        got = f"a {picture.format} file"
        raise DatumError(where, "another format than the chunk names", expected=formats[0], got=got)
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


# ---- the processor -------------------------------------------------------------------------------


class _ImagesOnly:
    """Makes a processor without its other parts: those for video need torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """Accept a part that is missing."""
        parent: Any = super()
        return None if argument is None else parent.check_argument_for_proper_class(name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls: Any, path: str, *args: Any, **kwargs: Any) -> list[Any]:
        from transformers import AutoImageProcessor, AutoTokenizer

        del args, kwargs
        made = {
            "tokenizer": lambda: AutoTokenizer.from_pretrained(path),
            "image_processor": lambda: AutoImageProcessor.from_pretrained(path, backend="pil"),
        }
        return [made[name]() if name in made else None for name in cls.get_attributes()]


def load_processor(path: str) -> Any:
    """Load the processor of a model folder or hub name, with Pillow for images and without video.

    Raises:
        ModelError: the model has no image processor, or it cannot be loaded.
    """
    import transformers
    from transformers.models.auto import processing_auto

    kind = transformers.AutoConfig.from_pretrained(path).model_type
    name: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"].get(kind)
    try:
        own = getattr(transformers, name)
        # transformers reads the parts' names from the signature of __init__
        cls: Any = type(name, (_ImagesOnly, own), {"__init__": own.__init__})
        return cls.from_pretrained(path)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            "base_model",
            "its image processor cannot be loaded, so it is given no images",
            expected="preprocessor_config.json or processor_config.json beside its weights",
            got=f"{path} ({lines[0]})",
            fix="Copy these files there from the original model.",
        ) from error
