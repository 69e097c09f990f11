"""The latent space, drawn on the plane in which the posterior means spread most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from fastvae import AggregatedPosterior, MixturePrior, VampPrior
from fastvae.app.run.evaluation import posterior_means
from fastvae.app.run.trained import TrainedRun
from fastvae.app.show.figures import INK, PALETTE
from fastvae.priors import Mixture, Prior

SHADES = ("#efefef", "#e2e2e2", "#d2d2d2", "#bdbdbd")
LEVELS = (0.02, 0.1, 0.3, 0.6)  # of the prior's highest density on the plane, where the shades begin
MOST_POINTS = 3000
MOST_COMPONENTS = 3000
GRID = 160  # points along each side for the density


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
    share = scale.square() / scale.square().sum()
    axes = points.new_zeros(points.shape[1], 2)
    axes[:, : len(directions[:2])] = directions[:2].T
    return Plane(centre, axes, (float(share[0]), float(share[1]) if len(share) > 1 else 0.0))


@torch.no_grad()
def draw_latent_space(axes: Axes, run: TrainedRun) -> None:
    """Draw the posterior means of the test images, by class where there are up to ten, and the prior.

    Grey shades are the prior's density on the plane, what is off the plane integrated out; crosses are the
    means of a mixture's components.
    """
    test = run.dataset.test
    means = posterior_means(run.vae, test.x.to(run.device))
    plane = principal_plane(means)
    points = plane.project(means)
    prior = run.vae.prior
    mu, logvar, weights = _components(prior, means.shape[1])
    centres = plane.project(mu)

    every = np.concatenate([points, centres])
    reach = 0.62 * np.ptp(every, axis=0).max()
    middle = (every.min(0) + every.max(0)) / 2
    axes.set_xlim(middle[0] - reach, middle[0] + reach)
    top = 1.2 * reach  # with room for the legend
    axes.set_ylim(middle[1] - reach, middle[1] + top)

    x = np.linspace(middle[0] - reach, middle[0] + reach, GRID)
    y = np.linspace(middle[1] - reach, middle[1] + top, GRID)
    density = density_on_plane(x, y, centres, plane.covariances(logvar), weights)
    axes.contourf(x, y, density, levels=[v * density.max() for v in (*LEVELS, 1.0)], colors=SHADES, zorder=0)
    _draw_points(axes, points, test.labels)
    handles: list[Artist] = [Patch(color=SHADES[2], label="density of the prior")]
    if isinstance(prior, MixturePrior | VampPrior) and len(mu) < MOST_COMPONENTS:  # exemplars are points like these
        of_pseudo_inputs = isinstance(prior, VampPrior)
        label = f"posteriors of {len(mu)} pseudo-inputs" if of_pseudo_inputs else f"{len(mu)} components"
        size = 26 if len(mu) <= 100 else 10
        axes.scatter(centres[:, 0], centres[:, 1], s=size, marker="x", color=INK, linewidths=0.9, zorder=3)
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", markersize=5, label=label))
    axes.legend(handles=handles, loc="upper right", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
    axes.set_xlabel(f"first principal component ({plane.explained[0]:.0%} of variance)")
    axes.set_ylabel(f"second principal component ({plane.explained[1]:.0%})")
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)


@torch.no_grad()
def draw_densities(panels: Sequence[Axes], prior: Prior, posterior: AggregatedPosterior) -> None:
    """Draw prior and aggregated posterior, on one plane and with one scale of greys."""
    plane = principal_plane(posterior.mu)
    spread = np.sqrt(plane.covariances(posterior.logvar.exp().mean(0, keepdim=True).log())[0].diagonal())
    low, high = np.quantile(plane.project(posterior.mu), [0.001, 0.999], axis=0)
    middle, reach = (low + high) / 2, ((high - low) / 2 + 2 * spread).max()
    x, y = (np.linspace(at - reach, at + reach, GRID) for at in middle)
    densities = []
    for mixture in (prior, posterior):
        mu, logvar, weights = _components(mixture, len(plane.centre))
        densities.append(density_on_plane(x, y, plane.project(mu), plane.covariances(logvar), weights))
    levels = np.linspace(0, max(map(np.max, densities)), 13)
    titles = "prior, p(z)", "aggregated posterior, q(z)"
    for axes, density, title in zip(panels, densities, titles, strict=True):
        axes.contourf(x, y, density, levels=levels, cmap="Greys")
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel(f"first principal component of the means ({plane.explained[0]:.0%} of variance)")
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"second principal component ({plane.explained[1]:.0%})")


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


def spread_apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Push places [N, 2] that are closer than `distance` apart, so that labels on them do not overlap."""
    places = places.astype(float)
    for _ in range(200):
        away = places[:, None] - places  # [N, N, 2]
        gap = np.linalg.norm(away, axis=-1)
        np.fill_diagonal(gap, np.inf)
        overlap = (distance - gap).clip(min=0)
        if not overlap.any():
            break
        places += 0.5 * (away / gap.clip(min=1e-9)[..., None] * overlap[..., None]).sum(1)
    return places


def _components(prior: Prior, latent: int) -> tuple[Tensor, Tensor, np.ndarray]:
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


def _draw_points(axes: Axes, points: np.ndarray, labels: Tensor | None) -> None:
    shown = np.random.default_rng(0).permutation(len(points))[:MOST_POINTS]
    size = 16 if len(shown) < 1000 else 7
    classes = [] if labels is None else sorted(set(labels.tolist()))
    if labels is None or not 2 <= len(classes) <= len(PALETTE):
        axes.scatter(points[shown, 0], points[shown, 1], s=size, color=PALETTE[0], alpha=0.6, linewidths=0)
        return
    colour = dict(zip(classes, PALETTE, strict=False))
    # In random order, so that no class lies on top of the others.
    colours = [colour[int(labels[i])] for i in shown]
    axes.scatter(points[shown, 0], points[shown, 1], s=size, c=colours, linewidths=0, alpha=0.9)
    medians = np.stack([np.median(points[labels.numpy() == label], axis=0) for label in classes])
    places = spread_apart(medians, 0.05 * np.ptp(axes.get_xlim()))
    for label, (x, y) in zip(classes, places, strict=True):
        style = {"color": colour[label], "fontsize": 16, "weight": "bold", "ha": "center", "va": "center"}
        axes.text(x, y, str(label), path_effects=[withStroke(linewidth=3.5, foreground="white")], zorder=5, **style)
