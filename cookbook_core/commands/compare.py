"""`cookbook compare`: runs side by side in one picture of metrics and one table of differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook_core.errors import ConfigError, DataError, nearest
from cookbook_core.runs.plots import MOST_PANELS, draw_comparison
from cookbook_core.runs.run_folder import markdown_table, read_metrics
from cookbook_core.runs.script import recorded

_HELD_OUT = "test_"
_FORMATS = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class _Logged:
    """A run as its folder records it.

    config: the config fields, with recipe, script and code; {} without a config.json.
    final: metric -> its last value.
    """

    rows: list[dict[str, Any]]
    config: dict[str, Any]
    final: dict[str, float]


def compare_runs(
    folders: Sequence[Path], picture: Path, metrics: Sequence[str] | None = None
) -> str:
    """Draw the metrics of several runs over each other, and tabulate what differs.

    Args:
        folders: run folders; each needs a metrics.jsonl, a config.json is optional.
        picture: the file to draw, .png, .svg or .pdf; overwritten.
        metrics: 1 to 6 to draw, each logged by some run. None takes those that all runs logged:
            the held-out ones, then the loss and the training metrics of the same names.
    Returns:
        A markdown table with one column per run: the config fields that differ, the script and its
        code where they do, the last step, and the final values of the held-out metrics and of
        `metrics`. Without `metrics`, the common ones that were not drawn are listed below it.
    Raises:
        ConfigError: a folder without a run, no metric to draw, or a picture that cannot be written.
        DataError: a broken metrics.jsonl or config.json.
    """
    if picture.suffix.lower() not in _FORMATS or not picture.parent.is_dir():
        rule = f"a name ending in {', '.join(_FORMATS)}, in an existing folder"
        raise ConfigError("--out", "cannot be written", expected=rule, got=picture)
    runs = _read_runs(folders)
    drawn = _shared_metrics(runs) if metrics is None else _known_metrics(runs, metrics)
    draw_comparison(drawn, {name: run.rows for name, run in runs.items()}, picture, _notes(runs))
    table = markdown_table([*_differences(runs), *_results(runs, metrics or ())])
    others = [] if metrics else [name for name in _common(runs) if name not in drawn]
    note = f"\nnot drawn: {', '.join(others)} (--metrics A,B draws them)" if others else ""
    return table + note


def _read_runs(folders: Sequence[Path]) -> dict[str, _Logged]:
    """Read runs, named after their folder, or by the path as given where two names are equal."""
    paths = list(dict.fromkeys(path.expanduser() for path in folders))
    names = [path.resolve().name for path in paths]
    runs = {}
    for path, name in zip(paths, names, strict=True):
        rows = read_metrics(path)
        if not rows:
            rule, fix = "a metrics.jsonl with rows", "Give run folders, such as runs/dpo-1."
            raise ConfigError(str(path), "not a run's folder", expected=rule, fix=fix)
        final = {k: v for row in rows for k, v in row.items() if k != "step" and v is not None}
        unique = name if names.count(name) == 1 else str(path)
        runs[unique] = _Logged(rows, _read_config(path), final)
    return runs


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        return {}
    entry = {k: v for k, v in (recorded(folder) or {}).items() if v is not None}
    script = {"script": entry["file"], "code": entry["code"][:12]} if len(entry) == 2 else {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {"recipe": record["recipe"], **script, **record["config"]}
    except (ValueError, KeyError, TypeError) as error:
        rule, got = "JSON with recipe and config", f"{type(error).__name__}: {error}"
        raise DataError(str(file), "broken", expected=rule, got=got) from error


def _notes(runs: Mapping[str, _Logged]) -> dict[str, str]:
    """Notes for the titles of the losses' panels where recipe or code differs between runs."""
    for field in ("recipe", "code"):
        if len({run.config[field] for run in runs.values() if field in run.config}) > 1:
            return {"loss": "(different losses)", "test_loss": "(different losses)"}
    return {}


def _common(runs: Mapping[str, _Logged]) -> list[str]:
    first, *others = runs.values()
    return [name for name in first.final if all(name in run.final for run in others)]


def _shared_metrics(runs: Mapping[str, _Logged]) -> list[str]:
    shared = _common(runs)
    held_out = [name for name in shared if name.startswith(_HELD_OUT)]
    twins = dict.fromkeys(["loss", *(name.removeprefix(_HELD_OUT) for name in held_out)])
    training = [name for name in twins if name in shared]
    if not shared:
        logged = "; ".join(f"{name}: {', '.join(run.final)}" for name, run in runs.items())
        rule, fix = "a common metric", "Choose with --metrics A,B."
        raise ConfigError("RUN", "nothing to compare", expected=rule, got=logged, fix=fix)
    return (held_out + training or shared)[:MOST_PANELS]


def _known_metrics(runs: Mapping[str, _Logged], metrics: Sequence[str]) -> list[str]:
    known = {name for run in runs.values() for name in run.final}
    for name in metrics:
        if name not in known:
            raise ConfigError("--metrics", f'no run logged "{name}"', fix=nearest(name, known))
    return list(metrics)


def _differences(runs: Mapping[str, _Logged]) -> list[dict[str, Any]]:
    fields = dict.fromkeys(field for run in runs.values() for field in run.config)
    rows = [
        {"": field, **{name: run.config.get(field, "") for name, run in runs.items()}}
        for field in fields
        if field != "log_path"
    ]
    return [row for row in rows if len({str(v) for k, v in row.items() if k}) > 1]


def _results(runs: Mapping[str, _Logged], metrics: Sequence[str]) -> list[dict[str, Any]]:
    logged = (name for run in runs.values() for name in run.final if name.startswith(_HELD_OUT))
    steps = {name: max(row["step"] for row in run.rows) for name, run in runs.items()}
    return [{"": "last step", **steps}] + [
        {"": metric, **{name: run.final.get(metric, "") for name, run in runs.items()}}
        for metric in dict.fromkeys([*logged, *metrics])
    ]
