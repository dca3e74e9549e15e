"""The files of a run folder: written whole, so that a crash never leaves half of one."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError, ConfigError, DataError
from cookbook_core.storage import manifest
from cookbook_core.storage.paths import is_on_service, usable_path

Record = dict[str, Any]
"""progress.json: {"checkpoints": [{"step", "path"}], "best": {"step", "value"} or None,
"values": {name: JSON}, "finished": bool}"""

_AUTOMATIC = r"step-\d{6,}|\..+-.+"
"""Names of the checkpoints that a run saves by itself, whole and half-written."""


# ---- config.json and progress.json ---------------------------------------------------------------


def read_config(run: str | Path) -> dict[str, Any]:
    """config.json of a run folder: {"recipe", "config", "script", "versions", "machine"}.

    Raises:
        ConfigError: not a run folder, or a config.json that no run wrote.
    """
    try:
        written = json.loads((Path(run).expanduser() / "config.json").read_text(encoding="utf-8"))
        return {**written, "config": dict(written["config"]), "recipe": written["recipe"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, rule = "not a run folder", "the config.json of a run, as in runs/dpo-1"
        got = f"{type(error).__name__}: {error}"
        raise ConfigError(str(run), what, expected=rule, got=got) from error


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Replace config.json, all or nothing; values that JSON does not have are written as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    write_atomically(path / "config.json", text + "\n")


def has_begun(path: Path) -> bool:
    """Whether the run in a folder wrote a result. One that did not, because its model was not
    found, say, leaves a config.json only, which another run may replace."""
    results = (path / name for name in ("metrics.jsonl", "progress.json"))
    return (path / "config.json").exists() and any(result.exists() for result in results)


def read_record(path: Path) -> Record:
    """progress.json of a run; empty for a new one.

    Raises:
        CheckpointError: it cannot be read.
    """
    empty: Record = {"checkpoints": [], "best": None, "values": {}, "finished": False}
    file = path / "progress.json"
    try:
        return {**empty, **json.loads(file.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, TypeError) as error:
        fix = "Start over with --fresh."
        raise CheckpointError(str(file), "damaged", expected="JSON", got=error, fix=fix) from error


def write_record(path: Path, record: Record) -> None:
    """Replace progress.json, all or nothing, and sync it to disk.

    A first evaluation may be NaN: progress.json has NaN and Infinity where strict JSON has none.
    """
    write_atomically(path / "progress.json", json.dumps(record) + "\n")


# ---- checkpoints ---------------------------------------------------------------------------------


def newest_checkpoint(record: Record) -> Record | None:
    """The entry of the newest checkpoint that still exists, after its files' hashes are checked.

    Checkpoints on a service are not checked.

    Raises:
        CheckpointError: its files are damaged; the next older one is named.
    """
    entries = sorted(record["checkpoints"], key=lambda entry: -entry["step"])
    entries = [e for e in entries if is_on_service(e["path"]) or Path(e["path"]).is_dir()]
    newest, older = next(iter(entries), None), entries[1:]
    if newest is None or is_on_service(newest["path"]):
        return newest
    try:
        manifest.check(Path(newest["path"]))
    except CheckpointError as error:
        fix = "Start over with --fresh."
        if older:
            before = f"The checkpoint before it is that of step {older[0]['step']}"
            fix = f"{before}: to resume from it, remove {newest['path']} and repeat the command."
        raise error.replace(fix=fix) from error
    return newest


def remove_unlisted_checkpoints(path: Path, record: Record) -> None:
    """Remove the run's automatic checkpoints that the record does not list, such as half-written
    ones; nothing outside the run's folder."""
    listed = {Path(entry["path"]).resolve() for entry in record["checkpoints"]}
    for folder in (path / "checkpoints").glob("*/weights/*"):
        if re.fullmatch(_AUTOMATIC, folder.name) and folder.resolve() not in listed:
            shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoint(path: Path, entry: Record) -> None:
    """Remove a checkpoint that progress.json listed, unless it is outside the run's folder."""
    random_file(path, entry["step"]).unlink(missing_ok=True)
    folder = Path(entry["path"]).resolve()
    if not is_on_service(entry["path"]) and folder.is_relative_to(path.resolve()):
        shutil.rmtree(folder, ignore_errors=True)


def saved_by_name(path: Path) -> bool:
    """Whether a run folder has checkpoints that the script saved under names of its own."""
    names = (folder.name for folder in (path / "checkpoints").glob("*/*/*"))
    return any(not re.fullmatch(rf"reference|{_AUTOMATIC}", name) for name in names)


def restart_without_checkpoint(path: Path) -> None:
    """Remove what a run wrote that was interrupted before its first checkpoint: it starts over.

    Checkpoints that the script saved by name are moved to checkpoints.old-N.
    """
    record, folder = read_record(path), path / "checkpoints"
    if not (path / "config.json").exists() or record["checkpoints"] or record["finished"]:
        return
    if saved_by_name(path):
        others = (path / f"checkpoints.old-{number}" for number in itertools.count(1))
        folder.rename(next(other for other in others if not other.exists()))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    (path / "progress.json").unlink(missing_ok=True)


def find_checkpoint(run: str | Path, checkpoint: str = "final") -> tuple[Path, Path | None]:
    """The checkpoint's folder, and the run it belongs to (None: a folder from elsewhere).

    Args:
        run: a run folder, or the folder of a checkpoint.
        checkpoint: "final", "best" or a step's number.
    Raises:
        ConfigError: no such run, or no such checkpoint in it; the existing ones are listed.
        CheckpointError: progress.json is damaged, or the checkpoint is on a service.
    """
    if is_on_service(run):
        raise _remote(str(run))
    path = usable_path("RUN", run, ConfigError)
    if (path / "adapter_config.json").is_file():
        if checkpoint != "final":
            what, fix = f"{path} is a checkpoint itself", "Leave out --checkpoint."
            raise ConfigError("--checkpoint", what, got=checkpoint, fix=fix)
        runs = (p for p in path.resolve().parents if (p / "progress.json").is_file())
        return path, next(runs, None)
    if not (path / "progress.json").is_file():
        what = "neither a run folder nor a checkpoint" if path.is_dir() else "no such folder"
        rule = "a run folder such as runs/dpo-1, or one with adapter_config.json"
        raise ConfigError(str(path), what, expected=rule)
    record = read_record(path)
    saved = {str(entry["step"]): entry["path"] for entry in record["checkpoints"]}
    best = (record["best"] or {}).get("step")
    if str(best) in saved:
        saved["best"] = saved[str(best)]
    finals = list((path / "checkpoints").glob("*/sampler_weights/final"))
    if finals:
        saved["final"] = str(max(finals, key=lambda final: final.stat().st_mtime))
    wanted = str(int(checkpoint)) if checkpoint.isdecimal() else checkpoint
    if wanted not in saved:
        what = "no such checkpoint"
        if wanted == "best" and best == 0:
            what += ": the untrained weights were the best"
        fix = "" if record["finished"] else f"The run is not finished; --resume {path} finishes it."
        names = ", ".join(f"--checkpoint {name}" for name in saved)
        raise ConfigError(str(path), what, expected=names or None, got=checkpoint, fix=fix)
    if is_on_service(saved[wanted]):
        raise _remote(saved[wanted])
    # a run may have been moved since: its own folders come before the path that was written down
    inside = path.joinpath("checkpoints", *Path(saved[wanted]).parts[-3:])
    return (inside if inside.is_dir() else Path(saved[wanted])), path


def _remote(where: str) -> CheckpointError:
    fix = "Download it with the service's own client, and give the folder."
    return CheckpointError(where, "is on a service", expected="a folder on this machine", fix=fix)


# ---- random numbers ------------------------------------------------------------------------------


def random_file(path: Path, step: int) -> Path:
    """The file with the states of the random number generators at a checkpoint."""
    return path / "checkpoints" / f"random-{step:06d}.json"


def save_random_state(path: Path, step: int) -> None:
    """Save the states of Python's, numpy's and torch's random number generators."""
    import numpy as np
    import torch

    version, words, spare = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), spare],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = [bytes(s.numpy()).hex() for s in torch.cuda.get_rng_state_all()]
    file = random_file(path, step)
    file.parent.mkdir(exist_ok=True)  # on a service nothing else is saved in it
    write_atomically(file, json.dumps(states) + "\n")


def restore_random_state(path: Path, step: int) -> None:
    """Restore the states that `save_random_state` saved.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    import numpy as np
    import torch

    def as_tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    file = random_file(path, step)
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version, words, spare = state["python"]
        random.setstate((version, tuple(words), spare))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(as_tensor(state["torch"]))
        if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([as_tensor(text) for text in state["cuda"]])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what, rule = "damaged or missing", "states of random number generators"
        fix = "Start over with --fresh."
        raise CheckpointError(str(file), what, expected=rule, got=error, fix=fix) from error


# ---- files ---------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file, sync it, then rename it: no reader and no crash sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a run folder's metrics.jsonl, one dict per line; an empty list without that file.

    A last line that a crash cut short is left out.

    Raises:
        DataError: another line is not JSON.
    """
    file, rows = Path(path) / "metrics.jsonl", []
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            if number < len(lines):
                where, fix = f"{file}:{number}", "Remove that line, or give another run folder."
                raise DataError(where, "broken", got=repr(line[:60]), fix=fix) from error
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the rows of metrics.jsonl from `step` on, because those steps run again."""
    rows = [row for row in read_metrics(path) if row["step"] < step]
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomically(path / "metrics.jsonl", lines)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a table with columns of equal width; the first row names the columns."""
    keys = list(rows[0]) if rows else ["nothing to show"]
    cells = [keys] + [[_as_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(keys))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "".join(f"| {line} |\n" for line in lines)


def _as_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def as_code(text: str) -> str:
    """Format text as inline code, with line breaks escaped."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}".replace("\n", "\\n")
