"""Priors p(z): standard normal, mixtures of parameters, of an encoder's posteriors, of a data set's."""

from fastvae.estimate import Estimate
from fastvae.priors.aggregated import AggregatedPosterior
from fastvae.priors.base import Density, Prior, StandardNormalPrior
from fastvae.priors.encoded import VampPrior
from fastvae.priors.exemplar import ExemplarPrior
from fastvae.priors.mixture import Mixture, MixturePrior
from fastvae.priors.weights import log_weights_of

__all__ = [
    "AggregatedPosterior",
    "Density",
    "Estimate",
    "ExemplarPrior",
    "Mixture",
    "MixturePrior",
    "Prior",
    "StandardNormalPrior",
    "VampPrior",
    "log_weights_of",
]
