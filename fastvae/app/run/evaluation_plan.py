"""What an evaluation measures on, and how closely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvae.app.user_errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fastvae.app.data.dataset import Dataset, Split


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure on: the "validation" or "test" set, or `limit` of its images; and how closely.

    These images are evenly spread over the set, which may be ordered by class, as that of static MNIST is.

    `samples` are the importance samples for each image's log-likelihood, and `precision` is the lowest that the kernels
    may compute with.
    """

    split: str = "test"
    samples: int = 5000
    limit: int | None = None
    precision: str = "highest"

    def __post_init__(self) -> None:
        if self.split not in ("validation", "test"):
            raise ConfigError(f"--split is {self.split!r}; it can be validation or test.")

    def images(self, dataset: Dataset) -> Tensor:
        """The images to measure on, [N, pixels]."""
        return self.whole_set(dataset).x[self.rows(dataset)]

    def rows(self, dataset: Dataset) -> list[int]:
        """Which images of the set they are."""
        count = len(self.whole_set(dataset))
        chosen = count if self.limit is None else min(self.limit, count)
        return [number * count // chosen for number in range(chosen)]

    def part(self, dataset: Dataset) -> str:
        """The part of the data that this is, as in a file's name; "" for all test images."""
        count = len(self.whole_set(dataset))
        if self.limit is not None and self.limit < count:
            return f"{self.split}-{self.limit}-of-{count}"
        return "" if self.split == "test" else self.split

    def whole_set(self, dataset: Dataset) -> Split:
        """The set that the images are of."""
        return dataset.validation if self.split == "validation" else dataset.test
