"""Every exception this package raises on purpose, and the one shape of its message.

    <where>: <what is wrong>. Expected <rule>, got <value>. <the mend>

`where` is a datum index and field (`data[3].loss_fn_inputs["weights"]`), a config field
(`Config.beta`) or a file and line (`train.jsonl:17`). Each class also subclasses the built-in
exception that plain Python code would have raised, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class CookbookError(Exception):
    """Root of all errors raised by cookbook_core and the recipes."""


class DatumError(CookbookError, ValueError):
    """A datum, or a field of one, cannot be trained on as it is."""


class LossError(CookbookError, ValueError):
    """A loss function returned, or did, something no gradient can be taken from."""


class ConfigError(CookbookError, ValueError):
    """A parameter, flag or option has a value that cannot work."""


class DataError(CookbookError, ValueError):
    """A dataset file or row does not hold what the recipe needs."""


class ModelError(CookbookError, ValueError):
    """A base model cannot be loaded, or cannot do what is asked of it."""


class CheckpointError(CookbookError, ValueError):
    """A checkpoint cannot be written, found, trusted or fitted to this model."""


class RequestError(CookbookError, RuntimeError):
    """A request came in an order or place where it cannot be served."""


def message(where: str, what: str, expected: object, got: object, mend: str = "") -> str:
    """Compose the text of an error: where, what is wrong, expected against got, the mend."""
    text = f"{where}: {what}. Expected {expected}, got {got}."
    return f"{text} {mend}" if mend else text


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which names are known, the nearest match to `name` first.

    >>> nearest("cross_entrpy", ["ppo", "cross_entropy"])
    'Did you mean "cross_entropy"? Known: cross_entropy, ppo.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Known: {', '.join(names)}."


def raise_all(error: type[CookbookError], problems: Sequence[str], limit: int = 5) -> None:
    """Raise one `error` that lists the first `limit` problems; do nothing when there are none."""
    if not problems:
        return
    text = "\n".join(problems[:limit])
    if len(problems) > limit:
        text += f"\n(and {len(problems) - limit} more like these)"
    raise error(text)
