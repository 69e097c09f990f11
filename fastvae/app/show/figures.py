"""What is drawn on a figure's axes: grids of images and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastvae.app.data.dataset import Dataset
from fastvae.app.data.whole_file import whole_file
from fastvae.app.run.checkpoint import Epoch

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
GAP = 2  # pixels between images


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")


def grid_of_images(x: Tensor, shape: tuple[int, int], columns: int) -> np.ndarray:
    """Lay images x [N, height * width] out row by row as one picture, NaN between and after them.

    Each pixel becomes a square of `magnification(shape)` pixels, so that the gaps stay thin.
    """
    images = x.cpu().numpy().reshape(-1, *shape).repeat(magnification(shape), 1).repeat(magnification(shape), 2)
    _, height, width = images.shape
    rows = ceil(len(images) / columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), np.nan, np.float32)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def magnification(shape: tuple[int, int]) -> int:
    """How many times an image is enlarged for the grid: small ones to about 32 pixels."""
    return max(1, 32 // min(shape))


def draw_images(axes: Axes, x: Tensor, dataset: Dataset, columns: int) -> None:
    """Show images x [N, pixels] on a grid; binary images as dark ink on white paper."""
    ink_is_one = dataset.kind == "binary" and float(dataset.train.x.mean()) < 0.5
    colours = colormaps["gray_r" if ink_is_one else "gray"].with_extremes(bad=RULE)
    axes.imshow(grid_of_images(x, dataset.image_shape, columns), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_pairs(axes: Axes, originals: Tensor, reconstructions: Tensor, dataset: Dataset) -> None:
    """Show one row of originals [N, pixels] above one of their reconstructions."""
    columns = len(originals)
    height = dataset.image_shape[0] * magnification(dataset.image_shape)
    draw_images(axes, torch.cat([originals, reconstructions]), dataset, columns)
    axes.set_yticks([GAP + height / 2 - 0.5, 2 * GAP + 1.5 * height - 0.5], ["original", "reconstruction"])
    axes.tick_params(axis="y", length=0, labelsize=9)


def draw_curves(figure: Figure, history: Sequence[Epoch], bound: str, best_epoch: int, warmup: int) -> None:
    """Draw bound, reconstruction term and KL by epoch, of training and validation, on three new axes."""
    epochs = [line["epoch"] for line in history]
    panels = figure.subplots(1, 3)
    titles = {"bound": bound, "reconstruction": "Reconstruction, E[log p(x|z)]", "kl": "KL(q(z|x) || p(z))"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        train = [line["train"][key] for line in history]  # type: ignore[literal-required]
        validation = [line["validation"][key] for line in history]  # type: ignore[literal-required]
        axes.plot(epochs, train, color=TRAIN, linewidth=1.3, label="training")
        axes.plot(epochs, validation, color=VALIDATION, linewidth=1.3, label="validation")
        axes.axvline(best_epoch, color=INK, linewidth=0.9, linestyle=":", label=f"best model, epoch {best_epoch}")
        if warmup > 1:
            axes.axvspan(1, min(warmup, epochs[-1]), color="#f0f0f0", zorder=0, label="KL warm-up")
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("epoch")
        axes.set_ylim(*_range_after_start(train + validation, len(train)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    panels[0].set_ylabel("nats per image")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _range_after_start(values: list[float], count: int) -> tuple[float, float]:
    """Limits that leave out the first tenth of the epochs, whose drop would flatten all that follows."""
    skip = count // 10
    kept = values[skip:count] + values[count + skip :]
    low, high = min(kept), max(kept)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin
