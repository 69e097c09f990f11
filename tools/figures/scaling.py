"""How the cost of scoring grows with devices, by `fastvae plan`: python -m tools.figures.scaling [FILE.png]"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from fastvae._files import whole_file
from fastvae.app.planning.cost import Rates, Work, all_rates, growth

from .labels import INK, PALETTE, RULE

ROOT = Path(__file__).resolve().parents[2]
WORK = Work(10_000_000, 1_000_000, 16)
NETWORKS = (1, 10, 100)  # GB/s: no measurement, but what one may have
MOST = 1024


def scaling(devices: dict[str, Rates]) -> Figure:
    """Seconds against the number of devices: rows sharded, components sharded over several networks, a ring."""
    figure = Figure(figsize=(5.2 * len(devices), 4.2), layout="constrained")
    for axes, (name, rates) in zip(figure.subplots(1, len(devices), squeeze=False)[0], devices.items(), strict=True):
        rows = [(n, c.seconds) for n, c in growth(WORK, rates, "rows", MOST)]
        axes.plot(*zip(*rows, strict=True), color=PALETTE[0], linewidth=2.4, label="rows sharded")
        for network, colour in zip(NETWORKS, (PALETTE[6], PALETTE[4], PALETTE[2]), strict=True):
            work = replace(WORK, network=network * 1e9)
            points = [(n, c.seconds) for n, c in growth(work, rates, "components", MOST)]
            label = f"components sharded, {network} GB/s"
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
        work = replace(WORK, network=NETWORKS[0] * 1e9)
        ring = [(n, c.seconds) for n, c in growth(work, rates, "ring", MOST)]
        label = f"both sharded, in a ring, {NETWORKS[0]} GB/s"
        axes.plot(*zip(*ring, strict=True), color=PALETTE[1], linewidth=1.6, linestyle="--", label=label)
        axes.set(xscale="log", yscale="log", xlabel="devices")
        title = f"seconds on {name}; M = {WORK.rows:,}, K = {WORK.components:,}, D = {WORK.dims}"
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.grid(color=RULE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def main(arguments: list[str]) -> int:
    """Print the file that was written."""
    path = Path(arguments[0]) if arguments else ROOT / "docs" / "images" / "scaling.png"
    rates = all_rates()
    with whole_file(path) as file:
        scaling({name: rates[name] for name in ("cpu", "h200")}).savefig(file, format="png", dpi=100, facecolor="white")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
