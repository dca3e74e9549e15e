"""Every exception this package raises on purpose, and the one shape of its message.

    <where>: <what is wrong>. Expected <rule>, got <value>. <the mend>

`where` is a datum index and field (`data[3].loss_fn_inputs["weights"]`), a config field
(`Config.beta`) or a file and line (`train.jsonl:17`). Each class also subclasses the built-in
exception that plain Python code would have raised, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST_GOT = 600
"""Characters of a value that an error shows."""


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


class AnswerError(RequestError):
    """A service answered "success" with what cannot be; the request may have left traces there."""


class ProcessError(CookbookError, RuntimeError):
    """Another process of the run is gone; nothing more can be computed."""


def message(where: str, what: str, expected: object, got: object, mend: str = "") -> str:
    """Compose the text of an error: where, what is wrong, expected against got, the mend."""
    found = str(got)
    if len(found) > LONGEST_GOT:
        found = f"{found[:LONGEST_GOT]}... ({len(found)} characters)"
    text = f"{where}: {what}. Expected {expected}, got {found.removesuffix('.')}."
    return f"{text} {mend}" if mend else text


def check_choice(
    error: type[CookbookError], where: str, what: str, name: object, known: Iterable[str]
) -> None:
    """Raise `error`, naming the nearest match, unless `name` is one of the names `known`."""
    if not isinstance(name, str) or name not in known:
        raise error(message(where, what, "a name it knows", repr(name), nearest(str(name), known)))


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which names are known, the nearest match to `name` first: in spelling, or by initials.

    >>> nearest("cross_entrpy", ["ppo", "cross_entropy"])
    'Did you mean "cross_entropy"? Known: cross_entropy, ppo.'
    """
    names = sorted(known)
    close = [n for n in names if "_" in n and name == "".join(part[:1] for part in n.split("_"))]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."


def is_finite(value: Any) -> bool:
    """Whether it is a number (not a bool) that a float can hold, and neither NaN nor infinite."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def check_text(error: type[CookbookError], where: str, text: object) -> None:
    """Raise `error` unless `text` is a str of whole characters (JSON can hold halves of pairs)."""
    try:
        if isinstance(text, str) and text.encode() is not None:
            return
    except UnicodeEncodeError:
        pass
    raise error(message(where, "not text", "a str that UTF-8 can encode", f"{text!r:.80}"))


def raise_all(error: type[CookbookError], problems: Sequence[str], limit: int = 5) -> None:
    """Raise one `error` that lists the first `limit` problems; do nothing when there are none."""
    if not problems:
        return
    text = "\n".join(problems[:limit])
    if len(problems) > limit:
        text += f"\n(and {len(problems) - limit} more like these)"
    raise error(text)
