"""Every exception this package raises on purpose. The message is made from the error's slots.

    <where>: <what is wrong>. Expected <rule>, got <value>. <fix>

`where` is a datum index and field (`data[3].loss_fn_inputs["weights"]`), a config field
(`Config.beta`) or a file and line (`train.jsonl:17`). Only where and what are required; an empty
slot is left out of the message. Each class also subclasses the built-in exception that plain
Python code would have raised, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import numbers
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

LONGEST_GOT = 600
"""Characters of a value that an error shows."""
LISTED = 5
"""Errors that one message lists; the others are counted."""

ErrorT = TypeVar("ErrorT", bound="CookbookError")
_ABSENT: Any = object()
_HERE = Path(__file__).parent


class CookbookError(Exception):
    """Root of all errors raised by cookbook_core and the recipes.

    Args:
        where: the field, flag, file or call that the error is about; may be "".
        what: what is wrong with it.
        expected: the rule it breaks; None leaves the slot empty.
        got: the value it has, None included; shortened to LONGEST_GOT characters.
        fix: one sentence with the call, flag or command that cures it.
    Attributes:
        others: further errors that the message lists after this one (see `raise_all`).
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
        self.others: Sequence[CookbookError] = ()

    def __str__(self) -> str:
        errors = [self, *self.others]
        lines = [error._line() for error in errors[:LISTED]]
        if len(errors) > LISTED:
            lines.append(f"(and {len(errors) - LISTED} more like these)")
        return "\n".join(lines)

    def _line(self) -> str:
        parts = [f"expected {self.expected}"] if self.expected else []
        parts += [f"got {self.got}"] if self.got else []
        rule = ", ".join(parts)
        sentences = (
            f"{self.where}: {self.what}" if self.where else self.what,
            rule[:1].upper() + rule[1:],
            self.fix,
        )
        return " ".join(s if s.endswith((".", "!", "?")) else f"{s}." for s in sentences if s)

    def replace(self: ErrorT, **slots: Any) -> ErrorT:
        """A copy with other slots, as in `error.replace(where=f"rows.jsonl:17, {error.where}")`.

        Raises:
            TypeError: a name that is not a slot.
        """
        changed = type(self)(**{**self.slots(), **slots})
        changed.others = self.others
        return changed

    def slots(self) -> dict[str, str]:
        """The five slots as text, "" where empty: `type(e)(**e.slots())` is an equal error."""
        return {name: getattr(self, name) for name in ("where", "what", "expected", "got", "fix")}


class DatumError(CookbookError, ValueError):
    """A datum, or a field of one, is invalid."""


class LossError(CookbookError, ValueError):
    """A loss function raised, or returned something that cannot be used."""

    @classmethod
    def caused_by(cls: type[ErrorT], where: str, error: Exception) -> ErrorT:
        """The error to raise `from error`, an exception that escaped from the user's function."""
        frames = traceback.extract_tb(cut_own_frames(error).__traceback__)
        own = [frame for frame in frames if frame.filename == frames[0].filename]
        fix = "Check the arguments it takes and the value it returns."
        if own:
            fix = f"See line {own[-1].lineno} of {Path(own[-1].filename).name}."
        return cls(where, f"raised {type(error).__name__}: {_shortened(str(error))}", fix=fix)


class NotFiniteError(LossError):
    """A loss is NaN or infinite, or its gradient is."""


class NoGradientError(LossError):
    """A loss does not depend on the logprobs, or autograd cannot differentiate it."""


class RewardError(LossError):
    """A reward function raised, or returned something that cannot be used."""


class ConfigError(CookbookError, ValueError):
    """A parameter, flag or option has an invalid value."""


class DataError(CookbookError, ValueError):
    """A dataset file or row is invalid."""


class ModelError(CookbookError, ValueError):
    """A base model cannot be loaded, or does not support the request."""


class CheckpointError(CookbookError, ValueError):
    """A checkpoint cannot be written, read or verified, or does not fit this model."""


class RequestError(CookbookError, RuntimeError):
    """A request cannot be served: out of order, after close, or rejected by a service."""


class AnswerError(RequestError):
    """A service reported success but returned an invalid result; the request may have had side
    effects."""


class ProcessError(CookbookError, RuntimeError):
    """A process of the run failed or died; nothing more can be computed."""


class VersionError(CookbookError, ImportError):
    """An installed package has a version that is not supported."""


def check_choice(
    error: type[CookbookError], where: str, what: str, name: object, known: Iterable[str]
) -> None:
    """Raise `error` with the nearest match as its fix, unless `name` is one of `known`."""
    names = sorted(known)
    if not isinstance(name, str) or name not in names:
        expected = f"one of {', '.join(names)}" if names else None
        fix = _hint(str(name), names) if names else "Leave it out."
        raise error(where, what, expected=expected, got=repr(name), fix=fix)


def nearest(name: str, known: Iterable[str]) -> str:
    """List the known names, the nearest match to `name` first: in spelling, or by initials.

    >>> nearest("cross_entrpy", ["ppo", "cross_entropy"])
    'Did you mean "cross_entropy"? Known: cross_entropy, ppo.'
    """
    names = sorted(known)
    return f"{_hint(name, names)} Known: {', '.join(names) or 'none'}.".lstrip()


def _hint(name: str, names: Sequence[str]) -> str:
    close = [n for n in names if "_" in n and name == "".join(part[:1] for part in n.split("_"))]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'Did you mean "{close[0]}"?' if close else ""


def is_finite(value: Any) -> bool:
    """Whether `value` is a number (not a bool) that a float can hold, neither NaN nor infinite."""
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
    """Raise the first of these errors with the others listed after it; do nothing without any."""
    errors = [error for problem in problems for error in (problem, *problem.others)]
    if errors:
        errors[0].others = errors[1:]
        raise errors[0]


def cut_own_frames(error: Exception) -> Exception:
    """Cut this package's frames off the start of a traceback, so that the user's lines come first.

    For the cause of an error: Python prints the cause before the error itself.
    """
    lines = error.__traceback__
    while lines and _is_ours(lines.tb_frame.f_code.co_filename):
        lines = lines.tb_next
    return error.with_traceback(lines)


def _is_ours(filename: str) -> bool:
    """Whether a source file belongs to this package; recipes installed with it are the user's."""
    path = Path(filename)
    return _HERE in path.parents and path.parent != _HERE / "recipes"


def _shortened(text: str) -> str:
    """Cut `text` to LONGEST_GOT characters, the last of which give its length."""
    if len(text) <= LONGEST_GOT:
        return text
    count = f"... ({len(text)} characters)"
    return text[: LONGEST_GOT - len(count)] + count
