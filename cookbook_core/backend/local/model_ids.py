"""Names of clients (model-0, model-1, ...), which are also the folders they save to."""

from __future__ import annotations

import itertools
import re
import threading
from pathlib import Path


class ModelIds:
    """Gives each client a name that no other client or earlier run has below one folder.

    Args:
        folder: where checkpoints are saved. Names of folders that already exist are skipped.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def next(self, continued: Path | None = None) -> str:
        """Name a new client.

        Args:
            continued: the checkpoint that it resumes, if any: from FOLDER/model-K the client is
                model-K again, unless another client of this service already has that name.
        """
        names = (f"model-{number}" for number in itertools.count())
        with self._lock:
            own = continued and self._owner(continued)
            if not own or own in self._used:
                own = next(
                    name
                    for name in names
                    if name not in self._used and not (self._folder / name).exists()
                )
            self._used.add(own)
        return own

    def _owner(self, checkpoint: Path) -> str:
        """The name of the client that saved it; "" if it is not below this folder."""
        folder, checkpoint = self._folder.resolve(), checkpoint.resolve()
        if not checkpoint.is_relative_to(folder):
            return ""
        first = checkpoint.relative_to(folder).parts[:1]
        return first[0] if first and re.fullmatch(r"model-\d+", first[0]) else ""
