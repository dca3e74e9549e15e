"""A run's metrics sent to a tracker besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Off unless asked for, and thin: each library is imported when its tracker is opened and is used as
its own documentation says, so that its environment variables (WANDB_MODE=offline, TRACKIO_DIR, ...)
and its log-in hold. Runs go to the project "cookbook", or to the one that WANDB_PROJECT or
TRACKIO_PROJECT names; TensorBoard reads the run folders: `tensorboard --logdir runs`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cookbook_core.errors import ConfigError, nearest

Kind = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where metrics go.

    Attributes:
        log: `log(step, metrics)` sends one step's; a step may come again with others. Values that
            are None (NaN and infinity, in metrics.jsonl) are left out.
        close: sends what is left; afterwards nothing can be logged.
    """

    log: Callable[[int, Mapping[str, float | None]], None]
    close: Callable[[], None]


def open_tracker(kind: str, name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    """Begin a tracked run.

    Args:
        kind: "tensorboard", "wandb" or "trackio".
        name: the run's name; TensorBoard takes the folder's instead.
        config: the run's parameters, shown beside its metrics.
        folder: the run folder; TensorBoard's event files and wandb's local files go there.
    Returns:
        The tracker, open.
    Raises:
        ConfigError: another kind, or its library is not installed.
    """
    if kind == "tensorboard":
        return _tensorboard(config, folder)
    if kind == "wandb":
        return _wandb_like(kind, name, config, dir=str(folder))
    if kind == "trackio":
        return _wandb_like(kind, name, config)
    raise ConfigError("track", f'no tracker "{kind}"', fix=nearest(kind, get_args(Kind)))


def _tensorboard(config: Mapping[str, Any], folder: Path) -> Tracker:
    library = _library("tensorboard", "torch.utils.tensorboard")
    writer = library.SummaryWriter(log_dir=str(folder), flush_secs=10)
    text = json.dumps(config, indent=4, ensure_ascii=False, default=str)
    writer.add_text("config", "    " + text.replace("\n", "\n    "))  # indented: markdown code

    def log(step: int, metrics: Mapping[str, float | None]) -> None:
        for key, value in _numbers(metrics).items():
            writer.add_scalar(key, value, step)

    return Tracker(log, writer.close)


def _wandb_like(kind: str, name: str, config: Mapping[str, Any], **settings: str) -> Tracker:
    """Trackio has wandb's interface."""
    project = os.environ.get(f"{kind.upper()}_PROJECT", "cookbook")
    run = _library(kind, kind).init(project=project, name=name, config=dict(config), **settings)
    return Tracker(lambda step, metrics: run.log(_numbers(metrics), step=step), run.finish)


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if value is not None}


def _library(kind: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what, rule = f"{kind} cannot be imported", "its library installed"
        mend = f'Run `pip install {kind}`, which is what the extra "{kind}" of this package does.'
        raise ConfigError("track", what, expected=rule, got=error, fix=mend) from error
