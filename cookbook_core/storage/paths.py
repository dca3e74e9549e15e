"""Validate paths from users; locate bundled files; recognise checkpoints on a service."""

from __future__ import annotations

from pathlib import Path

from cookbook_core.errors import CookbookError


def usable_path(where: str, path: object, error: type[CookbookError]) -> Path:
    """Expand ~ in `path` and check that this system can look it up; it need not exist.

    Args:
        where: the field or flag, for the error.
        path: a str or Path.
        error: the class to raise.
    Raises:
        error: another type, empty, too long, of an unknown user, or with a NUL or a lone surrogate.
    """
    try:
        if path == "" or not isinstance(path, (str, Path)):
            raise ValueError(type(path).__name__)
        expanded = Path(path).expanduser()
        expanded.as_posix().encode()
        expanded.exists()
    except (ValueError, OSError, RuntimeError) as reason:
        raise error(
            where,
            "not a usable path",
            expected="a path on this machine",
            got=f"{path!r:.80} ({str(reason)[:80]})",
        ) from reason
    return expanded


def is_on_service(path: object) -> bool:
    """Whether a checkpoint's path is on a service (tinker://...) and not a local folder."""
    return "://" in str(path)


def asset_path(*parts: str) -> Path:
    """Locate a file bundled with this package, such as `asset_path("data", "sft_train.jsonl")`."""
    return Path(__file__).parents[1].joinpath("assets", *parts)
