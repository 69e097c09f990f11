"""Pictures of the latent space: points and densities on the plane where the training images vary most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from fastvae import MixturePrior, VampPrior
from fastvae.app.run.config import latents_with_prior
from fastvae.app.run.evaluation import posterior_means
from fastvae.app.run.gap import aggregated_posterior
from fastvae.app.run.trained import TrainedRun
from fastvae.app.show.figures import INK, PALETTE
from fastvae.app.show.plane import (
    MOST_COMPONENTS,
    Plane,
    density_on_plane,
    drawable_components,
    plane_of,
    principal_plane,
)

SHADES = ("#efefef", "#e2e2e2", "#d2d2d2", "#bdbdbd")
LEVELS = (0.02, 0.1, 0.3, 0.6)  # of the prior's highest density on the plane, where the shades begin
MOST_POINTS = 3000
GRID = 160  # points along each side for the density


@torch.no_grad()
def draw_latent_space(axes: Axes, run: TrainedRun) -> None:
    """Draw the posterior means of the test images, by class where there are up to ten, and the prior.

    The plane is that of :func:`plane_of`, the same as in the picture of prior and aggregated posterior.

    Grey shades are the prior's density on the plane, what is off the plane integrated out; crosses are the
    means of a mixture's components.
    """
    test = run.dataset.test
    means = posterior_means(run.vae, test.x.to(run.device), run.y(test))
    plane = plane_of(run)
    points = plane.project(means)
    prior = run.vae.prior
    mu, logvar, weights = drawable_components(prior, means.shape[1])
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
    by_class = _draw_points(axes, points, test.labels)
    dots = [Line2D([], [], color=c, marker="o", linestyle="", markersize=4) for c in PALETTE[: 3 if by_class else 1]]
    handles: list[Any] = [Patch(color=SHADES[2]), tuple(dots)]
    names = ["density of the prior", "test images' posterior means" + (", by class" if by_class else "")]
    if isinstance(prior, MixturePrior | VampPrior) and len(mu) < MOST_COMPONENTS:  # exemplars are points like these
        of_pseudo_inputs = isinstance(prior, VampPrior)
        label = f"posteriors of {len(mu)} pseudo-inputs" if of_pseudo_inputs else f"{len(mu)} components"
        size = 26 if len(mu) <= 100 else 10
        axes.scatter(centres[:, 0], centres[:, 1], s=size, marker="x", color=INK, linewidths=0.9, zorder=3)
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", markersize=5))
        names.append(label)
    style = {"fontsize": 8.5, "framealpha": 0.9, "edgecolor": "none"}
    axes.legend(handles, names, loc="upper right", handler_map={tuple: HandlerTuple(None)}, **style)
    _label(axes, plane)


@torch.no_grad()
def draw_densities(panels: Sequence[Axes], run: TrainedRun) -> None:
    """Draw prior and aggregated posterior, on the plane of :func:`plane_of` and with one scale of greys."""
    prior, posterior = run.vae.prior, aggregated_posterior(run)
    plane = principal_plane(posterior.mu)
    spread = np.sqrt(plane.covariances(posterior.logvar.exp().mean(0, keepdim=True).log())[0].diagonal())
    low, high = np.quantile(plane.project(posterior.mu), [0.001, 0.999], axis=0)
    middle, reach = (low + high) / 2, ((high - low) / 2 + 2 * spread).max()
    x, y = (np.linspace(at - reach, at + reach, GRID) for at in middle)
    densities = []
    for mixture in (prior, posterior):
        mu, logvar, weights = drawable_components(mixture, len(plane.centre))
        densities.append(density_on_plane(x, y, plane.project(mu), plane.covariances(logvar), weights))
    levels = np.linspace(0, max(map(np.max, densities)), 13)
    z = latents_with_prior(run.config)
    titles = f"prior, p({z})", f"aggregated posterior, q({z})"
    for axes, density, title in zip(panels, densities, titles, strict=True):
        axes.contourf(x, y, density, levels=levels, cmap="Greys")
        axes.set_title(title, fontsize=11, color=INK)
        _label(axes, plane)


def _label(axes: Axes, plane: Plane) -> None:
    first, second = plane.explained
    axes.set_xlabel(f"first principal component ({first:.0%} of variance)\nof the training images' posterior means")
    axes.set_ylabel(f"second principal component ({second:.0%})")
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)


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


def _draw_points(axes: Axes, points: np.ndarray, labels: Tensor | None) -> bool:
    """Draw points [N, 2], coloured by class where there are 2 to 10 classes; whether they are."""
    shown = np.random.default_rng(0).permutation(len(points))[:MOST_POINTS]
    size = 16 if len(shown) < 1000 else 7
    classes = [] if labels is None else sorted(set(labels.tolist()))
    if labels is None or not 2 <= len(classes) <= len(PALETTE):
        axes.scatter(points[shown, 0], points[shown, 1], s=size, color=PALETTE[0], alpha=0.6, linewidths=0)
        return False
    colour = dict(zip(classes, PALETTE, strict=False))
    # In random order, so that no class lies on top of the others.
    colours = [colour[int(labels[i])] for i in shown]
    axes.scatter(points[shown, 0], points[shown, 1], s=size, c=colours, linewidths=0, alpha=0.9)
    medians = np.stack([np.median(points[labels.numpy() == label], axis=0) for label in classes])
    places = spread_apart(medians, 0.05 * np.ptp(axes.get_xlim()))
    for label, (x, y) in zip(classes, places, strict=True):
        style = {"color": colour[label], "fontsize": 16, "weight": "bold", "ha": "center", "va": "center"}
        axes.text(x, y, str(label), path_effects=[withStroke(linewidth=3.5, foreground="white")], zorder=5, **style)
    return True
