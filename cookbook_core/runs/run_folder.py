"""A run's folder on disk: every file written whole, read back later.

runs/dpo-1/
  config.json     the parameters as run, the script, and the versions of what they ran on
  script.py       the script's text
  metrics.jsonl   one JSON object per logged step
  progress.json   checkpoints, what was found once, whether the run has ended
  checkpoints/    the newest, the best, the reference
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook_core.errors import CheckpointError, ConfigError, DataError
from cookbook_core.runs.script import Script, described
from cookbook_core.storage import manifest
from cookbook_core.storage.paths import is_on_service, usable_path

Record = dict[str, Any]
"""progress.json: {"checkpoints": [{"step", "path"}], "best": {"step", "value"} or None,
"values": {name: JSON}, "finished": bool}"""

_OURS = r"step-\d{6,}|\..+-.+"
"""Names of a run's own checkpoints, whole and half-written."""


# ---- what a run keeps ----------------------------------------------------------------------------


def has_begun(path: Path) -> bool:
    """Whether the run in a folder got as far as a result. One that did not, for a model that was
    not found, say, leaves a config.json only, which may give way to another's."""
    results = (path / name for name in ("metrics.jsonl", "progress.json"))
    return (path / "config.json").exists() and any(result.exists() for result in results)


def read_record(path: Path) -> Record:
    """progress.json of a run; of a new one, empty."""
    empty: Record = {"checkpoints": [], "best": None, "values": {}, "finished": False}
    file = path / "progress.json"
    try:
        return {**empty, **json.loads(file.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(str(file), "damaged", expected="JSON", got=error) from error


def write_record(path: Path, record: Record) -> None:
    """Replace progress.json, all or nothing, and have it on disk."""
    write_atomically(path / "progress.json", json.dumps(record, allow_nan=False) + "\n")


def newest(record: Record) -> Record | None:
    """The newest checkpoint's entry, its files compared with their hashes.

    Entries whose folder is gone are passed over. Paths that are no folders here (those of a
    service) are taken as they are.

    Raises:
        CheckpointError: its files are damaged; the next older one is named.
    """
    there = [
        entry
        for entry in sorted(record["checkpoints"], key=lambda entry: -entry["step"])
        if is_on_service(entry["path"]) or Path(entry["path"]).is_dir()
    ]
    if not there:
        return None
    try:
        if not is_on_service(there[0]["path"]):
            manifest.check(Path(there[0]["path"]))
    except CheckpointError as error:
        mend = "Start over with --fresh."
        if there[1:]:
            mend = (
                f"The checkpoint before it is that of step {there[1]['step']}: to go on from "
                f"there, remove {there[0]['path']} and give the same command."
            )
        raise error.replace(fix=mend) from error
    return there[0]


def sweep(path: Path, record: Record) -> None:
    """Remove checkpoints of the run's steps that the record does not list, whole or half-written;
    nothing that is not in the run's folder."""
    listed = {Path(entry["path"]).resolve() for entry in record["checkpoints"]}
    for found in (path / "checkpoints").glob("*/weights/*"):
        ours = re.fullmatch(_OURS, found.name)
        if ours and found.resolve() not in listed:
            shutil.rmtree(found, ignore_errors=True)


def find_checkpoint(run: str | Path, checkpoint: str = "final") -> tuple[Path, Path | None]:
    """The checkpoint's folder, and the run it belongs to (None: a folder from elsewhere).

    Raises:
        ConfigError: no such run, or no such checkpoint in it; those there are are named.
        CheckpointError: progress.json is damaged, or the checkpoint is on a service.
    """
    if is_on_service(run):
        raise _remote(str(run))
    path = usable_path("RUN", run, ConfigError)
    if (path / "adapter_config.json").is_file():
        if checkpoint != "final":
            what = f"{path} is a checkpoint itself"
            raise ConfigError("--checkpoint", what, expected="none", got=checkpoint)
        runs = (p for p in path.resolve().parents if (p / "progress.json").is_file())
        return path, next(runs, None)
    if not (path / "progress.json").is_file():
        rule = "a run folder such as runs/dpo-1, or one with adapter_config.json"
        got = "a folder" if path.is_dir() else "no such folder"
        raise ConfigError(str(path), "not a run's folder nor a checkpoint", expected=rule, got=got)
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
        whole = "finished" if record["finished"] else "not finished; its command again goes on"
        if wanted == "best" and best == 0:
            whole += "; the best were the untrained weights"
        there = ", ".join(f"--checkpoint {name}" for name in saved) or "none"
        what = f"no such checkpoint; the run is {whole}"
        raise ConfigError(str(path), what, expected=there, got=checkpoint)
    if is_on_service(saved[wanted]):
        raise _remote(saved[wanted])
    # a run may have been moved since: its own folders come before the path that was written down
    inside = path.joinpath("checkpoints", *Path(saved[wanted]).parts[-3:])
    return (inside if inside.is_dir() else Path(saved[wanted])), path


def _remote(where: str) -> CheckpointError:
    mend = "Download it with the service's own client, and give the folder."
    what, rule = "is on a service", "files on this machine"
    return CheckpointError(where, what, expected=rule, got="an address", fix=mend)


def forget_start(path: Path) -> None:
    """Remove what a run kept that was interrupted before its first checkpoint: it starts over.

    Checkpoints saved under names that are no run's own are moved to checkpoints.old-N.
    """
    record, folder = read_record(path), path / "checkpoints"
    if not (path / "config.json").exists() or record["checkpoints"] or record["finished"]:
        return
    if all(re.fullmatch(rf"reference|{_OURS}", found.name) for found in folder.glob("*/*/*")):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        asides = (path / f"checkpoints.old-{number}" for number in itertools.count(1))
        folder.rename(next(aside for aside in asides if not aside.exists()))
    (path / "progress.json").unlink(missing_ok=True)


def random_file(path: Path, step: int) -> Path:
    """Where the random numbers stood when a checkpoint was saved."""
    return path / "checkpoints" / f"random-{step:06d}.json"


def keep_random_state(path: Path, step: int) -> None:
    """Write down where Python's, numpy's and torch's random numbers stand."""
    import numpy as np
    import torch

    version, words, spare = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "python": [version, list(words), spare],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
    }
    if torch.cuda.is_available():
        found["cuda"] = [bytes(s.numpy()).hex() for s in torch.cuda.get_rng_state_all()]
    file = random_file(path, step)
    file.parent.mkdir(exist_ok=True)  # of a run on a service, nothing else is in it
    write_atomically(file, json.dumps(found) + "\n")


def restore_random_state(path: Path, step: int) -> None:
    """Go on with the random numbers of `keep_random_state`."""
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
        raise CheckpointError(
            str(file), "damaged or missing", expected="random states", got=error
        ) from error


# ---- files ---------------------------------------------------------------------------------------


def describe(recipe: str, config: Any, script: Script | None) -> str:
    """config.json."""
    held = {
        "recipe": recipe,
        "script": described(script),
        "config": dataclasses.asdict(config),
        "versions": manifest.versions(),
    }
    return json.dumps(held, indent=2, ensure_ascii=False, default=str) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write beside, sync, then rename: a reader, or a crash, never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a run folder's metrics.jsonl, one dict per line; no file gives no rows.

    A last line cut short by a crash is left out.

    Raises:
        DataError: another line is not JSON.
    """
    return list(_rows(Path(path) / "metrics.jsonl"))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield from [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{file}:{number}", "broken", expected="JSON", got=repr(line[:60])
            ) from error


def drop_steps_from(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl at `step` and after, since those steps are to run again."""
    kept: Sequence[Any] = [row for row in read_metrics(path) if row["step"] < step]
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    write_atomically(path / "metrics.jsonl", lines)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table, columns of equal width; the first row names the columns."""
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
    """Text as inline code, line breaks escaped."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}".replace("\n", "\\n")
