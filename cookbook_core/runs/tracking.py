"""Send a run's metrics to a tracker as well: TensorBoard, Weights & Biases or Trackio.

Only with --track. Each library is imported when its tracker is opened, and used as its own
documentation says, so its environment variables (WANDB_MODE=offline, TRACKIO_DIR, ...) and its
login apply. Runs go to the project "cookbook", or to the one that WANDB_PROJECT or TRACKIO_PROJECT
names; TensorBoard reads the run folders: `tensorboard --logdir runs`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cookbook_core.errors import ConfigError, RequestError, nearest

KINDS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class Tracker:
    """An open tracker.

    Attributes:
        log: `log(step, metrics)` sends metrics of one step; a step may repeat. Values that are None
            (NaN and infinity, in metrics.jsonl) are left out.
        close: sends what is still queued and ends the tracked run.
    """

    log: Callable[[int, Mapping[str, float | None]], None]
    close: Callable[[], None]


def open_tracker(kind: str, name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    """Start a tracked run.

    Args:
        kind: "tensorboard", "wandb" or "trackio".
        name: the run's name; TensorBoard uses the folder's.
        config: the run's parameters, shown beside its metrics.
        folder: the run folder; TensorBoard's event files and wandb's local files go there.
    Raises:
        ConfigError: another kind, or its library is not installed. RequestError: the library
            raised, because it is not logged in or cannot reach its server, say.
    """
    if kind not in KINDS:
        raise ConfigError("track", f'no tracker "{kind}"', fix=nearest(kind, KINDS))
    library = _library(kind)
    try:
        if kind == "tensorboard":
            return _tensorboard(library, config, folder)
        settings = {"dir": str(folder)} if kind == "wandb" else {}
        return _wandb_like(library, kind, name, config, **settings)
    except Exception as error:
        what, fix = f"{kind} cannot start a run", "Check its login and network, or omit --track."
        got = f"{type(error).__name__}: {error}"
        raise RequestError("track", what, got=got, fix=fix) from error


def _tensorboard(library: Any, config: Mapping[str, Any], folder: Path) -> Tracker:
    writer = library.SummaryWriter(log_dir=str(folder), flush_secs=10)
    text = json.dumps(config, indent=4, ensure_ascii=False, default=str)
    writer.add_text("config", "    " + text.replace("\n", "\n    "))  # indented: markdown code

    def log(step: int, metrics: Mapping[str, float | None]) -> None:
        for key, value in _numbers(metrics).items():
            writer.add_scalar(key, value, step)

    return Tracker(log, writer.close)


def _wandb_like(
    library: Any, kind: str, name: str, config: Mapping[str, Any], **settings: str
) -> Tracker:
    """Open a run of wandb, or of trackio, which has the same interface."""
    project = os.environ.get(f"{kind.upper()}_PROJECT", "cookbook")
    run = library.init(project=project, name=name, config=dict(config), **settings)
    return Tracker(lambda step, metrics: run.log(_numbers(metrics), step=step), run.finish)


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if value is not None}


def _library(kind: str) -> Any:
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f'Run `pip install {kind}` (or install this package with the extra "{kind}").'
        raise ConfigError("track", f"{kind} cannot be imported", got=error, fix=fix) from error
