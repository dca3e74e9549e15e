"""The manifest of a checkpoint folder: versions, and the size and hash of each file.

    manifest.json   {"format": 1, "versions": {...}, "base_model": {...}, "files": {name: {...}}}

A folder is complete if it has every file of its manifest with the size and hash given there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
_PACKAGES = ("cookbook-core", "torch", "transformers", "peft", "safetensors", "numpy")
_COPY_AGAIN = "Copy the whole folder again, or use another checkpoint."


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results depend on."""
    by_name = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_name[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return by_name


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of the files in `folder`, with the entries of `about` added."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.iterdir())
        if path.name != NAME
    }
    manifest = {"format": FORMAT, "versions": versions(), **about, "files": files}
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8", newline="\n")


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; None if it has none, as a folder written by peft.

    Raises:
        CheckpointError: the file cannot be read, is not a manifest, or has a newer format.
    """
    file = folder / NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{file}: format",
                "is newer",
                expected=f"{FORMAT} or less",
                got=manifest["format"],
                fix="Update cookbook-core.",
            )
        files = manifest["files"]
        if not all(isinstance(about["bytes"], int) and about["sha256"] for about in files.values()):
            raise ValueError("files without sizes or hashes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            str(file), "damaged", expected="a manifest", got=error, fix=_COPY_AGAIN
        ) from error
    return manifest


def check(folder: Path) -> dict[str, Any] | None:
    """Read the manifest and compare every file with it; None if there is no manifest.

    Raises:
        CheckpointError: a file is missing, or its size or hash differs.
    """
    manifest = read(folder)
    for name, about in (manifest or {"files": {}})["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(str(path), "missing", fix=_COPY_AGAIN)
        size = path.stat().st_size
        if size != about["bytes"]:
            raise CheckpointError(
                str(path),
                "cut short or overwritten",
                expected=f"{about['bytes']} bytes",
                got=size,
                fix=_COPY_AGAIN,
            )
        digest = _hash(path)
        if digest != about["sha256"]:
            raise CheckpointError(
                str(path),
                "damaged",
                expected=f"sha256 {about['sha256'][:12]}...",
                got=digest[:12],
                fix=_COPY_AGAIN,
            )
    return manifest


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
