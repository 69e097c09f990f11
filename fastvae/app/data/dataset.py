"""What a data set is: rows of pixels in [0, 1], in a training, a validation and a test set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastvae.app.user_errors import DataError

SPLIT_SEED = 20180411  # cuts and binarises; fixed, so that runs of every seed share one test set

Kind = Literal["binary", "gray"]


@dataclass(frozen=True)
class Split:
    """Images as float32 [N, pixels] in [0, 1], and their classes as int64 [N] if they have any."""

    x: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Dataset:
    """Images in three sets.

    kind "binary" is for the Bernoulli likelihood, "gray" for the discretised logistic one, whose pixels are
    (level + 0.5) / 256. If `dynamic`, the training pixels are probabilities, to be drawn afresh in every
    epoch (dynamic binarisation); validation and test pixels have been drawn once, with a fixed seed.
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    image_shape: tuple[int, int]
    kind: Kind
    dynamic: bool = False

    @property
    def num_pixels(self) -> int:
        """Pixels in an image: height times width."""
        return self.image_shape[0] * self.image_shape[1]

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The different labels of the training images, in order; none where there are no labels."""
        labels = self.train.labels
        return () if labels is None else tuple(labels.unique().tolist())

    def y(self, split: Split) -> Tensor:
        """Which of the `classes` each image of a set is of, int64 [N].

        Raises:
            DataError: the set has no labels, or one that no training image has.
        """
        if split.labels is None or not self.classes:
            raise DataError(f"{self.source}: a conditional model needs labels of all images, and some sets have none.")
        others = sorted(set(split.labels.tolist()) - set(self.classes))
        if others:
            raise DataError(f"{self.source}: label {others[0]} occurs, but not among the training images.")
        return torch.searchsorted(torch.tensor(self.classes), split.labels)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all images, and of how they are to be read: the same for the same data, wherever they lie."""
        digest = hashlib.sha256(repr((self.kind, self.dynamic, self.image_shape)).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.x.shape)).encode())
            digest.update(split.x.contiguous().numpy().data)
        return digest.hexdigest()

    @cached_property
    def labelled_fingerprint(self) -> str:
        """As `fingerprint`, of all images and their labels.

        Raises:
            DataError: as :meth:`y`.
        """
        digest = hashlib.sha256(self.fingerprint.encode())
        for split in (self.train, self.validation, self.test):
            digest.update(torch.tensor(self.classes)[self.y(split)].numpy().data)
        return digest.hexdigest()


Splits = tuple[Split, Split, Split]


def make_split(x: ArrayLike, labels: ArrayLike | None = None) -> Split:
    """Turn arrays, x [N, pixels] and labels [N] or None, into a Split."""
    classes = None if labels is None else torch.from_numpy(np.array(labels, np.int64))
    return Split(torch.from_numpy(np.array(x, np.float32)), classes)


def cut(x: np.ndarray, labels: np.ndarray | None, *, validation: int, test: int) -> Splits:
    """Shuffle x [N, pixels] with the fixed seed and cut off a validation and a test set of these sizes."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    first = len(x) - validation - test
    parts = np.split(order, [first, first + validation])
    train, held_out, last = (make_split(x[p], None if labels is None else labels[p]) for p in parts)
    return train, held_out, last


def binarise_held_out(splits: Splits) -> Splits:
    """Draw the validation and test pixels once, each 1 with its grey level as probability."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, validation, test = splits
    drawn = [Split(torch.bernoulli(s.x, generator=generator), s.labels) for s in (validation, test)]
    return train, drawn[0], drawn[1]
