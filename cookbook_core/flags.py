"""The command line of a recipe: a dataclass's fields as flags, and checks of their values."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cookbook_core.errors import ConfigError, is_finite, message, nearest

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Saving:
    """Flags that every recipe has besides those of its Config."""

    save_every: int = 20
    """Steps between checkpoints; an interrupted run repeats at most so many."""
    keep_last: int = 2
    """Newest checkpoints to keep; the best one stays besides."""
    fresh: bool = False
    """Start over, rather than go on with an interrupted run of the same parameters."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl; each needs the extra of its name."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "save_every", "keep_last")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None
) -> tuple[ConfigT, Saving]:
    """Build a recipe's config from command line flags; print help or the mistake, and exit.

    Args:
        config_class: a dataclass; each field is a flag (`--num_steps 30`, booleans `--flag` and
            `--no_flag`), explained by the string under it. The docstring of the module it stands
            in is the program's description.
        argv: the flags; None takes the command line's.
    Returns:
        config, and the flags of `Saving`.
    Raises:
        SystemExit: 0 after --help; 2 after an unknown flag (the nearest known is named) or a value
            that does not fit the field's type or that the config itself refuses.
    """
    import tyro

    parts = {"config": config_class, "saving": Saving}
    fields = [(name, tyro.conf.OmitArgPrefixes[part]) for name, part in parts.items()]
    flags, unknown = tyro.cli(
        dataclasses.make_dataclass("Flags", fields),
        args=list(sys.argv[1:] if argv is None else argv),
        description=sys.modules[config_class.__module__].__doc__ or "",
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [f.name for part in parts.values() for f in dataclasses.fields(cast(Any, part))]
        name = flag.lstrip("-").replace("-", "_")
        print(f"{flag}: no such flag. {nearest(name, known)}", file=sys.stderr)
        raise SystemExit(2)
    return flags.config, flags.saving


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError for the first of these fields that is not a finite number above 0."""
    for name in names:
        check(config, name, 0 < getattr(config, name) < math.inf, "> 0")


def check_types(config: Any) -> None:
    """Raise ConfigError for the first field whose value does not fit its annotation."""
    for name, hint in get_type_hints(type(config)).items():
        check(config, name, _fits(getattr(config, name), hint), f"{hint}")


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in kinds
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        parts = kinds[:1] * len(value) if Ellipsis in kinds else kinds
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float) and not isinstance(value, bool):
        return isinstance(value, (int, hint)) and is_finite(value)
    return isinstance(value, (str, Path) if hint is str else hint)


def check(config: Any, name: str, good: bool, rule: str) -> None:
    """Raise ConfigError that the field's value breaks `rule`, unless it is `good`."""
    if not good:
        raise ConfigError(message(f"Config.{name}", "out of range", rule, getattr(config, name)))
