"""Fused kernels for the latent side of a variational autoencoder, as autograd functions and as VampPrior layers."""

from fastvae import annealing, bounds, distributions, hmc, reference
from fastvae._version import __version__ as __version__
from fastvae.auditing import audit
from fastvae.backends import info, use_backend
from fastvae.decomposition import decompose_kl, total_correlation
from fastvae.em import MixtureFit, fit_mixture, mixture_responsibilities
from fastvae.functional import (
    gaussian_kl,
    gaussian_rsample,
    mixture_kl,
    mixture_log_prob,
    mixture_log_prob_and_score,
)
from fastvae.grouped import grouped_mixture_log_prob
from fastvae.hierarchical import HierarchicalVAE
from fastvae.likelihoods import Likelihood
from fastvae.marginals import mixture_marginal_log_prob
from fastvae.priors import (
    AggregatedPosterior,
    ExemplarPrior,
    Mixture,
    MixturePrior,
    Prior,
    StandardNormalPrior,
    VampPrior,
    log_weights_of,
)
from fastvae.training import TrainingStep
from fastvae.vae import VAE

__all__ = [
    "VAE",
    "AggregatedPosterior",
    "ExemplarPrior",
    "HierarchicalVAE",
    "Likelihood",
    "Mixture",
    "MixtureFit",
    "MixturePrior",
    "Prior",
    "StandardNormalPrior",
    "TrainingStep",
    "VampPrior",
    "annealing",
    "audit",
    "bounds",
    "decompose_kl",
    "distributions",
    "fit_mixture",
    "gaussian_kl",
    "gaussian_rsample",
    "grouped_mixture_log_prob",
    "hmc",
    "info",
    "log_weights_of",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_log_prob_and_score",
    "mixture_marginal_log_prob",
    "mixture_responsibilities",
    "reference",
    "total_correlation",
    "use_backend",
]
