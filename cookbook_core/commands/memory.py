"""`cookbook memory`: what fits into a device's memory, before a model is downloaded or loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cookbook_core.errors import ConfigError

_UNITS = {"": 1e9, "gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
_COLUMNS = (
    "model", "device", "dtype", "weights, GB", "adapter, GB", "whole graphs, tokens",
    "longest row, tokens", "KV cache, tokens",
)  # fmt: skip


def table(models: Sequence[str], memories: Sequence[str], rank: int = 32, shards: int = 1) -> str:
    """A Markdown table of what fits, one row per model, device and dtype.

    Args:
        models: folders, hub names or "tiny".
        memories: sizes of devices, such as "24GB"; none takes this machine's device.
        rank: of the LoRA adapter in training, on all linear layers.
        shards: processes of a run with --shard, one for each device; 1: a run without.
    Raises:
        ConfigError: a size that cannot be read, or a number out of range.
        ModelError: no such model.
    """
    if shards < 1:
        raise ConfigError("--shard", "too small", expected="1 or more processes", got=shards)
    totals = {memory: read_size(memory) for memory in memories} or _this_device()
    from cookbook_core.backend.local import memory_table

    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for model in models:
        sizes = memory_table.measure(model, rank, shards=shards)
        name, adapter = model.rstrip("/").rpartition("/")[2], f"{sizes.adapter / 1e9:.2f}"
        for memory, total in totals.items():
            for dtype, weights in sizes.weights.items():
                fit = sizes.fit(dtype, total)
                tokens = (
                    f"{fit.whole:,}" if fit.whole else "none",
                    _longest(fit.recomputed, sizes.context),
                    f"{fit.sampling:,}" if fit.sampling else "none",
                )
                rows.append((name, memory, dtype, f"{weights / 1e9:.2f}", adapter, *tokens))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _longest(tokens: int, context: int | None) -> str:
    """A length in tokens, at most the one that the model was built for."""
    if context is not None and tokens >= context:
        return f"{context:,}, all"
    return f"{tokens:,}" if tokens else "does not fit"


def read_size(text: str) -> float:
    """Bytes of a size such as "24GB", "80 GiB" or "24" (GB).

    Raises:
        ConfigError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        where, rule = "--device_memory", 'a number above 0 and GB, GiB, MB or MiB, such as "24GB"'
        raise ConfigError(where, "not a size", expected=rule, got=repr(text), fix="Write 24GB.")
    return float(found[1]) * _UNITS[found[2]]


def _this_device() -> dict[str, float]:
    """Total memory of the device that dtype="auto" would load onto."""
    from cookbook_core.backend.local.model.loading import choose_device
    from cookbook_core.backend.local.model.memory import total_bytes

    device = choose_device("auto")
    total = total_bytes(device)
    return {f"{device.type}, {total / 1e9:.0f} GB": float(total)}
