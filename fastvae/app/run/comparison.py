"""Which prior is better: the results of several priors over several seeds, and a verdict on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One prior's results, a value for each seed."""

    prior: str
    log_likelihood: list[float]
    elbo: list[float]
    kl: list[float]
    active_units: list[int | None]
    seconds_per_epoch: list[float]


@dataclass(frozen=True)
class Verdict:
    """How the best prior's mean log-likelihood stands to the runner-up's, in nats per image.

    `difference` is the mean over seeds of the paired differences; `margin` is the half-width of its 95 %
    confidence interval by Student's t, or None with one seed, which has no spread.
    """

    winner: str
    runner_up: str
    difference: float
    margin: float | None
    seeds: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.margin is not None and self.difference > self.margin

    def __str__(self) -> str:
        claim = f"better than {self.runner_up} by {self.difference:.2f} nats per image"
        if self.margin is None:
            return (
                f"{self.winner} is {claim} with this one seed, which does not tell whether that is more than "
                "noise; use --seeds 3 or more."
            )
        interval = f"mean over {self.seeds} seeds, 95 % confidence interval +-{self.margin:.2f}"
        if self.beyond_noise:
            return f"{self.winner} wins: it is {claim} ({interval}), more than the noise over seeds."
        return f"No prior wins: {self.winner} is {claim} ({interval}), not more than the noise over seeds."


def judge(rows: Sequence[Row]) -> Verdict:
    """Compare the two best of two or more priors, seed by seed."""
    first, second = sorted(rows, key=lambda row: fmean(row.log_likelihood), reverse=True)[:2]
    differences = [a - b for a, b in zip(first.log_likelihood, second.log_likelihood, strict=True)]
    count, margin = len(differences), None
    if count > 1:
        from scipy.stats import t as student_t  # a second of importing that no other command needs

        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        margin = quantile * stdev(differences) / math.sqrt(count)
    return Verdict(first.prior, second.prior, fmean(differences), margin, count)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean of some values, +- their standard deviation if there are several."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {stdev(values):.{digits}f}"
