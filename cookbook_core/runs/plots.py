"""Pictures of runs: panels of metrics over the optimizer steps, of one run or of several."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook_core.errors import ConfigError

# Okabe and Ito's palette: distinct in every kind of colour vision; markers distinguish in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vX"
_GREY = "0.35"
_SMALL = 0.05
"""A range of values that should not look large: 0.05 nats is 5% in probability."""
_UNTITLED = "max_length max_tokens test_rows eval_every device dtype log_path"
"""Config fields that a title leaves out: they change little about what is learnt."""
MOST_PANELS = 6
"""Panels of one comparison."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel of a run's plot.

    Attributes:
        title: what it shows.
        ylabel: the quantity with its unit, such as "loss (nats)".
        metrics: names in metrics.jsonl, each drawn as a line; at most 6.
        null: the value that means "nothing learnt", drawn as a dashed line. None takes the value
            of the one held-out metric, test_..., at step 0, and labels it "untrained".
        null_label: its label in the legend.
        min_range: the vertical axis spans at least this much, in the unit of ylabel, so that a
            small change looks small. Give 0 for quantities that are small by nature.
    """

    title: str
    ylabel: str
    metrics: Sequence[str]
    null: float | None = None
    null_label: str = "nothing learnt"
    min_range: float = _SMALL


def draw_panels(
    panels: Sequence[Panel],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    title: str = "",
) -> Path:
    """Draw 2 to 4 panels from the rows of a metrics.jsonl into a PNG file.

    A metric logged at few steps is drawn with its points; one never logged is labelled so.

    Args:
        panels: what to draw.
        rows: of metrics.jsonl, each with "step".
        path: the file; overwritten.
        title: above the panels. "" takes the name of the file's folder and the main parameters
            in the config.json beside it.
    Returns:
        The path.
    Raises:
        ConfigError: another number of panels.
    """
    if not 2 <= len(panels) <= 4:
        raise ConfigError("panels", "too many or too few", expected="2 to 4", got=len(panels))
    figure, axes = _figure(len(panels))
    total = len({row["step"] for row in rows})
    for axis, panel in zip(axes, panels, strict=True):
        for i, name in enumerate(panel.metrics):
            _draw_line(axis, rows, name, i, name, total)
        null, label = panel.null, panel.null_label
        if null is None:
            null, label = _untrained(panel.metrics, rows), "untrained"
        if null is not None:
            style: Any = {"color": _GREY, "linestyle": (0, (4, 3)), "linewidth": 1.2}
            axis.axhline(null, label=f"{label}: {null:.3g}", **style)
        _widen(axis, panel.min_range)
        _finish(axis, panel.title, panel.ylabel or "value")
        axis.legend(frameon=False, fontsize="small", loc="best")
    width = int(12 * figure.get_figwidth())  # characters of this size
    text = title or _title_of(path.parent)
    lines = textwrap.wrap(text, width, max_lines=3, placeholder=" ...")
    figure.suptitle("\n".join(lines), fontsize="medium")
    figure.savefig(path, dpi=150)
    return path


def _untrained(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The one held-out metric at step 0; None where there is none, or more than one."""
    held_out = [name for name in metrics if name.startswith("test_")]
    if len(held_out) != 1:
        return None
    return next((row[held_out[0]] for row in rows if row["step"] == 0 and held_out[0] in row), None)


def _widen(axis: Any, least: float) -> None:
    """Let the vertical axis span at least this much; not below 0 where no value is."""
    low, high = axis.get_ylim()
    missing = max(0.0, least - (high - low))
    below = 0.0 if min(_values(axis), default=-1.0) >= 0 > low - missing / 2 else missing / 2
    axis.set_ylim(low - below, high + missing - below)


def _values(axis: Any) -> list[float]:
    """All values drawn in a panel."""
    return [float(value) for line in axis.get_lines() for value in line.get_ydata()]


def _title_of(folder: Path) -> str:
    """The run's name, and the parameters in its config.json that decide what it learns."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        fields = {k: v for k, v in config.items() if k not in _UNTITLED.split()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fields = {}
    given = {k: v for k, v in fields.items() if v not in ("", None) and v is not False}
    parts = [f"{name} {_short(value)}" for name, value in given.items()]
    return f"{folder.resolve().name}{': ' if parts else ''}{', '.join(parts)}"


def _short(value: Any) -> str:
    """A parameter as a title shows it: the end of a path, four digits of a number."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"({textwrap.shorten(', '.join(map(_short, value)), 30, placeholder=' ...')})"
    text = str(value)
    return text if len(text) <= 30 else f"...{text[-27:]}"


def draw_comparison(
    metrics: Sequence[str],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Draw 1 to 6 metrics, each in a panel with one line per run, into a picture.

    The first run's line is solid and those of later ones are dashed, so that equal runs stay
    visible. A panel whose values span less than 0.05 states their range.

    Args:
        metrics: names in metrics.jsonl.
        runs: name in the legend -> rows of the run's metrics.jsonl.
        path: the file, in a format that matplotlib writes; overwritten.
        notes: metric -> text after its name in the panel's title.
    Returns:
        The path.
    Raises:
        ConfigError: another number of metrics.
    """
    if not 1 <= len(metrics) <= MOST_PANELS:
        rule = f"1 to {MOST_PANELS}"
        raise ConfigError("--metrics", "too many or none", expected=rule, got=len(metrics))
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=False):
        for i, (name, rows) in enumerate(runs.items()):
            _draw_line(axis, rows, metric, i, name, len({row["step"] for row in rows}))
            if 0 < i < 6:
                axis.get_lines()[-1].set_linestyle((4 * i, (4, 8)))
        title = f"{metric} {(notes or {}).get(metric, '')}".rstrip()
        _finish(axis, title, metric.removeprefix("test_") + _small_range(axis))
    columns = int(12 * figure.get_figwidth() / (6 + max(map(len, runs))))
    style: Any = {"frameon": False, "fontsize": "small", "loc": "outside lower center"}
    columns = max(1, min(columns, len(runs)))
    figure.legend(axes[0].get_lines(), list(runs), ncols=columns, **style)
    figure.savefig(path, dpi=150)
    return path


def _small_range(axis: Any) -> str:
    """The range of a panel's values, for its label, where it is small but not 0; else ""."""
    values = _values(axis)
    span = max(values, default=0.0) - min(values, default=0.0)
    return f" (range {span:.2g})" if 0 < span < _SMALL else ""


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """An empty figure and the axes of its panels, at most three in a row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shape = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}.get(panels, (2, 3))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(4.4 * shape[1], 3.3 * shape[0]), layout=layout)
    axes = list(figure.subplots(*shape, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _draw_line(
    axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, index: int, label: str, total: int
) -> None:
    """Draw a metric over the steps, with its points where it was logged at few of `total` steps."""
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    sparse = len(points) <= 12 or len(points) < total / 3
    axis.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=_COLOURS[index % 6],
        linestyle=("-", "-.", ":")[index // 6 % 3],
        marker=_MARKERS[index % 6] if sparse or index else None,
        markevery=1 if sparse else max(1, len(points) // 8),
        label=label if points else f"{label} (not logged)",
    )


def _finish(axis: Any, title: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set(title=title, xlabel="optimizer step", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
