"""Images in conversations: where they stand in the messages, and in the tokens.

The chat template puts a placeholder for each image. What the model's processor writes for an image
goes in its place before the text is encoded, as in the processor itself: tokens of the text around
may merge with it. The tokens are then cut at the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cookbook_core.chat.conversations import Message, text_of
from cookbook_core.data.images import carried
from cookbook_core.errors import DataError, ModelError
from cookbook_core.image_files import ImageFile, StoredImage, image_file
from cookbook_core.images import ImageReader, cut_at

IMAGE_PART = {"type": "image"}
"""Stands for an image in a message's content."""


def as_parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts, without the images that they carry."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(IMAGE_PART) if part["type"] == "image" else part for part in content]


class Images:
    """The images of one conversation or prompt, and how texts with them are encoded.

    Args:
        tokenizer: with the model's `ModelImages` as `images`.
        turns: plain text, or checked messages.
        images: of the row's columns. They fill the placeholders in order; without any, they go
            before the text of the first user message, or before plain text.
    Attributes:
        turns: as they are rendered: with a placeholder for each image.
    Raises:
        DataError: another number of images than placeholders; an image that cannot be measured; or
            a model that reads none.
    """

    def __init__(self, tokenizer: Any, turns: Any, images: Sequence[Any]) -> None:
        self._tokenizer = tokenizer
        self.turns: Any = turns
        self._chunks: list[StoredImage] = []
        self._reader: ImageReader | None = None
        plain = isinstance(turns, str)
        if not images and (plain or not any(isinstance(m.get("content"), list) for m in turns)):
            return
        given = [image_file(value, f"images[{i}]") for i, value in enumerate(images)]
        self.turns, files = (turns, given) if plain else _placed(turns, given)
        if files:
            self._reader = _reader_of(tokenizer, len(files))
            self._chunks = [self._reader.stored(file) for file in files]
        if plain and self._reader and self._reader.placeholder not in turns:
            self.turns = self._reader.placeholder * len(files) + turns

    def expand(self, text: str) -> str:
        """The text with what the processor writes in place of each placeholder.

        Raises:
            DataError: more placeholders than images.
        """
        if self._reader is None:
            return text
        parts = text.split(self._reader.placeholder)
        if len(parts) - 1 > len(self._chunks):
            raise self._miscounted(len(parts) - 1)
        out = [parts[0]]
        for chunk, after in zip(self._chunks, parts[1:], strict=False):
            out += [self._reader.written(chunk.file).text, after]
        return "".join(out)

    def cut(self, tokens: list[int]) -> Any:
        """Token ids in which images are written out, as a ModelInput; without images, as they are.

        Raises:
            DataError: an image that is not among them, or the id that stands for images in text.
        """
        images = getattr(self._tokenizer, "images", None)
        if self._reader is None:
            if images is not None and images.token is not None and images.token in tokens:
                at = tokens.index(images.token)
                raise DataError(
                    "image",
                    "the text has a placeholder of an image, and the row has none",
                    expected="an image for each placeholder",
                    got=repr(self._tokenizer.decode(tokens[max(0, at - 10) : at + 1])),
                    fix="Add the column image or images, or take it out of the text.",
                )
            return tokens
        reader = self._reader
        found = cut_at(tokens, [(c, reader.written(c.file).ids) for c in self._chunks])
        if isinstance(found, int):
            raise self._miscounted(found)
        return found

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def _miscounted(self, placeholders: int) -> DataError:
        return DataError(
            "image",
            "another number of images than the rendered prompt has places for",
            expected=f"{placeholders} images",
            got=len(self._chunks),
            fix="Use a chat template that shows images; write no placeholders into texts.",
        )


def _placed(messages: Sequence[Message], given: list[ImageFile]) -> tuple[Any, list[ImageFile]]:
    """Messages with a placeholder for each image, as text where there is none; and the images."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    places = [part for part in parts if part["type"] == "image"]
    if given and not places:
        places = [IMAGE_PART] * len(given)
        user = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        contents[user] = [*places, *as_parts(contents[user] or "")]
    own = [carried(place) for place in places]
    if own.count(None) != len(given):
        raise DataError(
            "image",
            "another number of images than placeholders",
            expected=f"{own.count(None)} images",
            got=len(given),
            fix='Write one {"type": "image"} part for each image of the column, or none at all.',
        )
    rest = iter(given)
    files = [next(rest) if each is None else image_file(each, "image") for each in own]
    turns = [
        {**message, "content": as_parts(content) if places else text_of(message)}
        if isinstance(content, list)
        else message
        for message, content in zip(messages, contents, strict=True)
    ]
    return turns, files


def _reader_of(tokenizer: Any, count: int) -> ImageReader:
    reason = "its tokenizer came without the model's images"
    try:
        if (images := getattr(tokenizer, "images", None)) is not None:
            return images.reader()
    except ModelError as error:
        reason = f"{error.what}: {error.got}" if error.got else error.what
    raise DataError(
        "image",
        "this model is given no images",
        expected="text only",
        got=f"{count} images ({reason})",
        fix="Take a model that reads images, or drop the columns image and images.",
    )
