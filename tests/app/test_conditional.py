"""`--conditional`: labels through training, evaluation and sampling, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvae import VampPrior
from fastvae.app.data.named_sets import load
from fastvae.app.run.config import make_config
from fastvae.app.run.evaluation import _images
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.trained import TrainedRun, load_run
from fastvae.app.run.training import train

from .conftest import TINY, Cli
from .test_cli import PICTURES, check_picture


def write_labelled(path: Path, **changes: object) -> Path:
    """Ninety images of 4 x 4 pixels whose labels, -1, 4 and 9, say which third is black; these may be changed."""
    random = np.random.default_rng(0)
    which = np.arange(90) % 3
    x = random.random((90, 4, 4)) < 0.1 + 0.8 * (np.arange(4) == which[:, None, None])
    np.savez(path, **{"x": x.astype(np.uint8), "y": np.array([-1, 4, 9])[which], **changes})
    return path


def trained(data: Path, out: Path, *, resume: bool = False, **settings: Any) -> TrainedRun:
    """A run without its pictures, which take the longest."""
    small = {"hidden": 16, "latent": 3, "components": 8, "epochs": 2, "warmup": 1, "conditional": True}
    config = make_config({"data": str(data), **small, **settings})
    train(config, load(str(data)), out, resume=resume)
    return load_run(out)


def test_train_evaluate_sample(cli: Cli, tmp_path: Path) -> None:
    data, out = write_labelled(tmp_path / "labelled.npz"), tmp_path / "run"
    code, _, error = cli("train", "--data", data, "--out", out, *TINY, "--conditional")
    assert code == 0, error
    assert json.loads((out / "config.json").read_text())["conditional"] is True
    for name in PICTURES:
        check_picture(out / name)
    code, _, error = cli("evaluate", out, "--samples", 5, "--limit", 6)
    assert code == 0, error
    assert np.isfinite(json.loads((out / "evaluation-test-6-of-9.json").read_text())["log_likelihood"])
    measured, plan = load_run(out), EvaluationPlan("test", 5, limit=6)
    _, y = _images(measured, plan)
    assert y is not None and torch.equal(y, measured.dataset.y(measured.dataset.test)[plan.rows(measured.dataset)])
    for label in ("-1", "9"):
        code, _, error = cli("sample", out, "--label", label, "-n", 3, "--out", tmp_path / "some.png")
        assert code == 0, error
    check_picture(tmp_path / "some.png")
    code, _, error = cli("sample", out, "--label", 5)
    assert code == 1 and "--label is 5; the labels of labelled are -1, 4, 9." in error


def test_going_on_is_as_without_a_stop(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "labelled.npz")
    whole = trained(data, tmp_path / "whole", epochs=4).checkpoint["model"]
    trained(data, tmp_path / "parts", warmup=1)
    parts = trained(data, tmp_path / "parts", resume=True, epochs=4).checkpoint["model"]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_labels_are_known_again_as_images_are(cli: Cli, tmp_path: Path) -> None:
    """Evaluated, or trained further, with other labels, the model would give other numbers without a word."""
    data, out = write_labelled(tmp_path / "labelled.npz"), tmp_path / "run"
    trained(data, out)
    write_labelled(data, y=np.array([4, -1, 9])[np.arange(90) % 3])
    for command in (["evaluate", out, "--samples", 2], ["train", "--out", out, "--resume", "--epochs", 3]):
        code, _, error = cli(*command)
        assert code == 1 and "does not hold the images with the labels that the run was begun with" in error


def test_components_of_each_label(tmp_path: Path) -> None:
    """They start from images of their label, and weigh together what the label's share of the images is."""
    unequal = np.array([-1] * 50 + [4] * 30 + [9] * 10)
    run = trained(write_labelled(tmp_path / "labelled.npz", y=unequal), tmp_path / "run", learning_rate=1e-9)
    prior, images = run.vae.prior, run.dataset.train
    assert isinstance(prior, VampPrior) and prior.labels is not None
    y = run.dataset.y(images)
    for u, label in zip(prior.pseudo_inputs.detach(), prior.labels, strict=True):
        assert float((images.x - u).abs().sum(1)[y == label].min()) < 1e-3
    weights = torch.zeros(3).index_add(0, prior.labels, prior.component_log_weights().exp())
    torch.testing.assert_close(weights, y.bincount() / len(y))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--prior", "exemplar"], "--conditional goes with --prior standard, mixture or vamp, not with exemplar."),
        ({}, ["-k", "2"], "--components is 2; a conditional model of labelled needs 3 or more, one for each label."),
        ({"y_train": np.arange(90) // 88, "y_test": np.zeros(9, int)}, [], "4 have the label 1, but only"),
        ({"y_test": None}, [], "a conditional model needs labels of all images, and some sets have none."),
        ({"y_test": np.full(9, 5)}, [], "label 5 occurs, but not among the training images."),
    ],
)
def test_what_does_not_fit(cli: Cli, tmp_path: Path, changes: dict[str, Any], options: list[str], message: str) -> None:
    data = write_labelled(tmp_path / "labelled.npz")
    if changes:
        arrays = dict(np.load(data))
        parts = {"x_train": arrays["x"], "y_train": arrays["y"], "x_test": arrays["x"][:9], **changes}
        np.savez(data, **{name: array for name, array in parts.items() if array is not None})
    code, _, error = cli("train", "--data", data, "--out", tmp_path / "run", *TINY, "--conditional", *options)
    assert code == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_data_without_labels_and_runs_without_a_condition(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, _, error = cli("sample", run, "--label", 1)
    assert code == 1 and "--label is for a conditional model, one that was trained with --conditional." in error
    config = json.loads((run / "config.json").read_text())
    del config["conditional"]  # as earlier versions wrote it
    (run / "config.json").write_text(json.dumps(config))
    assert cli("sample", run, "-n", 2)[0] == 0
    np.savez(tmp_path / "plain.npz", x=np.zeros((30, 4, 4), np.uint8))
    code, _, error = cli("train", "--data", tmp_path / "plain.npz", "--out", tmp_path / "new", "--conditional")
    assert code == 1 and "a conditional model needs labels" in error


@pytest.mark.parametrize("prior", ["vamp", "mixture", "standard"])
def test_a_label_decides_the_image(tmp_path: Path, prior: str) -> None:
    """Samples of a label look like its images: their third is the darkest."""
    data = write_labelled(tmp_path / "labelled.npz")
    run = trained(data, tmp_path / "run", prior=prior, epochs=40, learning_rate=0.02, batch_size=20)
    assert run.dataset.classes == (-1, 4, 9)
    y = torch.arange(3).repeat_interleave(20)
    columns = run.vae.sample(60, mean=True, y=y).view(60, 4, 4).mean(1)[:, :3]
    assert float((columns.argmax(1) == y).float().mean()) > 0.9


def test_one_level_of_latents(cli: Cli, tmp_path: Path) -> None:
    code, _, error = cli("train", "--out", tmp_path / "run", "--conditional", "--model", "hvae")
    assert code == 1 and "--conditional is for --model vae; an hvae is not given labels." in error
