"""The images of a row: its columns image and images, and parts of its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cookbook_core.data.files import Row, are_messages
from cookbook_core.errors import DataError
from cookbook_core.image_files import ImageFile, image_file

IMAGE_COLUMNS = ("image", "images")
"""Columns that are read beside the others where a row has them: one image, or a list."""

_KEYS = ("image", "bytes", "path")
"""Of a part that carries its image, where that may be."""


def with_image_files(where: str, row: Row, folder: Path | None = None) -> Row:
    """Put an ImageFile in place of each image of a row.

    Args:
        where: the row's place.
        row: with the columns of IMAGE_COLUMNS, or messages with parts such as {"type": "image"},
            a placeholder, or {"type": "image", "image": FILE}; FILE as `image_file` takes it.
        folder: of the dataset's file, where relative paths start.
    Returns:
        The row; itself where it has no images. Placeholders are filled with the images of the
        columns in order, which the row then has no longer.
    Raises:
        DataError: an image that cannot be measured, or another number of images than placeholders;
            names the row and the column.
    """
    talks = {
        name: value
        for name, value in row.items()
        if isinstance(value, list) and are_messages(value) and any(map(_image_parts, value))
    }
    if not talks and not any(row.get(name) for name in IMAGE_COLUMNS):
        return row
    files = column_images(row, where, folder)
    kept = {name: row[name] for name in row if name not in IMAGE_COLUMNS}
    made: Row = {}
    used = False
    for name, messages in talks.items():
        spot = f"{where}, column {name}"
        parts = [part for message in messages for part in _image_parts(message)]
        if (empty := sum(carried(part) is None for part in parts)) not in (0, len(files)):
            raise DataError(
                spot,
                "another number of placeholders than images",
                expected=f"{len(files)}, the images of the row",
                got=empty,
                fix='Write one {"type": "image"} part for each image, or none at all.',
            )
        rest = iter(files if empty else ())
        made[name] = [
            _filled(message, rest, f"{spot}[{i}]", folder) for i, message in enumerate(messages)
        ]
        used = used or empty > 0
    rest = {"image": files[0]} if row.get("image") else {"images": files}
    return {**kept, **made, **(rest if files and not used else {})}


def column_images(
    row: Mapping[str, Any], where: str = "", folder: Path | None = None
) -> list[ImageFile]:
    """The images of a row's columns, in order.

    Raises:
        DataError: both columns have a value, no list in images, or an image that cannot be
            measured.
    """
    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name)}
    places = {name: f"{where}, column {name}".removeprefix(", ") for name in given}
    if len(given) > 1:
        fix = "Write all of them in images."
        raise DataError(places["images"], "a column image beside it", fix=fix)
    if "image" in given:
        return [image_file(given["image"], places["image"], folder)]
    values = given.get("images", [])
    if not isinstance(values, (list, tuple)):
        rule, got = "a list of images", f"{type(values).__name__} {values!r:.80}"
        fix = "Name the column image if it holds one."
        raise DataError(places["images"], "not a list", expected=rule, got=got, fix=fix)
    return [image_file(v, f"{places['images']}[{i}]", folder) for i, v in enumerate(values)]


def _image_parts(message: Any) -> list[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]


def carried(part: Mapping[str, Any]) -> Any:
    """The image that a part carries, None if it is a placeholder."""
    return next((part[key] for key in _KEYS if part.get(key) is not None), None)


def _filled(message: Any, rest: Iterator[ImageFile], spot: str, folder: Path | None) -> Any:
    """A message with an ImageFile in each image part: its own, or the next of `rest`."""
    images = _image_parts(message)
    if not images:
        return message
    parts = [
        {
            "type": "image",
            "image": next(rest)
            if (own := carried(part)) is None
            else image_file(own, f"{spot} content[{j}]", folder),
        }
        if part in images
        else part
        for j, part in enumerate(message["content"])
    ]
    return {**message, "content": parts}


def holds_images(feature: Any) -> bool:
    """Whether a feature of the `datasets` library, or one inside it, is an Image."""
    if isinstance(feature, Mapping):
        return any(map(holds_images, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(holds_images, feature))
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Image" or (inner is not None and holds_images(inner))
