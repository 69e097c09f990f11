"""The plots of a record: time and memory against K, growth, a roofline, accuracy against speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastvae.app.show.figures import INK, PALETTE, RULE, save_figure

from .growth import ALONE, EVERYONE, ROOFLINE
from .labels import OTHER, STYLES, label_points, label_right
from .memory import LEAST
from .ratios import OURS, Result, best_peer, flops, is_ours, minimal_bytes, multiply_add_rate, seconds, times_faster
from .record import Record


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw every plot that the record has points for into a folder; their paths."""
    drawn = []
    for name, make in PLOTS.items():
        figure = make(record.cases)
        if figure is not None:
            drawn.append(folder / f"{record.path.stem}-{name}.png")
            save_figure(figure, drawn[-1])
    return drawn


def time_against_k(cases: Mapping[str, Result]) -> Figure | None:
    """Seconds of a forward against K, everyone."""
    return _against_k(cases, "seconds of a forward pass", lambda result, name: seconds(result, name))


def memory_against_k(cases: Mapping[str, Result]) -> Figure | None:
    """Bytes beyond the arguments against K, everyone."""

    def weight(result: Result, name: str) -> float | None:
        entry = result["contenders"][name]
        bytes_ = entry.get("extra_bytes") if entry["status"] == "measured" else None
        return None if bytes_ is None else max(LEAST, bytes_)

    return _against_k(cases, "peak memory of a forward pass, bytes (1 MB: 1 MB or less)", weight)


def _against_k(cases: Mapping[str, Result], what: str, value: Callable[[Result, str], float | None]) -> Figure | None:
    points = sorted((r for r in cases.values() if r.get("series") == EVERYONE), key=lambda r: r["K"])
    if len(points) < 2:
        return None
    figure, axes = _figure(8, 5)
    names = dict.fromkeys(name for result in points for name in result["contenders"])
    ends = {}
    for name in names:
        line = [(r["K"], v) for r in points if name in r["contenders"] and (v := value(r, name)) is not None]
        if line:
            colour, marker = STYLES.get(name, OTHER)
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, **_weight(name))
            ends[name] = line[-1]
    if not ends:
        return None
    axes.set(xscale="log", yscale="log", xlabel="components K")
    axes.set_title(f"{what}; M = {points[0]['M']}, D = {points[0]['D']}", loc="left", color=INK, fontsize=11)
    axes.set_xlim(points[0]["K"] / 1.5, points[-1]["K"] * 1.5)
    label_right(figure, axes, ends)
    return figure


def growth(cases: Mapping[str, Result]) -> Figure | None:
    """Fastvae's time against M, K and D, with the line that is linear; and its memory against M x K."""
    series = {
        name: sorted((r for r in cases.values() if r.get("series") == f"{ALONE} {name}"), key=lambda r: r[name])
        for name in "MKD"
    }
    if any(len(points) < 2 for points in series.values()):
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, (name, points) in zip(panels, series.items(), strict=False):
        found = [(r[name], t) for r in points if (t := seconds(r)) is not None]
        if not found:
            return None
        sizes, times = np.array(found).T
        axes.plot(sizes, times[-1] * sizes / sizes[-1], color=PALETTE[9], linestyle=":", linewidth=1.5)
        axes.plot(sizes, times, color=STYLES[OURS][0], marker=STYLES[OURS][1], markersize=5)
        rest = ", ".join(f"{other} = {points[0][other]}" for other in "MKD" if other != name)
        axes.set_title(f"seconds against {name}", loc="left", color=INK, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel=f"{name}  ({rest})")
    panels[0].annotate("linear", (0.06, 0.9), xycoords="axes fraction", color=PALETTE[9], fontsize=9)
    axes = panels[3]
    for name, marker in (("M", "o"), ("K", "s")):
        weights = [(r["M"] * r["K"], e) for r in series[name] if (e := _extra(r)) is not None]
        if weights:
            pairs, extra = np.array(weights, float).T
            colour = PALETTE[0] if name == "M" else PALETTE[6]
            axes.plot(pairs, np.maximum(extra, LEAST), color=colour, marker=marker, markersize=5, label=f"{name} grows")
    pairs = np.array([r["M"] * r["K"] for r in series["K"]], float)
    axes.plot(pairs, np.maximum(4 * pairs, LEAST), color=PALETTE[9], linestyle=":", label="an array of M x K")
    axes.set(xscale="log", yscale="log", xlabel="M x K")
    axes.set_title("memory, bytes (1 MB: or less)", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in panels:
        _plain(axes)
    return figure


def _extra(result: Result) -> float | None:
    entry = result["contenders"][OURS]
    return entry.get("extra_bytes") if entry["status"] == "measured" else None


def roofline(cases: Mapping[str, Result]) -> Figure | None:
    """Rate of forwards against flops for each byte that must be read, under the probed limits."""
    points = sorted((r for r in cases.values() if r.get("series") == ROOFLINE), key=lambda r: r["M"])
    points = [r for r in points if {"multiply_add", "copy"} <= set(r["limits"])]
    if len(points) < 2:
        return None
    figure, axes = _figure(8, 4.6)
    compute = max(multiply_add_rate(r) or 0.0 for r in points)
    copy = float(np.median([r["limits"]["copy"]["median"] for r in points]))
    intensity = np.array([flops(r) / minimal_bytes(r) for r in points])
    x = np.geomspace(intensity[0] / 2, intensity[-1] * 2, 200)
    axes.plot(x, np.minimum(compute, copy * x), color=INK, linewidth=1.5)
    axes.annotate(
        f"multiply-adds, {compute / 1e9:.0f} GFLOP/s", (x[-1], compute), (0, 5), textcoords="offset points",
        ha="right", color=INK, fontsize=9,
    )  # fmt: skip
    ends = {}
    for name in dict.fromkeys(name for r in points for name in r["contenders"]):
        line = [(flops(r) / minimal_bytes(r), flops(r) / t) for r in points if (t := seconds(r, name)) is not None]
        if line:
            colour, marker = STYLES.get(name, OTHER)
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, **_weight(name))
            ends[name] = line[-1]
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"flops for each byte of the arguments (M = {points[0]['M']} ... {points[-1]['M']})")
    bottom = min(axes.get_ylim()[0], copy * x[0])
    axes.set_ylim(bottom, compute * 2)
    axes.annotate(
        f"copying, {copy / 1e9:.0f} GB/s", (0.02, 0.94), xycoords="axes fraction", color=INK, fontsize=9, va="top"
    )
    title = f"flops a second of a forward; K = {points[0]['K']}, D = {points[0]['D']}; lines: limits probed beside it"
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlim(x[0], x[-1])
    label_right(figure, axes, ends)
    return figure


def accuracy_against_speed(cases: Mapping[str, Result]) -> Figure | None:
    """Error in nats against time as a multiple of fastvae's, for the largest diffuse and concentrated forward."""
    chosen: dict[str, Result] = {}
    for result in cases.values():
        plain = result["suite"] == "mixture" and result["work"] == "forward" and "series" not in result
        if plain and "shared" not in result["inputs"] and best_peer(result) and seconds(result):
            kind = "diffuse" if result["inputs"] == "diffuse" else "concentrated"
            if kind not in chosen or flops(result) > flops(chosen[kind]):
                chosen[kind] = result
    if not chosen:
        return None
    figure = Figure(figsize=(5.4 * len(chosen), 4.4), layout="constrained")
    for axes, (_kind, result) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        points = {}
        for name, entry in result["contenders"].items():
            if entry["status"] == "measured" and (name == OURS or not is_ours(name)):
                colour, marker = STYLES.get(name, OTHER)
                point = (times_faster(result, name) or 1.0, max(entry["errors"]["log_prob"], 1e-8))
                axes.plot(*point, color=colour, marker=marker, markersize=9, linestyle="none")
                points[name] = point
        axes.set(xscale="log", yscale="log", xlabel="time, as a multiple of fastvae's")
        axes.set_title(
            f"error of log p, nats; {result['inputs']}, ({result['M']}, {result['K']}, {result['D']})",
            loc="left", color=INK, fontsize=10,
        )  # fmt: skip
        axes.set_xlim(0.5, 2.5 * max(x for x, _ in points.values()))
        axes.set_ylim(0.2 * min(y for _, y in points.values()), 8 * max(y for _, y in points.values()))
        _plain(axes)
        label_points(figure, axes, points)
    return figure


PLOTS: Mapping[str, Callable[[Mapping[str, Result]], Figure | None]] = {
    "time": time_against_k,
    "memory": memory_against_k,
    "growth": growth,
    "roofline": roofline,
    "accuracy": accuracy_against_speed,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _weight(name: str) -> dict[str, Any]:
    return {"linewidth": 2.6, "markersize": 7, "zorder": 3} if name == OURS else {"linewidth": 1.4, "markersize": 5}
