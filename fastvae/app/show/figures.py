"""What all figures share: colours, and how they are written."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from fastvae._files import whole_file

# Paul Tol's "muted" scheme, which colour-blind readers can tell apart, and a grey for a tenth class.
PALETTE = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#777777",
)
TRAIN, VALIDATION, INK, RULE = PALETTE[0], PALETTE[6], "#222222", "#dcdcdc"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")
