"""What the pictures show, apart from how they look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import multivariate_normal

from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.run.checkpoint import Epoch, Measures
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.evaluation import posterior_means
from fastvae.app.run.gap import aggregated_posterior
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import train
from fastvae.app.show import pictures
from fastvae.app.show.curves import draw_curves
from fastvae.app.show.image_grid import GAP, columns_for, grid_of_images, grid_size, magnification
from fastvae.app.show.latent_space import draw_densities, draw_latent_space, spread_apart
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


@pytest.mark.parametrize(
    ("count", "shape", "columns"),
    [
        (100, (28, 28), 10),
        (7, (8, 8), 7),
        (100, (28, 20), 10),
        (100, (1000, 1), 100),
        (100, (1, 3000), 1),
        (1, (1, 9), 1),
    ],
)
def test_elongated_images_make_no_elongated_picture(count: int, shape: tuple[int, int], columns: int) -> None:
    assert columns_for(count, shape, usual=10) == columns
    height, width = grid_size(count, shape, columns)
    assert grid_of_images(torch.zeros(count, shape[0] * shape[1]), shape, columns).shape == (height, width)
    assert height < 5 * width


def test_the_plane_does_not_flip() -> None:
    torch.manual_seed(0)
    points = torch.randn(400, 3) * torch.tensor([1.0, 5.0, 2.0])
    plane, mirrored = principal_plane(points), principal_plane(2 * points.mean(0) - points)
    torch.testing.assert_close(plane.axes, mirrored.axes)
    assert principal_plane(torch.zeros(5, 3)).explained == (0.0, 0.0)


def test_all_pictures_of_a_run_share_one_plane(run: Path) -> None:
    """That of the training images, though the points are test images."""
    trained = load_run(run)
    figure = Figure()
    axes = figure.subplots()
    draw_latent_space(axes, trained)
    panels = Figure().subplots(1, 2)
    draw_densities(panels, trained)
    assert axes.get_xlabel() == panels[0].get_xlabel() == panels[1].get_xlabel()
    assert axes.get_ylabel() == panels[0].get_ylabel()
    plane = principal_plane(aggregated_posterior(trained).mu)
    assert f"({plane.explained[0]:.0%} of variance)" in axes.get_xlabel()
    expected = plane.project(posterior_means(trained.vae, trained.dataset.test.x))
    (dots, *_) = [c for c in axes.collections if len(c.get_offsets()) == len(expected)]
    drawn = np.asarray(dots.get_offsets())
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0), atol=1e-5)
    legend = axes.get_legend()
    assert legend is not None
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ["density of the prior", "test images' posterior means, by class", "posteriors of 8 pseudo-inputs"]


def line(epoch: int, value: float) -> Epoch:
    measures = Measures(bound=value, elbo=value, reconstruction=value, kl=-value)
    return Epoch(epoch=epoch, beta=1.0, train=measures, validation=measures, seconds=1.0)


def test_curves_mark_what_is_off_the_scale_and_label_their_axes() -> None:
    history = [line(epoch, -100.0 / epoch) for epoch in range(1, 41)]
    figure = Figure()
    draw_curves(figure, history, "ELBO", 40, warmup=4)
    for axes, marker in zip(figure.axes, ("v", "v", "^"), strict=True):
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "nats per image"
        low, high = axes.get_ylim()
        edge = low if marker == "v" else high
        marked = [curve for curve in axes.lines if curve.get_marker() == marker]
        assert len(marked) == 2  # training and validation
        for curve in marked:
            np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3, 4])
            np.testing.assert_array_equal(curve.get_ydata(), [edge] * 4)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == "off the scale"
    figure = Figure()
    draw_curves(figure, history[:5], "ELBO", 5, warmup=0)
    assert "off the scale" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_pictures_of_samples_say_what_they_show(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    def keep(figure: Figure, path: Path) -> None:
        titles = [axes.get_title() for axes in figure.axes]
        told[path.name] = " ".join([figure.get_suptitle(), *titles])

    monkeypatch.setattr(pictures, "save_figure", keep)
    trained = load_run(run)
    pictures.draw_run(trained)
    pictures.draw_samples(trained, Path("means.png"), 5)
    pictures.draw_samples(trained, Path("draws.png"), 5, drawn=True)
    pictures.draw_comparison([trained, trained], Path("compare.png"))
    for name in ("samples.png", "means.png", "reconstructions.png", "compare.png"):
        assert "means of p(x|z)" in told[name], told[name]
    assert "pixels drawn from p(x|z)" in told["draws.png"] and "means" not in told["draws.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(6, 6), (300, 1), (1, 300), (1, 1)])
def test_pictures_of_any_shape_are_laid_out(tmp_path: Path, shape: tuple[int, int]) -> None:
    images = torch.rand(60, shape[0] * shape[1]).round()
    split = Split(images, torch.arange(60) % 3)
    data = Dataset("tiny", "made here", split, split, split, image_shape=shape, kind="binary")
    config = TrainConfig(components=4, latent=2, hidden=4, epochs=3, warmup=0)
    train(config, data, tmp_path)
    run = load_run(tmp_path, dataset=data)
    pictures.draw_gap(run)
    pictures.draw_comparison([run, run], tmp_path / "compare.png")
    for path in [*pictures.draw_run(run), tmp_path / "compare.png"]:
        height, width = imread(path).shape[:2]
        assert height < 12 * width and width < 12 * height
