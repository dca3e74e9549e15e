"""Which folder a run goes to, one process at a time; and what happens to those that failed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

from cookbook_core.errors import ConfigError
from cookbook_core.runs.run_folder import describe, has_begun, read_record, write_atomically
from cookbook_core.runs.script import COPY, Script, described, recorded
from cookbook_core.storage.paths import usable_path

_OWN = ("config.json", COPY, "metrics.jsonl", "progress.json", "checkpoints", ".owner", ".lock")
"""What a run has written by its first step."""


def lock(folder: Path) -> Any:
    """Hold `folder` until the lock that comes back is released, or the process ends.

    Raises:
        ConfigError: another process holds it; which one is said.
    """
    import filelock

    held = filelock.FileLock(folder / ".lock")
    owner = folder / ".owner"
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        with contextlib.suppress(OSError):
            where = owner.read_text(encoding="utf-8")
            raise ConfigError(
                "Config.log_path",
                "in use",
                expected="a run of one process",
                got=f"{folder}: {where}",
            ) from error
        raise ConfigError(
            "Config.log_path", "in use", expected="a run of one process", got=folder
        ) from error
    who = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    owner.write_text(who, encoding="utf-8")
    return held


def claim(
    recipe: str, config: Any, script: Script | None, *, fresh: bool, anyway: bool
) -> tuple[Path, Any, bool]:
    """The folder a run goes to, the lock on it, and whether the folder was made for it.

    With a log_path that folder: new, or a run of the same config and code to go on with. Without,
    the newest runs/SCRIPT-N that was interrupted under this config and code and nobody works in,
    else the next new one.

    Args:
        recipe: its name; names the folder where there is no script.
        config: with a field log_path.
        script: the run's code; None where it has no file.
        fresh: move a run that is in log_path aside, and go on with none.
        anyway: go on with one of the same config also if other code began it.
    Raises:
        ConfigError: log_path holds a finished run, one of another config or of other code, one in
            use, or another program's config.json.
    """
    if not config.log_path:
        return _claim_numbered(recipe, config, script, fresh=fresh, anyway=anyway)
    path = usable_path("Config.log_path", config.log_path, ConfigError)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = "a folder that can be made"
        raise ConfigError("Config.log_path", "not usable", expected=rule, got=error) from error
    held = lock(path)
    if not (path / "config.json").exists():
        return path, held, made
    if fresh and has_begun(path):
        held.release()
        aside = next(p for i in itertools.count(1) if not (p := _old(path, i)).exists())
        path.rename(aside)
        print(f"the run that was in {path} is in {aside} now")
        path.mkdir()
        return path, lock(path), True
    try:
        _check_same(path, recipe, config, script, anyway=anyway)
    except ConfigError:
        held.release()
        raise
    return path, held, made


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.old-{number}")


def _check_same(
    path: Path, recipe: str, config: Any, script: Script | None, *, anyway: bool
) -> None:
    """Raise ConfigError unless the run in a folder is one to go on with."""
    differ = differences(path, recipe, config)
    if not has_begun(path) and [name for name, *_ in differ] != ["config.json"]:
        return
    mend = "Give another log_path, or --fresh to move that run aside."
    if differ:
        what = "holds a run with other parameters"
        got = ", ".join(f"{name} {old!r} there, {new!r} here" for name, old, new in differ)
        raise ConfigError("Config.log_path", what, expected=f"those of {path}", got=got, fix=mend)
    if read_record(path)["finished"]:
        raise ConfigError(
            "Config.log_path", "holds a finished run", expected="a new folder", got=path, fix=mend
        )
    other = other_code(path, script)
    if other and not anyway:
        what, rule = "holds a run begun by other code", f"that of {path / COPY} ({other})"
        got = described(script)["file"] or "a notebook"
        mend = f"--anyway goes on with it under the code as it is now. {mend}"
        raise ConfigError("Config.log_path", what, expected=rule, got=f"that of {got}", fix=mend)


def _claim_numbered(
    recipe: str, config: Any, script: Script | None, *, fresh: bool, anyway: bool
) -> tuple[Path, Any, bool]:
    name = recipe if script is None or script.path.stem == "__main__" else script.path.stem
    said = ""
    for path in [] if fresh else _numbered(name):
        with contextlib.suppress(ConfigError):
            held = lock(path)
            if not differences(path, recipe, config) and not read_record(path)["finished"]:
                other = other_code(path, script)
                if anyway or not other:
                    return path, held, False
                said = said or f"{path} was begun by other code ({other})"
            held.release()
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            if said:
                print(f"{said}: starting {path}; --anyway goes on with it")
            return path, lock(path), True
    raise AssertionError


def other_code(path: Path, script: Script | None) -> str:
    """Which script began the run in a folder, if that is other code than this; else "".

    Runs of which nothing is recorded, and those that never began, are nobody's.
    """
    there = recorded(path)
    if there is None or not has_begun(path) or there == described(script):
        return ""
    return there["file"] or "a notebook"


def describe_run(path: Path, recipe: str, config: Any, script: Script | None, step: int) -> None:
    """Write config.json and the script's copy; that of other code is kept as what ran to `step`."""
    copy = path / COPY
    if has_begun(path) and copy.exists():
        copy.replace(path / f"script.until-{step}.py")
    if script:
        write_atomically(copy, script.text)
    write_atomically(path / "config.json", describe(recipe, config, script))


def discard(path: Path, held: Any) -> None:
    """Let go of a folder, and remove it if nothing is in it but what a run writes by itself."""
    ours = {found.name for found in path.iterdir()} <= set(_OWN)
    for name in _OWN[:-1] if ours else ():
        shutil.rmtree(path / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            (path / name).unlink(missing_ok=True)
    held.release()
    if ours:
        with contextlib.suppress(OSError):
            (path / ".lock").unlink(missing_ok=True)
            path.rmdir()


def _numbered(name: str) -> list[Path]:
    """Folders runs/NAME-N, the newest first."""
    found = [
        (int(match[1]), path)
        for path in Path("runs").glob("*-*")
        if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def differences(path: Path, recipe: str, config: Any) -> list[tuple[str, Any, Any]]:
    """(field, value there, value here) where a folder's run is another than this."""
    try:
        held = json.loads((path / "config.json").read_text(encoding="utf-8"))
        there = {"recipe": held["recipe"], **held["config"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [("config.json", f"unreadable ({error})", "a run's config")]
    here = json.loads(describe(recipe, config, None))
    here = {"recipe": here["recipe"], **here["config"]}
    return [
        (name, there.get(name), here.get(name))
        for name in here | there
        if name != "log_path" and there.get(name) != here.get(name)
    ]
