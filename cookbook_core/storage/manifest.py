"""What is in a checkpoint folder, written beside it: versions, sizes and hashes of its files.

    manifest.json   {"format": 1, "versions": {...}, "base_model": {...}, "files": {name: {...}}}

A folder is complete when its manifest says so: every file is there, of that size and hash.
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


def versions() -> dict[str, str]:
    """Of Python and the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Describe the files that are in `folder` now, with `about` beside them."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.iterdir())
        if path.name != NAME
    }
    held = {"format": FORMAT, "versions": versions(), **about, "files": files}
    text = json.dumps(held, indent=2) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8", newline="\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where it has none (a folder that peft wrote).

    Raises:
        CheckpointError: it is not the JSON that `write` writes, or of a newer format.
    """
    file = folder / NAME
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["format"] > FORMAT:
            mend = "Update cookbook-core."
            raise CheckpointError(
                f"{file}: format",
                "is newer",
                expected=f"{FORMAT} or less",
                got=held["format"],
                fix=mend,
            )
        files = held["files"]
        if not all(isinstance(about["bytes"], int) and about["sha256"] for about in files.values()):
            raise ValueError("files without sizes or hashes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(file), "damaged", expected="a manifest", got=error) from error
    return held


def check(folder: Path) -> dict[str, Any] | None:
    """Read the manifest and compare every file with it; None where there is none.

    Raises:
        CheckpointError: a file is missing, of another size or of another hash.
    """
    held = read(folder)
    for name, about in (held or {"files": {}})["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                str(path), "missing", expected="a file of the checkpoint", got="none"
            )
        size = path.stat().st_size
        if size != about["bytes"]:
            raise CheckpointError(
                str(path), "cut short or overwritten", expected=f"{about['bytes']} bytes", got=size
            )
        found = _hash(path)
        if found != about["sha256"]:
            raise CheckpointError(
                str(path), "damaged", expected=f"sha256 {about['sha256'][:12]}...", got=found[:12]
            )
    return held


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
