"""Load from the Hugging Face Hub; use the local cache at once if the Hub is unreachable."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

TIMEOUT = 5.0
"""Seconds to wait for the Hub's first response."""


@contextlib.contextmanager
def asking_hub(name: str, kind: str = "") -> Iterator[bool]:
    """Try the Hub once; if it is unreachable, everything loaded in this block uses the cache alone.

    Without this, `datasets` and `transformers` retry each request to an unreachable Hub five times,
    half a minute in all.

    Args:
        name: the model or dataset to load, for the message.
        kind: "file" or "folder": print on stderr that there is none of this name on this machine;
            "" prints nothing.
    Yields:
        Whether the Hub is reachable.
    """
    from huggingface_hub import constants, get_session

    reachable = not constants.HF_HUB_OFFLINE
    if reachable:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception:  # httpx or requests, by the version of huggingface_hub
            reachable = False
    if kind:
        source = "loading from the Hub" if reachable else "the Hub is unreachable, using its cache"
        print(f"{name}: no such {kind} on this machine; {source}", file=sys.stderr)
    datasets = sys.modules.get("datasets")
    settings = [constants, *([datasets.config] if datasets else [])]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value
