"""Fused kernels for the latent side of a variational autoencoder, as autograd functions and as VampPrior layers."""

__version__ = "0.1.0"

from fastvae import reference
from fastvae.backends import info
from fastvae.functional import (
    gaussian_kl,
    gaussian_rsample,
    mixture_kl,
    mixture_log_prob,
    mixture_log_prob_and_score,
)
from fastvae.priors import MixturePrior, StandardNormalPrior, VampPrior
from fastvae.vae import VAE

__all__ = [
    "VAE",
    "MixturePrior",
    "StandardNormalPrior",
    "VampPrior",
    "gaussian_kl",
    "gaussian_rsample",
    "info",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_log_prob_and_score",
    "reference",
]
