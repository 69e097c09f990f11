"""Names beside lines and points in a plot, so that none covers another; and everyone's colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastvae.app.show.figures import INK, PALETTE

from .ratios import OURS

# Everyone has a colour and a marker of its own, the same in all plots.
STYLES: Mapping[str, tuple[str, str]] = {
    OURS: (PALETTE[0], "o"),
    "eager": (PALETTE[6], "s"),
    "eager-compile": (PALETTE[7], "D"),
    "mixture-same-family": (PALETTE[8], "v"),
    "expansion": (PALETTE[3], "^"),
    "expansion-compile": (PALETTE[2], "P"),
    "keops": (PALETTE[4], "X"),
    "scikit-learn": (PALETTE[5], "<"),
}
OTHER = (PALETTE[9], "h")


def label_right(figure: Figure, axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Name each line right of the axes, at the height of its end as far as the others leave room.

    Lines that reach furthest are led to their names; one that stops earlier is known by its marker.
    """
    figure.draw_without_rendering()
    names = sorted(ends, key=lambda name: ends[name][1])
    furthest = max(x for x, _ in ends.values())
    to_axes = axes.transAxes.inverted()
    starts = [to_axes.transform(axes.transData.transform(ends[name])) for name in names]
    for name, (x, y), height in zip(names, starts, apart([float(y) for _, y in starts], 0.055), strict=True):
        colour, marker = STYLES.get(name, OTHER)
        outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "color": colour}
        if ends[name][0] == furthest:
            axes.plot([x + 0.015, 1.035], [y, height], linewidth=0.7, alpha=0.6, **outside)
        axes.plot(1.05, height, marker=marker, markersize=6, **outside)
        axes.text(1.07, height, name, transform=axes.transAxes, va="center", fontsize=10, **_text(name))


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as it takes for each to be `gap` above the one before, in [0, 1] if it can."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else max(height, 0.0))
    limit = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def label_points(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Name each point beside it, on the first side where the name covers no other name and no point."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    box = axes.get_window_extent(renderer)
    marks = [axes.transData.transform(point) for point in points.values()]
    taken = [np.array([x - 7, y - 7, x + 7, y + 7]) for x, y in marks]
    for name, point in points.items():
        sides = [
            (9, 0, "left", "center"),
            (-9, 0, "right", "center"),
            (0, 9, "center", "bottom"),
            (0, -9, "center", "top"),
        ]
        sides += [(dx, dy, ha, "center") for dy in (16, -16, 28, -28) for dx, ha in ((9, "left"), (-9, "right"))]
        for dx, dy, ha, va in sides:
            text = axes.annotate(
                name, point, (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9,
                **_text(name),
            )  # fmt: skip
            extent = np.array(text.get_window_extent(renderer).extents)
            inside = extent[0] >= box.x0 and extent[2] <= box.x1 and extent[1] >= box.y0 and extent[3] <= box.y1
            if inside and not any(_overlap(extent, other) for other in taken):
                break
            if (dx, dy, ha, va) != sides[-1]:
                text.remove()
        taken.append(extent)


def _text(name: str) -> dict[str, Any]:
    return {"color": INK, "fontweight": "bold" if name == OURS else "normal"}


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
