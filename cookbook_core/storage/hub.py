"""The Hugging Face hub: asked for names that are nothing on this machine, and not in vain."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

TIMEOUT = 5.0
"""Seconds the hub has for its first answer."""


@contextlib.contextmanager
def asking_hub(name: str, kind: str = "") -> Iterator[bool]:
    """For what is loaded in this block; where the hub does not answer, from its cache at once.

    Without this, each request of `datasets` and `transformers` to a hub out of reach is tried five
    times, half a minute in all.

    Args:
        name: what is asked for.
        kind: what it is not on this machine, "file" or "folder"; with it, that is said on stderr.
    Yields:
        Whether the hub is within reach.
    """
    from huggingface_hub import constants, get_session

    reached = not constants.HF_HUB_OFFLINE
    if reached:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception:  # of whichever library carries the request
            reached = False
    if kind:
        what = "asking the hub" if reached else "the hub is out of reach, so looking in its cache"
        print(f"{name}: no such {kind} here; {what}", file=sys.stderr)
    datasets = sys.modules.get("datasets")
    places = [constants, *([datasets.config] if datasets else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = not reached
    try:
        yield reached
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
