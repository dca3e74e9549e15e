"""Checks of a config's values: each field's type, and the rules in its annotation.

num_steps: PositiveInt = 30
group_size: Annotated[int, Rule(lambda size: size >= 2, ">= 2")] = 8
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cookbook_core.errors import ConfigError, is_finite, nearest, raise_all


@dataclass(frozen=True)
class Rule:
    """A condition on a field's value besides its type: `Annotated[int, Rule(is_even, "even")]`.

    Attributes:
        holds: whether a value of the right type is allowed.
        text: the rule as an error prints it, after "Expected".
    """

    holds: Callable[[Any], bool]
    text: str


PositiveInt = Annotated[int, Rule(lambda number: number > 0, "> 0")]
PositiveFloat = Annotated[float, Rule(lambda number: number > 0, "> 0")]
NonNegativeFloat = Annotated[float, Rule(lambda number: number >= 0, ">= 0")]


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its annotation: the type, then its `Rule`s.

    Raises:
        ConfigError: one field, or several, with a wrong type, an unknown choice, or a value out of
            range; a number must be finite.
    """
    problems = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        where, value = f"Config.{name}", getattr(config, name)
        kind, *rules = get_args(hint) if get_origin(hint) is Annotated else [hint]
        problem = _mismatch(where, value, kind)
        broken = (rule for rule in rules if isinstance(rule, Rule) and not rule.holds(value))
        if problem is None and (rule := next(broken, None)):
            problem = ConfigError(where, "out of range", expected=rule.text, got=value)
        problems += [problem] if problem else []
    raise_all(problems)


def _mismatch(where: str, value: Any, kind: Any) -> ConfigError | None:
    """The error of a value that does not have the type `kind`; None if it has."""
    parts, got = get_args(kind), f"{value!r:.80} ({type(value).__name__})"
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in parts:
            return None
        fix, rule = nearest(str(value), parts), f"one of {', '.join(parts)}"
        fix = fix.partition("Known:")[0].rstrip()
        return ConfigError(where, "unknown choice", expected=rule, got=repr(value), fix=fix)
    if get_origin(kind) is tuple:
        many = Ellipsis in parts
        if not isinstance(value, (tuple, list)) or (len(value) != len(parts) and not many):
            rule = "a list of values" if many else f"{len(parts)} values"
            return ConfigError(where, "wrong type", expected=rule, got=got)
        kinds = parts[:1] * len(value) if many else parts
        items = (_mismatch(f"{where}[{i}]", value[i], kinds[i]) for i in range(len(value)))
        return next(filter(None, items), None)
    if kind in (int, float):
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if fits and not is_finite(value):
            return ConfigError(where, "out of range", expected="a finite number", got=value)
    else:
        try:
            fits = isinstance(value, (str, Path) if kind is str else kind)
        except TypeError:  # a type that isinstance does not take, such as list[int]
            fits = True
    rule = getattr(kind, "__name__", kind)
    return None if fits else ConfigError(where, "wrong type", expected=rule, got=got)
