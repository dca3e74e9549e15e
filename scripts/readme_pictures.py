"""The README's pictures: how one pass works, and a training curve of recipes/dpo.py.

    python -m scripts.readme_pictures          # a minute and a half on two cores

Writes docs/one_pass.png and docs/dpo.png.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from recipes import dpo

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parents[1] / "docs"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
STAGES = (("tokens", 0.1), ("model + LoRA", 2.3), ("logprobs", 5.4), ("your loss", 8.6))
WIDTH, HEIGHT = 1.7, 0.8


def box(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    style = "round,pad=0.02,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), WIDTH, HEIGHT, style, facecolor="white", edgecolor=colour, lw=2)
    axes.add_patch(patch)
    axes.text(x + WIDTH / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=11)


def arrow(axes: Any, start: Any, end: Any, text: str, colour: str, *, below: bool) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "lw": 2, "color": colour}
    axes.add_patch(FancyArrowPatch(start, end, **style))
    y = (start[1] + end[1]) / 2 + (-0.14 if below else 0.12)
    va = "top" if below else "bottom"
    middle = (start[0] + end[0]) / 2
    axes.text(middle, y, text, ha="center", va=va, fontsize=9, color=colour)


def one_pass() -> None:
    figure = Figure(figsize=(10.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 10.4)
    axes.set_ylim(0.1, 2.6)
    axes.axis("off")
    for text, x in STAGES:
        box(axes, x, 1.25, text, ORANGE if text == "your loss" else BLUE)
    ends = [(x, x + WIDTH) for _, x in STAGES]
    labels = ("", "forward, once", "detached leaves", "")
    for (_, left), (right, _), label in zip(ends, ends[1:], labels, strict=False):
        arrow(axes, (left, 1.85), (right, 1.85), label, BLUE, below=False)
    arrow(axes, (8.6, 1.45), (7.1, 1.45), "g = d loss / d logprobs", ORANGE, below=True)
    arrow(axes, (5.4, 1.45), (4.0, 1.45), "g, through\nthe kept graph", ORANGE, below=True)
    axes.text(5.2, 2.4, "One pass", ha="center", fontsize=13, weight="bold")
    axes.text(3.15, 0.4, "exact LoRA gradients", ha="center", fontsize=10, color=ORANGE)
    arrow(axes, (3.15, 1.25), (3.15, 0.65), "", ORANGE, below=True)
    note = "A service cannot keep your graph: it runs the forward again for the same gradient."
    axes.text(10.3, 0.2, note, ha="right", fontsize=9, color=GREY, style="italic")
    figure.savefig(DOCS / "one_pass.png", dpi=110)


def curve() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dpo.train(dpo.Config(log_path=f"{folder}/dpo-1"))
        shutil.copy(f"{folder}/dpo-1/plot.png", DOCS / "dpo.png")


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    one_pass()
    curve()
