"""Expectation maximisation (EM) for mixtures of diagonal Gaussians, and responsibilities, on the library's kernels."""

from fastvae.em.fit import MixtureFit, fit_mixture
from fastvae.em.responsibilities import mixture_responsibilities

__all__ = ["MixtureFit", "fit_mixture", "mixture_responsibilities"]
