"""The images of a row: its columns image and images, and parts of its messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook_core.data.files import Row, are_messages
from cookbook_core.errors import DataError
from cookbook_core.image_files import ImageFile, image_file

IMAGE_COLUMNS = ("image", "images")
"""Columns that are read beside the others where a row has them: one image, or a list."""

_IN_PART = ("image", "path", "bytes")


def with_image_files(where: str, row: Row, folder: Path | None = None) -> Row:
    """Put an ImageFile in place of each image of a row.

    Args:
        where: the row's place.
        row: with the columns of IMAGE_COLUMNS, or messages with parts such as {"type": "image"},
            a placeholder, or {"type": "image", "image": FILE}; FILE as `image_file` takes it.
        folder: of the dataset's file, where relative paths start.
    Returns:
        The row; itself where it has no images.
    Raises:
        DataError: an image that cannot be measured; names the row and the column.
    """
    changed: Row = {}
    for name, value in row.items():
        if name == "image" and value is not None and value != "":
            changed[name] = image_file(value, f"{where}, column image", folder)
        elif name == "images" and value:
            if not isinstance(value, (list, tuple)):
                rule, got = "a list of images", f"{type(value).__name__} {value!r:.80}"
                fix = "Name the column image if it holds one."
                raise DataError(
                    f"{where}, column images", "not a list", expected=rule, got=got, fix=fix
                )
            changed[name] = [
                image_file(item, f"{where}, column images[{i}]", folder)
                for i, item in enumerate(value)
            ]
        elif isinstance(value, list) and are_messages(value) and any(map(_pictured, value)):
            changed[name] = [
                _with_files(f"{where}, column {name}[{i}]", message, folder)
                for i, message in enumerate(value)
            ]
    return {**row, **changed} if changed else row


def _pictured(message: Any) -> bool:
    """Whether a message has parts that carry an image."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(parts, list) and any(_carried(part) for part in parts)


def _carried(part: Any) -> list[Any]:
    """The image that a part carries, if any."""
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return []
    return [part[key] for key in _IN_PART if part.get(key) is not None]


def _with_files(spot: str, message: Any, folder: Path | None) -> Any:
    """A message with an ImageFile in each part that carries an image."""
    if not _pictured(message):
        return message
    parts = [
        {"type": "image", "image": image_file(_carried(part)[0], f"{spot} content[{j}]", folder)}
        if _carried(part)
        else part
        for j, part in enumerate(message["content"])
    ]
    return {**message, "content": parts}


def row_images(row: Mapping[str, Any]) -> list[ImageFile]:
    """The images of a row's columns, in order; of a row that was not loaded, measured now.

    Raises:
        DataError: both columns have a value, or an image that cannot be measured.
    """
    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
    if len(given) > 1 and given["images"]:
        fix = "Write all of them in images."
        raise DataError("images", "images in two columns", expected="image or images", fix=fix)
    found = with_image_files(getattr(row, "where", "row"), given)
    return [*([found["image"]] if found.get("image") else []), *(found.get("images") or [])]


def holds_images(feature: Any) -> bool:
    """Whether a feature of the `datasets` library, or one inside it, is an Image."""
    if isinstance(feature, Mapping):
        return any(map(holds_images, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(holds_images, feature))
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Image" or (inner is not None and holds_images(inner))
