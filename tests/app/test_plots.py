"""What the pictures show, apart from how they look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from fastvae.app.show.image_grid import GAP, grid_of_images, magnification
from fastvae.app.show.latent_space import spread_apart
from fastvae.app.show.plane import density_on_plane, principal_plane


def test_images_lie_row_by_row() -> None:
    x = torch.arange(3.0)[:, None].expand(3, 32 * 40)
    grid = grid_of_images(x, (32, 40), columns=2)
    assert grid.shape == (2 * 32 + 3 * GAP, 2 * 40 + 3 * GAP)
    assert grid[GAP, GAP] == 0 and grid[GAP, GAP + 40 + GAP] == 1 and grid[GAP + 32 + GAP, GAP] == 2
    assert np.isnan(grid[-1, -1]) and np.isnan(grid[GAP + 32 + GAP, GAP + 40 + GAP])
    assert np.isfinite(grid).sum() == 3 * 32 * 40


def test_an_image_is_not_transposed() -> None:
    grid = grid_of_images(torch.arange(6.0)[None], (2, 3), columns=1)
    m = magnification((2, 3))
    np.testing.assert_array_equal(grid[GAP:-GAP:m, GAP:-GAP:m], [[0, 1, 2], [3, 4, 5]])


def test_plane_is_where_points_spread_most() -> None:
    torch.manual_seed(0)
    points = torch.randn(4000, 4) * torch.tensor([1.0, 5.0, 0.1, 3.0]) + 7
    plane = principal_plane(points)
    assert plane.axes[1, 0].abs() > 0.99 and plane.axes[3, 1].abs() > 0.99
    assert plane.explained == pytest.approx((25 / 35, 9 / 35), abs=0.03)
    np.testing.assert_allclose(plane.project(points).mean(0), 0, atol=1e-4)


def test_density_on_plane_is_the_mixtures_marginal() -> None:
    torch.manual_seed(0)
    plane = principal_plane(torch.randn(50, 3))
    mu, logvar = torch.randn(2, 3), torch.randn(2, 3)
    weights = np.array([0.3, 0.7])
    centres, covariances = plane.project(mu), plane.covariances(logvar)
    x, y = np.array([0.1, -0.8]), np.array([0.0, 0.5, 1.0])
    density = density_on_plane(x, y, centres, covariances, weights)
    axes = plane.axes.double().numpy()
    for i, j in np.ndindex(3, 2):
        expected = sum(
            w * multivariate_normal(c, axes.T @ np.diag(np.exp(v)) @ axes).pdf((x[j], y[i]))
            for w, c, v in zip(weights, centres, logvar.double().numpy(), strict=True)
        )
        assert density[i, j] == pytest.approx(expected, rel=1e-3)


def test_labels_are_spread_apart_and_others_left_alone() -> None:
    places = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [5.0, 5.0]])
    spread = spread_apart(places, 1.0)
    gaps = np.linalg.norm(spread[:, None] - spread, axis=-1) + 9 * np.eye(4)
    assert gaps.min() > 0.99
    np.testing.assert_array_equal(spread[3], places[3])
    assert np.abs(spread[:3] - places[:3]).max() < 1
