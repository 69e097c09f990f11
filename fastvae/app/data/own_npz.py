"""An .npz file of the user's own images."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import numpy as np

from fastvae.app.data.array_files import read_npz
from fastvae.app.data.dataset import Dataset, Kind, Split, binarise_held_out, cut, make_split
from fastvae.app.user_errors import DataError

PARTS = ("train", "valid", "test")
FEWEST = 10  # images in all; fewer cannot be cut into three sets that mean anything


def load_npz(path: Path, *, binarize: bool = False) -> Dataset:
    """Load the images of an .npz file.

    Args:
        path: holds `x_train` [N, height, width] or [N, pixels], and may hold `x_valid` and `x_test`, and
            the classes `y_train`, `y_valid` and `y_test` [N], whole numbers. Or it holds `x` and perhaps `y`
            for all images. A set that is missing is cut off with a fixed seed: 10 % of the images each.
            `image_shape` [2] tells height and width when flat images are not square. Pixels are uint8
            levels 0 to 255, or floats in [0, 1].
        binarize: binarise grey images dynamically, for the Bernoulli likelihood. Without it, images of only
            two levels (0 and 1, or 0 and 255) are binary and all others are grey.

    Raises:
        DataError: the file is damaged, or its arrays are not as above.
    """
    arrays = read_npz(path)
    if "x" in arrays and "x_train" in arrays:
        raise DataError(
            f"{path}: holds both x and x_train, so it is not clear which images are meant. Keep x alone for images "
            "that are to be cut into sets, or x_train (with x_valid, x_test) for sets that are cut already."
        )
    if "x" in arrays:
        renamed = {"x": "x_train", "y": "y_train", "image_shape": "image_shape"}
        arrays = {renamed[key]: array for key, array in arrays.items() if key in renamed}
    if "x_train" not in arrays:
        raise DataError(f"{path}: should hold x_train or x; it holds {', '.join(sorted(arrays)) or 'nothing'}.")

    images = {part: arrays[f"x_{part}"] for part in PARTS if f"x_{part}" in arrays}
    shape = _image_shape(path, images["train"], arrays.get("image_shape"))
    binary = all(_two_levels(x) for x in images.values())
    pixels = {part: _pixels(path, f"x_{part}", x, shape) for part, x in images.items()}
    labels = {part: _labels(path, f"y_{part}", arrays.get(f"y_{part}"), len(x)) for part, x in images.items()}

    kind: Kind = "binary" if binary or binarize else "gray"
    if kind == "gray":
        # The discretised logistic takes the middle of each of 256 levels.
        pixels = {part: (np.round(x * 255) + 0.5) / 256 for part, x in pixels.items()}
    splits = _splits(path, pixels, labels)
    dynamic = binarize and not binary
    if dynamic:
        splits = binarise_held_out(splits)
    return Dataset(path.stem, str(path.absolute()), *splits, image_shape=shape, kind=kind, dynamic=dynamic)


def _image_shape(path: Path, x: np.ndarray, given: np.ndarray | None) -> tuple[int, int]:
    if x.ndim == 4 and x.shape[-1] == 1:
        return int(x.shape[1]), int(x.shape[2])
    if x.ndim == 3:
        return int(x.shape[1]), int(x.shape[2])
    if x.ndim != 2:
        raise DataError(
            f"{path}: x_train is {list(x.shape)} and should be [N, height, width] or [N, pixels]; images "
            "with more than one channel are not supported."
        )
    pixels, side = x.shape[1], isqrt(x.shape[1])
    if given is None:
        return (side, side) if side * side == pixels else (1, pixels)
    if given.shape != (2,) or given.dtype.kind not in "iu" or int(given[0]) * int(given[1]) != pixels:
        raise DataError(f"{path}: image_shape should be height and width with height x width = {pixels}.")
    return int(given[0]), int(given[1])


def _two_levels(x: np.ndarray) -> bool:
    high = 255 if x.dtype == np.uint8 and x.max(initial=0) > 1 else 1
    return bool(((x == 0) | (x == high)).all())


def _pixels(path: Path, key: str, x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Check one array of images and return it as float32 [N, pixels] in [0, 1]."""
    if len(x) == 0 or x[0].size != shape[0] * shape[1] or x.size == 0:
        raise DataError(f"{path}: {key} is {list(x.shape)} and should hold images of {shape[0]} x {shape[1]}.")
    flat = x.reshape(len(x), -1)
    if x.dtype == np.uint8:
        # Levels 0 and 1 alone can only be meant as black and white.
        return flat.astype(np.float32) / (255 if x.max() > 1 else 1)
    if x.dtype == bool or x.dtype.kind == "f":
        if not np.isfinite(flat).all():
            bad = np.unique(np.nonzero(~np.isfinite(flat))[0])
            raise DataError(f"{path}: {key} holds NaN or infinity in {len(bad)} images, the first at index {bad[0]}.")
        low, high = float(flat.min()), float(flat.max())
        if low < 0 or high > 1:
            raise DataError(
                f"{path}: {key} holds values from {low:g} to {high:g}; floats should be in [0, 1], and "
                "levels from 0 to 255 should be saved as uint8."
            )
        return flat.astype(np.float32)
    raise DataError(f"{path}: {key} is {x.dtype}; it should be uint8 (0 to 255) or float (0 to 1).")


def _labels(path: Path, key: str, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iub":
        raise DataError(f"{path}: {key} is {labels.dtype} {list(labels.shape)} and should be whole numbers [{count}].")
    return labels


def _splits(path: Path, x: dict[str, np.ndarray], labels: dict[str, np.ndarray | None]) -> tuple[Split, Split, Split]:
    """Take the sets that are given and cut the others off the training set."""
    total = len(x["train"])
    if total < FEWEST:
        raise DataError(f"{path}: holds {total} training images; at least {FEWEST} are needed.")
    sizes = {"validation": 0 if "valid" in x else total // 10, "test": 0 if "test" in x else total // 10}
    train, validation, test = cut(x["train"], labels["train"], **sizes)
    if "valid" in x:
        validation = make_split(x["valid"], labels["valid"])
    if "test" in x:
        test = make_split(x["test"], labels["test"])
    return train, validation, test
