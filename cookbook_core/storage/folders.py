"""Write a folder whole or not at all: into a temporary neighbour, synced to disk, then renamed.

with beside(folder) as temporary:
    ...  # write the files
    sync(temporary)
    put_in_place(temporary, folder)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Make a temporary folder next to `folder`; whatever is left of it at the end is deleted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flush a folder's files and its list of names to disk."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    """Flush a folder's list of names to disk; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an older `folder` is deleted after that, or kept on error."""
    if not folder.exists():
        temporary.rename(folder)
        _sync_names(folder.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
