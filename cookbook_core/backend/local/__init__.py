"""The backend on this machine: torch, transformers, peft; importing it checks their versions."""

import itertools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from cookbook_core.errors import VersionError, raise_all

SUPPORTED = {
    "torch": ("2.9.1", "2.15"),
    "transformers": ("5.5", "5.25"),
    "peft": ("0.18", "0.22"),
}
"""Oldest version that the tests pass with, and the first beyond; pyproject.toml has the same."""


def check_versions(needed: Mapping[str, tuple[str, str]] = SUPPORTED, purpose: str = "") -> None:
    """Check the installed versions from the packages' metadata, without importing them.

    Args:
        needed: by package, the oldest version and the first beyond.
        purpose: what they are needed for.
    Raises:
        VersionError: a version outside its range; lists every such package. A package without
            metadata is not checked.
    """
    problems: list[VersionError] = []
    for name, (low, high) in needed.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not _release(low) <= _release(installed) < _release(high):
            allowed = f"{name}>={low},<{high}"
            problems.append(
                VersionError(
                    name,
                    f"version not supported {purpose}".rstrip(),
                    expected=allowed,
                    got=installed,
                    fix=f'Run: pip install "{allowed}"',
                )
            )
    raise_all(problems)


def _release(text: str) -> tuple[int, ...]:
    """The numbers before any suffix: (2, 13, 0) of "2.13.0+cpu"."""
    numbers = re.findall(r"\d+|[^\d.]", text)
    return tuple(map(int, itertools.takewhile(str.isdigit, numbers)))


check_versions()
