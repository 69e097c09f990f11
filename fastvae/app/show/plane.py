"""The plane on which a latent space is drawn, and the densities of mixtures on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvae.app.run.gap import aggregated_posterior
from fastvae.app.run.trained import TrainedRun
from fastvae.priors import Mixture, Prior

MOST_COMPONENTS = 3000


@dataclass(frozen=True)
class Plane:
    """The first two principal components of some points: `centre` [D] and orthonormal `axes` [D, 2]."""

    centre: Tensor
    axes: Tensor
    explained: tuple[float, float]

    def project(self, points: Tensor) -> np.ndarray:
        """[N, D] -> [N, 2]."""
        return ((points - self.centre) @ self.axes).cpu().numpy()

    def covariances(self, logvar: Tensor) -> np.ndarray:
        """Of normals with log variances [K, D], the covariances on the plane: [K, 2, 2]."""
        spread = torch.einsum("di,kd,dj->kij", self.axes, logvar.exp(), self.axes)
        # A plane's second axis may be zero; then give the line a little width.
        return spread.cpu().numpy() + 1e-6 * np.eye(2)


def principal_plane(points: Tensor) -> Plane:
    """The plane in which points [N, D] vary most; its second axis is zero if D is 1."""
    centre = points.mean(0)
    _, scale, directions = torch.linalg.svd(points - centre, full_matrices=False)
    share = scale.square() / scale.square().sum().clamp(min=1e-30)  # all points may be one
    axes = points.new_zeros(points.shape[1], 2)
    axes[:, : len(directions[:2])] = directions[:2].T
    # A direction and its opposite serve alike; take the one whose largest entry is positive, so that none flips.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    return Plane(centre, axes, (float(share[0]), float(share[1]) if len(share) > 1 else 0.0))


def plane_of(run: TrainedRun) -> Plane:
    """The plane for all pictures of a run: where the posterior means of its training images vary most."""
    return principal_plane(aggregated_posterior(run).mu)


def drawable_components(prior: Prior, latent: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """(mu [K, D], logvar [K, D], weights [K]) to draw a density from; the standard prior is a mixture of one.

    Of many components so many as a picture can show, drawn by their weights.
    """
    if not isinstance(prior, Mixture):
        origin = next(prior.buffers()).new_zeros(1, latent)
        return origin, origin, np.ones(1)
    mu, logvar, log_weights = prior.components()
    logvar, weights = logvar.expand(mu.shape), log_weights.exp().cpu()
    if len(mu) > MOST_COMPONENTS:
        drawn = torch.multinomial(weights, MOST_COMPONENTS, True, generator=torch.Generator().manual_seed(0)).to(
            mu.device
        )
        return mu[drawn], logvar[drawn], np.full(MOST_COMPONENTS, 1 / MOST_COMPONENTS)
    return mu, logvar, weights.numpy()


def density_on_plane(
    x: np.ndarray, y: np.ndarray, centres: np.ndarray, covariances: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The density of a mixture of normals on the plane, at all pairs of x [X] and y [Y].

    Args:
        x, y: coordinates.
        centres: [K, 2].
        covariances: [K, 2, 2].
        weights: [K].

    Returns:
        [Y, X].
    """
    density = np.zeros((len(y), len(x)))
    grid = np.stack(np.meshgrid(x, y), -1)  # [Y, X, 2]
    for weight, centre, covariance in zip(weights, centres, covariances, strict=True):
        away = grid - centre
        exponent = np.einsum("...i,ij,...j", away, np.linalg.inv(covariance), away)
        density += weight * np.exp(-0.5 * exponent) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    return density
