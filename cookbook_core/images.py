"""Read images: the bytes of a file to what one model's own processor makes of them.

Pillow does all of it. A model's image takes several positions of a sequence; the processor says how
many, and which token ids they have.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cookbook_core.errors import DatumError, ModelError
from cookbook_core.image_files import FORMATS, ImageFile, StoredImage, opened, rgb
from cookbook_core.storage.hub import asking_hub
from cookbook_core.types import EncodedTextChunk, ImageChunk, ModelInput

KEPT_BYTES = 1 << 28
"""Most bytes of pixels kept of images that were read last."""
KEPT_SIZES = 4096
"""Most sizes, and most images, whose positions are kept."""

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


@dataclass(frozen=True)
class Written:
    """How a processor writes an image of some size.

    text: in place of the placeholder.
    ids: token ids of the image's positions, without those of text around them.
    """

    text: str
    ids: tuple[int, ...]


class ImageReader:
    """The image side of one model's processor; can be used by several threads.

    Args:
        processor: see `load_processor`.
    Attributes:
        placeholder: what stands for an image in a rendered chat template.
        longest: positions of the image that takes the most, of those measured so far.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.placeholder: str = processor.image_token
        self.longest = 0
        self._written: OrderedDict[Any, Written] = OrderedDict()
        self._kept: OrderedDict[int, Pixels] = OrderedDict()
        self._counts: OrderedDict[int, int] = OrderedDict()
        """Positions of the images read last, by key."""
        self._lock = threading.Lock()

    def chunk(self, data: bytes, where: str = "image") -> ImageChunk:
        """The bytes of a PNG or JPEG file as a chunk with the number of positions that it takes.

        Raises:
            DatumError: not such a file, or one that the model's processor refuses.
        """
        picture = opened(data, where)
        chunk = ImageChunk(data, FORMATS.get(picture.format, "png"))
        return ImageChunk(data, chunk.format, len(self.pixels(chunk, where).ids))

    def check(self, chunk: ImageChunk, where: str) -> None:
        """Read an image, unless it was read before, and check its number of positions.

        Raises:
            DatumError: a broken file, or another number than expected_tokens.
        """
        where = _place(chunk, where)
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
            _keep(self._counts, chunk.key, len(found.ids))
            self._kept[chunk.key] = found
            total = sum(pixels.nbytes for pixels in self._kept.values())
            while total > KEPT_BYTES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].nbytes
            return found

    def stored(self, file: ImageFile) -> StoredImage:
        """A chunk of an image whose positions are counted by its size: the file is not read.

        Raises:
            DatumError: a size that the model's processor refuses.
        """
        return StoredImage(file, len(self.written(file).ids))

    def written(self, file: ImageFile) -> Written:
        """How the processor writes an image of this size.

        The processor's own count is fast; it is asked with a blank image once per count.
        """
        size = file.height, file.width
        with self._lock:
            found = self._written.get(size)
            if found is None:
                key = self._count(file)
                found = self._written.get(key) or self._write(file)
                _keep(self._written, key, found)
                _keep(self._written, size, found)
            self.longest = max(self.longest, len(found.ids))
            return found

    def _count(self, file: ImageFile) -> Any:
        """What the processor says of an image's height and width; such have as many positions."""
        processor, size = self._processor, (file.height, file.width)
        with _refused(file.place, file.width, file.height):
            if hasattr(processor, "_get_num_multimodal_tokens"):
                counts = processor._get_num_multimodal_tokens(image_sizes=[size])
                return "tokens", *counts.num_image_tokens, *counts.num_image_patches
            if hasattr(processor.image_processor, "get_number_of_image_patches"):
                return "patches", processor.image_processor.get_number_of_image_patches(*size, {})
        return size

    def _write(self, file: ImageFile) -> Written:
        from PIL import Image

        blank = Image.new("RGB", (file.width, file.height))
        batch = self._processed(blank, file.place, return_text_replacement_offsets=True)
        (replaced,) = batch["text_replacement_offsets"][0]
        ids = self._without_text_around(batch["input_ids"][0].tolist())
        return Written(replaced["replacement"], tuple(ids))

    def own_inputs(self, text: str, images: Sequence[ImageChunk]) -> dict[str, Any]:
        """The processor's own output for images, each after a copy of `text`, and one at the end:
        the model's arguments."""
        processor = self._processor
        written = processor.image_token.join([text] * (len(images) + 1))
        pictures = [rgb(image, "image") for image in images]
        return dict(processor(text=[written], images=[pictures], return_tensors="pt"))

    def _read(self, chunk: ImageChunk, where: str) -> Pixels:
        where = _place(chunk, where)
        batch = self._processed(rgb(chunk, where), where)
        ids = self._without_text_around(batch["input_ids"][0].tolist())
        inputs = {name: value for name, value in batch.items() if name not in _NOT_PIXELS}
        return Pixels(tuple(ids), inputs)

    def _processed(self, picture: Any, where: str, **options: Any) -> Any:
        """The processor's output for one image alone."""
        with _refused(where, picture.width, picture.height):
            return self._processor(
                text=[self.placeholder],
                images=[picture],
                add_special_tokens=False,
                return_tensors="pt",
                **options,
            )

    def _without_text_around(self, ids: list[int]) -> list[int]:
        """Leave out what a processor puts around an image in plain text: blank lines."""
        tokenizer = self._processor.tokenizer
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        at = [i for i, token in enumerate(ids) if token in added]
        return ids[at[0] : at[-1] + 1]


def cut_at(
    ids: Sequence[int], images: Sequence[tuple[ImageChunk, Sequence[int]]]
) -> ModelInput | int:
    """Token ids in which images are written out, as text and image chunks.

    Args:
        ids: `(T,)`.
        images: in order, each with the ids of its own positions.
    Returns:
        The input; or the index of the first image whose ids are not among the others.
    """
    chunks: list[Any] = []
    start, ids = 0, list(ids)
    for n, (image, own) in enumerate(images):
        own, length = list(own), len(own)
        ends = range(start, len(ids) - length + 1)
        at = next((i for i in ends if ids[i : i + length] == own), None)
        if at is None:
            return n
        chunks += [EncodedTextChunk(ids[start:at]), image]
        start = at + length
    chunks.append(EncodedTextChunk(ids[start:]))
    return ModelInput([chunk for chunk in chunks if chunk.length])


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Put a value at the end, and drop those beyond KEPT_SIZES from the start."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT_SIZES:
        kept.popitem(last=False)


@contextlib.contextmanager
def _refused(where: str, width: int, height: int) -> Iterator[None]:
    """Inside, an error of the model's processor is one of the image."""
    try:
        yield
    except ValueError as error:
        raise DatumError(
            where,
            "refused by the model's image processor",
            got=f"{width} x {height} pixels ({error})",
            fix="Resize or crop the image.",
        ) from error


def _place(chunk: ImageChunk, where: str) -> str:
    """The row and column of an image of a dataset, else `where`."""
    return chunk.file.place if isinstance(chunk, StoredImage) else where


class ModelImages:
    """The images of one model: its reader, loaded on first use.

    A tokenizer carries it as `images`, for the functions that render prompts.

    Args:
        path: a model folder or hub name.
        problem: why the model is given no images; "" if that is not known.
        token: the id that stands for images in the model's input; None if it is not known.
    """

    def __init__(self, path: str, problem: str = "", token: int | None = None) -> None:
        self._path, self._problem, self.token = path, problem, token
        self._reader: ImageReader | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as for another process, loads its own reader."""
        return type(self), (self._path, self._problem, self.token)

    def reader(self) -> ImageReader:
        """The reader of the model's images.

        Raises:
            ModelError: the model reads no images, or its processor cannot be loaded.
        """
        if self._problem:
            fix = "Take a model that reads images, or leave them out."
            raise ModelError("base_model", "it is given no images", got=self._problem, fix=fix)
        with self._lock:
            if self._reader is None:
                self._reader = ImageReader(load_processor(self._path))
            return self._reader

    @property
    def longest(self) -> int:
        """Positions of the longest image measured so far; 0 if there was none."""
        return self._reader.longest if self._reader else 0


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

    with contextlib.nullcontext() if Path(path).is_dir() else asking_hub(path):
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        name: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"].get(kind)
        try:
            own = getattr(transformers, name)
            # transformers reads the parts' names from the signature of __init__
            cls: Any = type(name, (_ImagesOnly, own), {"__init__": own.__init__})
            with _loading, _without_num2words(own):
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


_loading = threading.Lock()


@contextlib.contextmanager
def _without_num2words(processor: Any) -> Iterator[None]:
    """Let SmolVLM's processor be made without a package that only its videos use."""
    module = sys.modules[processor.__module__]
    missing = vars(module).get("num2words", "") is None
    if missing:
        vars(module)["num2words"] = str
    try:
        yield
    finally:
        if missing:
            vars(module)["num2words"] = None
