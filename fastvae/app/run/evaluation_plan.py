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
    """What to measure on: the "validation" or "test" set, or its first `limit` images; and how closely.

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
        return self.whole_set(dataset).x[: self.limit]

    def part(self, dataset: Dataset) -> str:
        """The part of the data that this is, as in a file's name; "" for all test images."""
        partial = self.limit is not None and self.limit < len(self.whole_set(dataset))
        if partial:
            return f"{self.split}-first-{self.limit}"
        return "" if self.split == "test" else self.split

    def whole_set(self, dataset: Dataset) -> Split:
        """The set that the images are of."""
        return dataset.validation if self.split == "validation" else dataset.test
