"""Pictures of a run: a few panels of metrics over the steps, each with its null as a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cookbook_core.errors import ConfigError, message

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
        null: the value that means "nothing learnt", drawn as a dashed line; None draws nothing.
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not 2 <= len(panels) <= 4:
        raise ConfigError(message("panels", "cannot be laid out", "2 to 4", len(panels)))
    shape = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(4.4 * shape[1], 3.3 * shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    cast(Any, figure.get_layout_engine()).set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(*shape).flat
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, rows)
    figure.savefig(path, dpi=150)
    return path


def _draw(axis: Any, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    total = len({row["step"] for row in rows})
    for i, name in enumerate(panel.metrics):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        sparse = len(points) <= 12 or len(points) < total / 3
        axis.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_COLOURS[i],
            marker=_MARKERS[i] if sparse or i else None,
            markevery=1 if sparse else max(1, len(points) // 8),
            label=name if points else f"{name} (not logged)",
        )
    if panel.null is not None:
        label = f"{panel.null_label}: {panel.null:.3g}"
        axis.axhline(panel.null, color="0.35", linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="best")
