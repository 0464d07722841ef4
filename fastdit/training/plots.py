"""Pictures of a run in progress."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = {"matplotlib": "matplotlib", "PIL": "Pillow"}
COLOR = "#2a6f97"


def missing_packages() -> list[str]:
    """The packages without which no picture can be drawn."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """The mean around each value with weights that fall to both sides:
    s_i = sum_j a^|i-j| v_j / sum_j a^|i-j| with a = 1 - 1/span.

    Looking to both sides keeps the line in the middle of a falling curve; a mean of the past lies above it.
    """
    keep = 1 - 1 / max(span, 1)
    past, future = _decayed_sums(values, keep), _decayed_sums(values[::-1], keep)[::-1]
    return [
        (before + after - value) / (weight_before + weight_after - 1)
        for value, (before, weight_before), (after, weight_after) in zip(
            values, past, future, strict=True
        )
    ]


def _decayed_sums(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """(sum_j keep^(i-j) v_j, sum_j keep^(i-j)) over j <= i, for each i."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        sums.append((total, weight))
    return sums


def draw_loss_curve(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Writes `loss_figure` as a PNG of 1200 x 675 pixels."""
    figure = loss_figure(records, title)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary)


def loss_figure(records: Sequence[dict[str, Any]], title: str) -> Figure:
    """The loss over the steps: every record of metrics.jsonl faintly, their mean around each step on top.

    The loss axis is logarithmic where the smoothed loss falls to less than a third of where it began; otherwise what
    happens late, which is most of a run, would be a flat line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    line = smoothed(losses, span=max(3, len(losses) / 50))
    logarithmic = min(losses) > 0 and max(line) > 3 * min(line)

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        steps, losses, color=COLOR, alpha=0.35, linewidth=0.8, label="mean of each log interval"
    )
    axes.plot(steps, line, color=COLOR, linewidth=2, label="smoothed")
    axes.plot(steps[-1], line[-1], "o", color=COLOR, markersize=5)
    axes.annotate(
        f"{line[-1]:.4g}",
        (steps[-1], line[-1]),
        (8, 0),
        textcoords="offset points",
        va="center",
        color=COLOR,
    )
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(*_shown_range(losses, line))
    axes.set_xlim(0, steps[-1] * 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (log scale)" if logarithmic else "training loss")
    axes.set_title(title, loc="left")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    return figure


def _shown_range(losses: Sequence[float], line: Sequence[float]) -> tuple[float, float]:
    """Limits of a linear axis: all of the smoothed line, and all raw values but the outermost hundredth."""
    ordered = sorted(losses)
    outside = len(ordered) // 100
    low = min(ordered[outside], *line, math.inf)
    high = max(ordered[-1 - outside], *line, -math.inf)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
