"""Paths as people give them: checked before anything looks them up."""

from __future__ import annotations

from pathlib import Path

from cookbook_core.errors import CookbookError


def usable_path(where: str, path: object, error: type[CookbookError]) -> Path:
    """`path` with ~ expanded, whether or not anything is there.

    Raises:
        error: not a path at all, empty, or one that this system cannot look up: too long, of an
            unknown user, with a NUL or half a character in it.
    """
    try:
        if path == "" or not isinstance(path, (str, Path)):
            raise ValueError(type(path).__name__)
        found = Path(path).expanduser()
        found.as_posix().encode()
        found.exists()
    except (ValueError, OSError, RuntimeError) as reason:
        got = f"{path!r:.80} ({str(reason)[:80]})"
        raise error(
            where, "not a usable path", expected="a path on this machine", got=got
        ) from reason
    return found


def is_on_service(path: object) -> bool:
    """Whether a checkpoint's path is a service's, such as tinker://..., and no folder here."""
    return "://" in str(path)


def asset_path(*parts: str) -> Path:
    """Locate a file bundled with this package, such as `asset_path("data", "sft_train.jsonl")`."""
    return Path(__file__).parents[1].joinpath("assets", *parts)
