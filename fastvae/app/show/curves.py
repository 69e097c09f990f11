"""How a run's bound and its two terms went, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastvae.app.run.checkpoint import Epoch
from fastvae.app.show.figures import INK, TRAIN, VALIDATION


def draw_curves(figure: Figure, history: Sequence[Epoch], bound: str, best_epoch: int, warmup: int) -> None:
    """Draw bound, reconstruction term and KL by epoch, of training and validation, on three new axes.

    Triangles at the edge mark epochs whose values are off the scale.
    """
    epochs = [line["epoch"] for line in history]
    panels = figure.subplots(1, 3)
    titles = {"bound": bound, "reconstruction": "Reconstruction, E[log p(x|z)]", "kl": "KL(q(z|x) || p(z))"}
    off_scale = False
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        train = [line["train"][key] for line in history]  # type: ignore[literal-required]
        validation = [line["validation"][key] for line in history]  # type: ignore[literal-required]
        axes.plot(epochs, train, color=TRAIN, linewidth=1.3, label="training")
        axes.plot(epochs, validation, color=VALIDATION, linewidth=1.3, label="validation")
        axes.axvline(best_epoch, color=INK, linewidth=0.9, linestyle=":", label=f"best model, epoch {best_epoch}")
        if warmup > 1:
            axes.axvspan(1, min(warmup, epochs[-1]), color="#f0f0f0", zorder=0, label="KL warm-up")
        axes.set_ylim(*range_after_start(train + validation, len(train)))
        for values, colour in ((train, TRAIN), (validation, VALIDATION)):
            off_scale |= _mark_off_scale(axes, epochs, values, colour)
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("epoch")
        axes.set_ylabel("nats per image")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    handles, _ = panels[0].get_legend_handles_labels()
    if off_scale:
        handles.append(Line2D([], [], color=INK, marker="v", linestyle="", markersize=4, label="off the scale"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def range_after_start(values: list[float], count: int) -> tuple[float, float]:
    """Limits that leave out the first tenth of the epochs, whose drop would flatten all that follows."""
    skip = count // 10
    kept = values[skip:count] + values[count + skip :]
    low, high = min(kept), max(kept)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _mark_off_scale(axes: Axes, epochs: Sequence[int], values: Sequence[float], colour: str) -> bool:
    """Put a triangle at the edge for each value beyond it; whether there was one."""
    low, high = axes.get_ylim()
    found = False
    for edge, marker, beyond in ((low, "v", [v < low for v in values]), (high, "^", [v > high for v in values])):
        at = [epoch for epoch, out in zip(epochs, beyond, strict=True) if out]
        if at:  # an empty line that may leave its axes has no size, and breaks the layout of the whole figure
            axes.plot(at, [edge] * len(at), color=colour, marker=marker, linestyle="", markersize=4, clip_on=False)
            found = True
    return found
