"""The PNG files of a run, and of a comparison of runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fastvae import VampPrior
from fastvae.app.run.config import bound_name, latents_with_prior
from fastvae.app.run.folder import GAP, PICTURES
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.trained import TrainedRun
from fastvae.app.show.curves import draw_curves
from fastvae.app.show.figures import save_figure
from fastvae.app.show.image_grid import columns_for, draw_images, draw_pairs, grid_size
from fastvae.app.show.latent_space import draw_densities, draw_latent_space
from fastvae.app.user_errors import ConfigError

PRIOR_NAMES = {
    "standard": "standard normal prior",
    "mixture": "mixture prior",
    "vamp": "VampPrior",
    "exemplar": "exemplar prior",
}

MODEL_NAMES = {"vae": "", "hvae": "hierarchical VAE, "}

TALLEST = 60  # inches of a picture, 9,000 pixels; the PNG writer takes 65,535 at most


def draw_run(run: TrainedRun) -> list[Path]:
    """Write every picture of a run into its folder; returns what was written."""
    draw = {
        "curves": _curves,
        "reconstructions": _reconstructions,
        "samples": _samples,
        "pseudo_inputs": _pseudo_inputs,
        "latent_space": _latent_space,
    }
    written = []
    for name in PICTURES:
        if name == "pseudo_inputs" and not isinstance(run.vae.prior, VampPrior):
            continue
        figure = draw[name](run)
        save_figure(figure, run.folder.picture(name))
        written.append(run.folder.picture(name))
    return written


def draw_samples(
    run: TrainedRun, path: Path, count: int, *, drawn: bool = False, seed: int = 0, label: int | None = None
) -> None:
    """Write a picture of `count` samples: the mean image of each z, or with `drawn` its pixels drawn too.

    Those of a conditional model are of one label, or of all labels in turn.
    """
    x = _sample(run, count, drawn, seed, label)
    of_label = "" if label is None else f" of label {label}"
    save_figure(_grid_figure(run, x, f"{count} samples{of_label}, {_shown(drawn)}"), path)


def draw_gap(run: TrainedRun) -> None:
    """Write the densities of prior and aggregated posterior, side by side on one plane, into the run's folder."""
    figure = Figure(figsize=(10.4, 6.4), layout="constrained")
    draw_densities(figure.subplots(1, 2, sharex=True, sharey=True), run)
    figure.suptitle(_title(run, "prior and aggregated posterior of the training images"), fontsize=12)
    save_figure(figure, run.folder.picture(GAP))


def draw_comparison(runs: Sequence[TrainedRun], path: Path) -> None:
    """Write samples and latent spaces of several runs, a column each."""
    figure = Figure(figsize=(5.2 * len(runs), 9.2), layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False, height_ratios=[1, 1.25])
    for column, run in enumerate(runs):
        top, bottom = grid[:, column]
        draw_images(top, _sample(run, 60, False, 0), run.dataset, columns_for(60, run.dataset.image_shape, usual=10))
        top.set_title(f"{_model(run)}: samples,\n{_shown(False)}", fontsize=13)
        draw_latent_space(bottom, run)
        bottom.set_title("latent space", fontsize=13)
    figure.suptitle(runs[0].dataset.name, fontsize=15)
    save_figure(figure, path)


def _title(run: TrainedRun, what: str) -> str:
    return f"{run.dataset.name}, {_model(run)}\n{what}"


def _model(run: TrainedRun) -> str:
    conditional = "conditional, " if run.config.conditional else ""
    return conditional + MODEL_NAMES[run.config.model] + PRIOR_NAMES[run.config.prior]


def _shown(drawn: bool) -> str:
    return "pixels drawn from p(x|z)" if drawn else "means of p(x|z)"


def _sample(run: TrainedRun, count: int, drawn: bool, seed: int, label: int | None = None) -> torch.Tensor:
    reseed(seed, Stream.PICTURES)
    if not run.config.conditional:
        return run.vae.sample(count, mean=not drawn)
    classes = run.dataset.classes
    if label is not None and label not in classes:
        raise ConfigError(f"--label is {label}; the labels of {run.dataset.name} are {_in_words(classes)}.")
    y = torch.arange(count) % len(classes) if label is None else torch.full((count,), classes.index(label))
    return run.vae.sample(count, mean=not drawn, y=y.to(run.device))


def _in_words(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes)) if len(classes) <= 20 else f"{classes[0]} ... {classes[-1]}"


def _grid_figure(run: TrainedRun, x: torch.Tensor, what: str) -> Figure:
    columns = columns_for(len(x), run.dataset.image_shape, usual=10)
    height, width = grid_size(len(x), run.dataset.image_shape, columns)
    figure = Figure(figsize=(6.4, 0.9 + min(6.2 * height / width, TALLEST)), layout="constrained")
    draw_images(figure.subplots(), x, run.dataset, columns)
    figure.suptitle(_title(run, what), fontsize=12)
    return figure


def _samples(run: TrainedRun) -> Figure:
    return _grid_figure(run, _sample(run, 100, False, run.config.seed), f"samples, {_shown(False)}")


@torch.no_grad()
def _pseudo_inputs(run: TrainedRun) -> Figure:
    assert isinstance(run.vae.prior, VampPrior)
    x = run.vae.prior.inputs()
    shown = min(len(x), 100)
    what = f"its {shown} pseudo-inputs" if shown == len(x) else f"{shown} of its {len(x)} pseudo-inputs"
    return _grid_figure(run, x[:shown], what)


def _reconstructions(run: TrainedRun) -> Figure:
    height, width = run.dataset.image_shape
    blocks, columns = 4, columns_for(48, (2 * height, width), usual=12)
    x, y = run.dataset.test.x[: blocks * columns].to(run.device), run.y(run.dataset.test)
    reconstructed = run.vae.reconstruct(x, None if y is None else y[: len(x)])
    blocks = ceil(len(x) / columns)
    pair = grid_size(2, (height, width), 1)[0] / grid_size(1, (height, width), columns)[1]
    inches = min(7 * pair, TALLEST / blocks)
    figure = Figure(figsize=(8, 0.9 + blocks * (0.25 + inches)), layout="constrained")
    for axes, a, b in zip(
        figure.subplots(blocks, squeeze=False)[:, 0],
        x.split(columns),
        reconstructed.split(columns),
        strict=True,
    ):
        draw_pairs(axes, a, b, run.dataset)
    figure.suptitle(_title(run, f"test images and reconstructions, {_shown(False)}"), fontsize=12)
    return figure


def _curves(run: TrainedRun) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bound = bound_name(run.config)
    draw_curves(figure, run.checkpoint["history"], bound, run.checkpoint["best_epoch"], run.config.warmup)
    figure.suptitle(_title(run, "training"), fontsize=12)
    return figure


def _latent_space(run: TrainedRun) -> Figure:
    figure = Figure(figsize=(6.8, 7.6), layout="constrained")
    axes = figure.subplots()
    draw_latent_space(axes, run)
    z = latents_with_prior(run.config)
    what = "posterior means of the test images" + ("" if z == "z" else f", {z}")
    axes.set_title(_title(run, what), fontsize=12)
    return figure
