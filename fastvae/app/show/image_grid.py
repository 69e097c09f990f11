"""Images on a grid."""

from __future__ import annotations

from math import ceil, sqrt

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from fastvae.app.data.dataset import Dataset
from fastvae.app.show.figures import RULE

GAP = 2  # pixels between images
ELONGATED = 4  # times as long as wide, or as wide as long, and more


def columns_for(count: int, shape: tuple[int, int], usual: int) -> int:
    """How many of `count` images stand side by side: the usual number, or what gives elongated ones a square."""
    if max(shape) >= ELONGATED * min(shape):
        usual = round(sqrt(count * shape[0] / shape[1]))
    return min(max(1, usual), count)


def grid_size(count: int, shape: tuple[int, int], columns: int) -> tuple[int, int]:
    """Height and width of the picture that `grid_of_images` makes, in pixels."""
    height, width = (side * magnification(shape) + GAP for side in shape)
    return ceil(count / columns) * height + GAP, columns * width + GAP


def grid_of_images(x: Tensor, shape: tuple[int, int], columns: int) -> np.ndarray:
    """Lay images x [N, height * width] out row by row as one picture, NaN between and after them.

    Each pixel becomes a square of `magnification(shape)` pixels, so that the gaps stay thin.
    """
    images = x.cpu().numpy().reshape(-1, *shape).repeat(magnification(shape), 1).repeat(magnification(shape), 2)
    _, height, width = images.shape
    canvas = np.full(grid_size(len(images), shape, columns), np.nan, np.float32)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def magnification(shape: tuple[int, int]) -> int:
    """How many times an image is enlarged for the grid: small ones to about 32 pixels."""
    return max(1, 32 // max(shape))


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
