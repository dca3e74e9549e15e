"""Choose the folder of a run, and lock it: one process at a time works in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
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
from cookbook_core.runs.run_folder import (
    has_begun,
    read_config,
    read_record,
    saved_by_name,
    write_atomically,
    write_config,
)
from cookbook_core.runs.script import COPY, Script, described, recorded
from cookbook_core.storage import manifest
from cookbook_core.storage.paths import usable_path

_OWN = (
    r"config\.json|script\.py|metrics\.jsonl|progress\.json|checkpoints|\.owner|\.lock"
    r"|wandb|events\.out\.tfevents\..*"
)
"""Names of what a run, and its tracker, have written by its first step."""


@dataclasses.dataclass
class Claim:
    """A run folder that this process has locked.

    Attributes:
        path: the folder.
        lock: released when the run ends.
        made: whether the folder was made for this run.
        aside: the folder to which --fresh moved the run that was in `path`.
        note: what to print about the choice of the folder.
    """

    path: Path
    lock: Any
    made: bool
    aside: Path | None = None
    note: str = ""

    def has_files_of_others(self) -> bool:
        """Whether it holds files that no run writes, or checkpoints saved by name."""
        names = (file.name for file in self.path.iterdir())
        return saved_by_name(self.path) or not all(re.fullmatch(_OWN, name) for name in names)

    def remove(self) -> None:
        """Remove the folder, put back the run that --fresh moved aside, and release the lock."""
        for file in self.path.iterdir():
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != ".lock":
                file.unlink(missing_ok=True)
        self.lock.release()
        with contextlib.suppress(OSError):
            (self.path / ".lock").unlink(missing_ok=True)
            self.path.rmdir()
            if self.aside is not None:
                self.aside.rename(self.path)


def claim(
    recipe: str, config: Any, script: Script | None, *, fresh: bool = False, resume: str = ""
) -> Claim:
    """Choose the run's folder, make it if it is new, and lock it.

    With `resume`, or `config.log_path`, that folder. With neither the newest runs/SCRIPT-N that was
    interrupted, has the same parameters and code and is in use by no process; else the next new N.

    Args:
        recipe: its name; names the folder where there is no script.
        config: the parameters, with a field log_path.
        script: the run's code; None where it has no file.
        fresh: resume nothing; move a run that is in log_path aside.
        resume: a run folder to resume even if other code started it.
    Raises:
        ConfigError: the folder cannot be written, is in use, or holds a finished run, one with
            other parameters or (without `resume`) other code, or another program's config.json.
    """
    if resume:
        if fresh:
            fix = "Leave one of them out."
            raise ConfigError("--resume", "contradicts --fresh", got=resume, fix=fix)
        path = usable_path("--resume", resume, ConfigError)
        read_config(path)
        return _claim_folder(path, recipe, config, script, any_code=True)
    if config.log_path:
        path = usable_path("Config.log_path", config.log_path, ConfigError)
        if fresh and has_begun(path):
            return _claim_afresh(path)
        return _claim_folder(path, recipe, config, script)
    return _claim_numbered(recipe, config, script, fresh=fresh)


def _claim_folder(
    path: Path, recipe: str, config: Any, script: Script | None, *, any_code: bool = False
) -> Claim:
    made = not path.exists()
    claimed = Claim(path, _make_and_lock(path), made)
    try:
        if (path / "config.json").exists():
            _check_same_run(path, recipe, config, script, any_code=any_code)
    except BaseException:
        claimed.lock.release()
        raise
    return claimed


def _claim_afresh(path: Path) -> Claim:
    """Move the run in a folder aside, and make the folder anew."""
    _make_and_lock(path).release()  # refuses if another process uses it
    others = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    aside = next(other for other in others if not other.exists())
    path.rename(aside)
    note = f"the run that was in {path} is now in {aside}"
    return Claim(path, _make_and_lock(path), True, aside, note)


def _claim_numbered(recipe: str, config: Any, script: Script | None, *, fresh: bool) -> Claim:
    name = recipe if script is None or script.path.stem == "__main__" else script.path.stem
    note = ""
    for path in [] if fresh else _numbered(name):
        if not _can_resume(path, recipe, config):
            continue
        if started := other_code(path, script):
            other = f"{path} was started by other code ({started})"
            note = note or f"{other}, so this run is new; --resume {path} resumes that one"
            continue
        with contextlib.suppress(ConfigError, OSError):  # in use, or not writable
            claimed = Claim(path, lock(path), False)
            if _can_resume(path, recipe, config):
                return claimed
            claimed.lock.release()  # the process that used it has just finished
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                return Claim(path, _make_and_lock(path, exist_ok=False), True, note=note)
    raise AssertionError("itertools.count ends")


def _make_and_lock(path: Path, *, exist_ok: bool = True) -> Any:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        return lock(path)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        fix = "Give --log_path a folder that you can write to."
        raise ConfigError("Config.log_path", "not usable", got=error, fix=fix) from error


def lock(folder: Path) -> Any:
    """Lock `folder` until the lock is released or the process ends.

    Raises:
        ConfigError: another process has locked it; which one is named. OSError: not writable.
    """
    import filelock

    folder_lock = filelock.FileLock(folder / ".lock")
    owner = folder / ".owner"
    try:
        folder_lock.acquire(timeout=0)
    except filelock.Timeout as error:
        got = str(folder)
        with contextlib.suppress(OSError):
            got += f": {owner.read_text(encoding='utf-8')}"
        where, rule = "Config.log_path", "a folder that no other process uses"
        fix = "Wait for that process, or give another --log_path."
        raise ConfigError(where, "in use", expected=rule, got=got, fix=fix) from error
    who = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):  # it only serves the error above
        owner.write_text(who, encoding="utf-8")
    return folder_lock


def _can_resume(path: Path, recipe: str, config: Any) -> bool:
    return not differences(path, recipe, config) and not read_record(path)["finished"]


def _check_same_run(
    path: Path, recipe: str, config: Any, script: Script | None, *, any_code: bool
) -> None:
    """Raise ConfigError unless the run in a folder is this one, interrupted; or has no result."""
    different = differences(path, recipe, config)
    if not has_begun(path) and [name for name, *_ in different] != ["config.json"]:
        return
    where = "--resume" if any_code else "Config.log_path"
    fix = "" if any_code else "Give another --log_path, or --fresh to move that run aside."
    if different:
        got = ", ".join(f"{name} {old!r} there, {new!r} here" for name, old, new in different)
        what = f"{path} holds a run with other parameters"
        raise ConfigError(where, what, got=got, fix=fix)
    if read_record(path)["finished"]:
        raise ConfigError(where, f"{path} holds a finished run", fix=fix)
    started = other_code(path, script)
    if started and not any_code:
        what = f"{path} holds a run started by other code"
        rule, got = f"that of {path / COPY} ({started})", described(script)["file"] or "a notebook"
        fix = f"--resume {path} resumes it with the code as it is now. {fix}"
        raise ConfigError(where, what, expected=rule, got=f"that of {got}", fix=fix)


def other_code(path: Path, script: Script | None) -> str:
    """The file that started the run in a folder, if its code is not this script's; else "".

    Also "" for runs without a recorded script, and for those without a result.
    """
    entry = recorded(path)
    if entry is None or not has_begun(path) or entry == described(script):
        return ""
    return entry["file"] or "a notebook"


def describe_run(path: Path, recipe: str, config: Any, script: Script | None, step: int) -> None:
    """Write config.json and script.py; keep the script that ran until `step`, if it is another."""
    copy, machine = path / COPY, {}
    if has_begun(path):
        machine = read_config(path).get("machine") or {}
        if copy.exists():
            copy.replace(path / f"script.until-{step}.py")
    if script:
        write_atomically(copy, script.text)
    content = {
        "recipe": recipe,
        "script": described(script),
        "config": dataclasses.asdict(config),
        "versions": manifest.versions(),
        "machine": machine,
    }
    write_config(path, content)


def _numbered(name: str) -> list[Path]:
    """Folders runs/NAME-N, the newest first."""
    numbered = re.compile(rf"{re.escape(name)}-\d+")
    folders = [path for path in Path("runs").glob("*-*") if numbered.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def differences(path: Path, recipe: str, config: Any) -> list[tuple[str, Any, Any]]:
    """(field, value there, value here) of each parameter in which a folder's run differs."""
    try:
        written = read_config(path)
    except ConfigError as error:
        return [("config.json", f"unreadable ({error.got})", "a run's config")]
    there = {"recipe": written["recipe"], **written["config"]}
    here = {"recipe": recipe, **json.loads(json.dumps(dataclasses.asdict(config), default=str))}
    return [
        (name, there.get(name), here.get(name))
        for name in here | there
        if name != "log_path" and there.get(name) != here.get(name)
    ]
