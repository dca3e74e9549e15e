"""Names of clients, which are the folders they save to: model-0, model-1, ..."""

from __future__ import annotations

import itertools
import re
import threading
from pathlib import Path


class ModelIds:
    """Hands out names below one folder, each once.

    Args:
        folder: where checkpoints go. Folders that are there already are some other run's: their
            names are passed over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given: set[str] = set()
        self._lock = threading.Lock()

    def next(self, continued: Path | None = None) -> str:
        """A name for a new client.

        Args:
            continued: the checkpoint it goes on with, if it does: below FOLDER/model-K it is
                model-K again, unless another client of this service has that name.
        """
        names = (f"model-{number}" for number in itertools.count())
        with self._lock:
            own = continued and self._owner(continued)
            if not own or own in self._given:
                own = next(
                    name
                    for name in names
                    if name not in self._given and not (self._folder / name).exists()
                )
            self._given.add(own)
        return own

    def _owner(self, checkpoint: Path) -> str:
        """The client that saved it here; "" for one from elsewhere."""
        folder, checkpoint = self._folder.resolve(), checkpoint.resolve()
        if not checkpoint.is_relative_to(folder):
            return ""
        first = checkpoint.relative_to(folder).parts[:1]
        return first[0] if first and re.fullmatch(r"model-\d+", first[0]) else ""
