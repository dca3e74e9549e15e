"""Every exception this package raises on purpose. An error is an object; its message is made of it.

    <where>: <what is wrong>. Expected <rule>, got <value>. <fix>

`where` is a datum index and field (`data[3].loss_fn_inputs["weights"]`), a config field
(`Config.beta`) or a file and line (`train.jsonl:17`). Only where and what are always there. Each
class also subclasses the built-in exception that plain Python code would have raised, so
`except ValueError` keeps working.
"""

from __future__ import annotations

import copy
import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

LONGEST_GOT = 600
"""Characters of a value that an error shows."""

E = TypeVar("E", bound="CookbookError")
_ABSENT: Any = object()


class CookbookError(Exception):
    """Root of all errors raised by cookbook_core and the recipes.

    Args:
        where: the field, flag, file or call that the error is about.
        what: what is wrong with it.
        expected: the rule it breaks.
        got: the value it has; long ones are shortened.
        fix: one sentence or command that cures it.
    Attributes:
        others: further errors of the same kind, listed below this one (see `raise_all`).
    """

    def __init__(
        self,
        where: str,
        what: str,
        *,
        expected: object = None,
        got: object = _ABSENT,
        fix: str = "",
    ) -> None:
        super().__init__(where, what)
        self.where, self.what, self.fix = where, what, fix
        self.expected = "" if expected is None else str(expected)
        self.got = "" if got is _ABSENT else _shortened(str(got))
        self.others: list[CookbookError] = []

    def __str__(self) -> str:
        lines = [self._line(), *(error._line() for error in self.others[: LISTED - 1])]
        if (rest := len(self.others) - len(lines) + 1) > 0:
            lines.append(f"(and {rest} more like these)")
        return "\n".join(lines)

    def _line(self) -> str:
        text = f"{self.where}: {self.what}." if self.where else f"{self.what}."
        if self.expected and self.got:
            text += f" Expected {self.expected}, got {self.got}."
        elif self.expected:
            text += f" Expected {self.expected}."
        elif self.got:
            text += f" Got {self.got}."
        return f"{text} {self.fix}" if self.fix else text

    def replace(self: E, **slots: str) -> E:
        """The same error with other slots, as in `replace(where=f"rows.jsonl:17, {e.where}")`."""
        changed = copy.copy(self)
        for name, value in slots.items():
            setattr(changed, name, value)
        return changed

    def slots(self) -> dict[str, str]:
        """Where, what, expected, got and fix as text: what another process needs to raise it."""
        return {name: getattr(self, name) for name in ("where", "what", "expected", "got", "fix")}


LISTED = 5
"""Errors of one kind that a message lists; the others are counted."""


class DatumError(CookbookError, ValueError):
    """A datum, or a field of one, is invalid."""


class LossError(CookbookError, ValueError):
    """A loss function raised, or returned something that has no usable gradient."""


class ConfigError(CookbookError, ValueError):
    """A parameter, flag or option has an invalid value."""


class DataError(CookbookError, ValueError):
    """A dataset file or row is invalid."""


class ModelError(CookbookError, ValueError):
    """A base model cannot be loaded, or does not support the request."""


class CheckpointError(CookbookError, ValueError):
    """A checkpoint cannot be written, found or verified, or does not fit this model."""


class RequestError(CookbookError, RuntimeError):
    """A request cannot be served at this point: out of order, after close, or refused."""


class AnswerError(RequestError):
    """A service reported success but returned an invalid result; the request may have had side
    effects."""


class ProcessError(CookbookError, RuntimeError):
    """Another process of the run died; nothing more can be computed."""


class VersionError(CookbookError, ImportError):
    """An installed package has a version that is not supported."""


def check_choice(
    error: type[CookbookError], where: str, what: str, name: object, known: Iterable[str]
) -> None:
    """Raise `error`, naming the nearest match, unless `name` is one of the names `known`."""
    known = sorted(known)
    if not isinstance(name, str) or name not in known:
        fix = nearest(str(name), known).partition("Known: ")[0].rstrip()
        expected = f"one of {', '.join(known)}" if known else "none"
        raise error(where, what, expected=expected, got=repr(name), fix=fix)


def nearest(name: str, known: Iterable[str]) -> str:
    """List the known names, the nearest match to `name` first: in spelling, or by initials.

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
    """Raise `error` unless `text` is a str that UTF-8 can encode (JSON can hold surrogates)."""
    try:
        if isinstance(text, str) and text.encode() is not None:
            return
    except UnicodeEncodeError:
        pass
    raise error(where, "not text", expected="a str that UTF-8 can encode", got=f"{text!r:.80}")


def raise_all(problems: Sequence[CookbookError]) -> None:
    """Raise the first of the errors, with the others listed below it; nothing without any."""
    if problems:
        first = problems[0]
        first.others = [*first.others, *problems[1:]]
        raise first


def _shortened(text: str) -> str:
    if len(text) > LONGEST_GOT:
        text = f"{text[:LONGEST_GOT]}... ({len(text)} characters)"
    return text.removesuffix(".")
