"""Counts of operators, which stand for launches and syncs on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Counts operators other than views: on a GPU, launches (of `_foreach`: a few) and syncs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
