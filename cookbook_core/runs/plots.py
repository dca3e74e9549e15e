"""Pictures of a run: a few panels of metrics over the steps, each with its null as a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cookbook_core.errors import ConfigError

# Okabe and Ito's palette, told apart by every kind of colour vision; markers tell lines in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vX"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel of a run's plot.

    Attributes:
        title: what it shows.
        ylabel: the quantity with its unit, such as "loss (nats)".
        metrics: names in metrics.jsonl, each a line; at most 6.
        null: the value that means "nothing learnt", drawn as a dashed line; None takes what the
            one held-out metric, test_..., was at step 0, and calls it "untrained".
        null_label: how the legend calls it.
    """

    title: str
    ylabel: str
    metrics: Sequence[str]
    null: float | None = None
    null_label: str = "nothing learnt"


def draw_panels(panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw 2-4 panels from the rows of a metrics.jsonl into a PNG file; returns its path.

    A metric logged at few steps is drawn with its points; one never logged is named as such.

    Raises:
        ConfigError: another number of panels.
    """
    if not 2 <= len(panels) <= 4:
        raise ConfigError("panels", "cannot be laid out", expected="2 to 4", got=len(panels))
    figure, axes = _figure(len(panels))
    total = len({row["step"] for row in rows})
    for axis, panel in zip(axes, panels, strict=True):
        for i, name in enumerate(panel.metrics):
            _draw_line(axis, rows, name, i, name, total)
        null, label = panel.null, panel.null_label
        if null is None:
            null, label = _untrained(panel.metrics, rows), "untrained"
        if null is not None:
            style: Any = {"color": "0.35", "linestyle": (0, (4, 3)), "linewidth": 1.2}
            axis.axhline(null, label=f"{label}: {null:.3g}", **style)
        _finish(axis, panel.title, panel.ylabel)
        axis.legend(frameon=False, fontsize="small", loc="best")
    figure.savefig(path, dpi=150)
    return path


def _untrained(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The one held-out metric at step 0; None where there is none, or more than one."""
    held_out = [name for name in metrics if name.startswith("test_")]
    if len(held_out) != 1:
        return None
    return next((row[held_out[0]] for row in rows if row["step"] == 0 and held_out[0] in row), None)


def draw_comparison(
    metrics: Sequence[str],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Draw 1-4 metrics, a panel each with a line per run, into a picture; returns its path.

    The first run's line is solid, those of later ones dashed, so that equal runs show as such.

    Args:
        metrics: names in metrics.jsonl.
        runs: name in the legend -> rows of the run's metrics.jsonl.
        path: of a file in a format matplotlib writes.
        notes: metric -> what its panel's title says after the name.
    Raises:
        ConfigError: another number of metrics.
    """
    if not 1 <= len(metrics) <= 4:
        raise ConfigError("metrics", "cannot be laid out", expected="1 to 4", got=len(metrics))
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            _draw_line(axis, rows, metric, i, name, len({row["step"] for row in rows}))
            if 0 < i < 6:
                axis.get_lines()[-1].set_linestyle((4 * i, (4, 8)))
        title = f"{metric} {(notes or {}).get(metric, '')}".rstrip()
        _finish(axis, title, metric.removeprefix("test_"))
    columns = int(12 * figure.get_figwidth() / (6 + max(map(len, runs))))
    figure.legend(
        axes[0].get_lines(),
        list(runs),
        loc="outside lower center",
        ncols=max(1, min(columns, len(runs))),
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
    return path


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """An empty figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = (2, 2) if panels == 4 else (1, panels)
    figure = Figure(figsize=(4.4 * shape[1], 3.3 * shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    cast(Any, figure.get_layout_engine()).set(w_pad=0.1, h_pad=0.08)
    return figure, list(figure.subplots(*shape, squeeze=False).flat)


def _draw_line(
    axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, index: int, label: str, total: int
) -> None:
    """One metric over the steps; with its points where it was logged at few of `total` steps."""
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
