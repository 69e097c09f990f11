"""Draw the validation bound of every recorded reproduction against its epochs: python -m tools.figures.curves [FILE]"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastvae._files import whole_file
from fastvae.app.run.protocol import read_protocol

from .labels import INK, PALETTE, RULE

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "reproductions"


def curves(records: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each data set, with a line for each run and a dot at its best epoch.

    The first fifth of the epochs, far below, does not count for the scale.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        panels.setdefault(read_protocol(record["protocol"]["name"]).config.data, []).append(record)
    figure = Figure(figsize=(8, 0.5 + 3.5 * len(panels)), layout="constrained")
    for axes, (data, runs) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for run, colour in zip(runs, cycle(PALETTE), strict=False):
            bounds, best = run["validation_bounds"], run["best_epoch"]
            name = f"{run['protocol']['name']}, seed {run['seed']}{'' if run['finished'] else ', not finished'}"
            axes.plot(range(1, 1 + len(bounds)), bounds, color=colour, linewidth=1.2, label=name)
            axes.plot(best, bounds[best - 1], "o", color=colour, markersize=5)
        highest = max(max(run["validation_bounds"]) for run in runs)
        lowest = min(min(run["validation_bounds"][len(run["validation_bounds"]) // 5 :]) for run in runs)
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)
        axes.set_title(data, color=INK, loc="left", fontsize="medium")
        axes.set_ylabel("validation bound, nats per image", color=INK)
        axes.grid(color=RULE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("epoch", color=INK)
    return figure


def main(arguments: list[str]) -> int:
    """Write the figure, and print its path; 2 if there is no record."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    if not records:
        print(f"no record in {RECORDS}", file=sys.stderr)
        return 2
    path = Path(arguments[0]) if arguments else ROOT / "docs" / "images" / "reproductions.png"
    with whole_file(path) as file:
        curves(records).savefig(file, format="png", dpi=120, facecolor="white")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
