"""Mixtures of diagonal Gaussians as PyTorch's distributions."""

from fastvae.distributions.mixture import MixtureOfDiagNormals

__all__ = ["MixtureOfDiagNormals"]
