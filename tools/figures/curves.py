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

from .labels import INK, PALETTE, RULE

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "reproductions"


def curves(records: Sequence[dict[str, Any]]) -> Figure:
    """A line for each run, with a dot at its best epoch; the warm-up's first epochs, far below, are cut off."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for record, colour in zip(records, cycle(PALETTE), strict=False):
        bounds, best = record["validation_bounds"], record["best_epoch"]
        name = f"{record['protocol']['name']}, seed {record['seed']}"
        axes.plot(range(1, 1 + len(bounds)), bounds, color=colour, linewidth=1.2, label=name)
        axes.plot(best, bounds[best - 1], "o", color=colour, markersize=5)
    highest = max(max(record["validation_bounds"]) for record in records)
    axes.set_ylim(highest - 30, highest + 1)
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel("validation bound, nats per image", color=INK)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
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
