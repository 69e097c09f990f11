"""How far a trained model's prior is from its aggregated posterior, in numbers."""

from __future__ import annotations

import torch
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on alone

from fastvae import AggregatedPosterior
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.trained import TrainedRun
from fastvae.priors import Estimate

DRAWS = 10_000  # of z from q(z), for each estimate


class MeanAndError(TypedDict):
    """A mean over draws and its standard error, nats."""

    value: float
    standard_error: float


class Gap(TypedDict):
    """Prior and aggregated posterior of the training images; see :class:`fastvae.AggregatedPosterior`."""

    images: int
    draws: int
    mutual_information: MeanAndError
    marginal_kl: MeanAndError
    total_correlation: MeanAndError
    dimension_wise_kl: list[MeanAndError]


def aggregated_posterior(run: TrainedRun) -> AggregatedPosterior:
    """q(z) over all training images; where each epoch draws their pixels, over one draw of them."""
    x = run.dataset.train.x.to(run.device)
    if run.dataset.dynamic:
        reseed(run.config.seed, Stream.EVALUATE, 1)
        x = torch.bernoulli(x)
    return AggregatedPosterior.of(run.vae.encoder, x, run.y(run.dataset.train))


def measure_gap(run: TrainedRun) -> Gap:
    """Measure how far the prior of a run's best model is from q(z)."""
    posterior, prior = aggregated_posterior(run), run.vae.prior.snapshot()
    reseed(run.config.seed, Stream.EVALUATE, 2)
    each = posterior.dimension_wise_kl(prior, DRAWS)
    return Gap(
        images=len(posterior.mu),
        draws=DRAWS,
        mutual_information=_plain(posterior.mutual_information(DRAWS)),
        marginal_kl=_plain(posterior.marginal_kl(prior, DRAWS)),
        total_correlation=_plain(posterior.total_correlation(DRAWS)),
        dimension_wise_kl=[_plain(Estimate(*pair)) for pair in zip(*each, strict=True)],
    )


def _plain(estimate: Estimate) -> MeanAndError:
    return MeanAndError(value=float(estimate.value), standard_error=float(estimate.standard_error))
