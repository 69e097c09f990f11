"""Published figures: their protocols, and a run by one, from its beginning to its record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import Adam

from fastvae import VampPrior
from fastvae.app.data.dataset import Dataset, make_split
from fastvae.app.run import protocol
from fastvae.app.run.config import make_config, read_config
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.networks import TruncatedLogistic, build
from fastvae.app.run.optimizer import NormalizedAdam
from fastvae.app.run.protocol import protocol_names, read_protocol
from fastvae.app.user_errors import ConfigError

from .conftest import Cli

TINY = """
title = "A tiny figure"
differences = ["Nobody has published it."]

[train]
data = "{data}"
prior = "vamp"
components = 8
hidden = 16
latent = 3
epochs = 3
warmup = 1

[[published]]
log_likelihood = -1.5
source = "nobody"
looked_up = ""
"""


@pytest.fixture
def tiny_protocol(tmp_path: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a protocol that takes seconds."""
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "tiny.toml").write_text(TINY.format(data=tiny_npz))
    monkeypatch.setattr(protocol, "_FOLDER", folder)
    return "tiny"


@pytest.mark.parametrize("name", protocol_names())
def test_protocol(name: str) -> None:
    read = read_protocol(name)
    assert read.name == name and read.title
    assert read.plan == EvaluationPlan("test", samples=5000, limit=None, precision="highest")
    # By the paper of Tomczak and Welling, whose figures most of these are.
    assert (read.config.warmup, read.config.patience, read.config.batch_size) == (100, 50, 100)
    assert all(figure.source and figure.log_likelihood < -80 for figure in read.published)


def test_list(cli: Cli) -> None:
    code, text, error = cli("reproduce")
    assert code == 0, error
    assert all(name in text for name in protocol_names()) and "-85.57" in text


def test_no_such_protocol(cli: Cli) -> None:
    code, _, error = cli("reproduce", "vampprior-imagenet")
    assert code == 1 and "'vampprior-imagenet'" in error and "vampprior-static-mnist" in error


def test_run_and_record(cli: Cli, tmp_path: Path, tiny_protocol: str) -> None:
    out = tmp_path / "run"
    code, text, error = cli("reproduce", tiny_protocol, "--out", out, "--seed", 3)
    assert code == 0, error
    record = json.loads((out / "reproduction.json").read_text())
    assert record["finished"] and record["epochs"] == 3 and record["seed"] == 3
    assert len(record["validation_bounds"]) == 3
    assert record["best_epoch"] == 1 + record["validation_bounds"].index(max(record["validation_bounds"]))
    found = record["evaluation"]["log_likelihood"]
    assert f"{found:.2f}" in text and f"{found + 1.5:+.2f}" in text and "Nobody has published it." in text
    assert found == json.loads((out / "evaluation.json").read_text())["log_likelihood"]

    times = {path: path.stat().st_mtime_ns for path in (out / "checkpoint.pt", out / "evaluation.json")}
    code, text, error = cli("reproduce", tiny_protocol, "--out", out, "--seed", 3)
    assert code == 0, error
    assert times == {path: path.stat().st_mtime_ns for path in times}  # nothing is done twice


def test_an_evaluation_by_other_settings_is_not_recorded(cli: Cli, tmp_path: Path, tiny_protocol: str) -> None:
    out = tmp_path / "run"
    assert cli("reproduce", tiny_protocol, "--out", out)[0] == 0
    assert cli("evaluate", out, "--precision", "medium")[0] == 0
    by_medium = (out / "evaluation.json").read_bytes()
    code, text, error = cli("reproduce", tiny_protocol, "--out", out)
    assert code == 0 and "evaluation-5000-medium.json" in text, error
    assert json.loads((out / "reproduction.json").read_text())["evaluation"]["precision"] == "highest"
    assert (out / "evaluation-5000-medium.json").read_bytes() == by_medium


def test_as_it_is(cli: Cli, tmp_path: Path, tiny_protocol: str) -> None:
    out = tmp_path / "run"
    code, _, error = cli("reproduce", tiny_protocol, "--out", out, "--as-it-is")
    assert code == 1 and "--as-it-is" in error and "no run" in error
    assert cli("reproduce", tiny_protocol, "--out", out)[0] == 0
    # As if it had been stopped: the settings ask for more epochs than there were.
    folder = tmp_path / "protocols" / "tiny.toml"
    folder.write_text(folder.read_text().replace("epochs = 3", "epochs = 50"))
    code, text, error = cli("reproduce", tiny_protocol, "--out", out, "--as-it-is")
    assert code == 0, error
    record = json.loads((out / "reproduction.json").read_text())
    assert not record["finished"] and record["epochs"] == 3 and "not finished" in text


def test_as_it_is_on_some_images(cli: Cli, tmp_path: Path, tiny_protocol: str) -> None:
    """A run that has ended is not finished either, as long as not all images are measured."""
    out = tmp_path / "run"
    assert cli("reproduce", tiny_protocol, "--out", out)[0] == 0
    code, text, error = cli("reproduce", tiny_protocol, "--out", out, "--as-it-is", "--limit", 5)
    assert code == 0 and "5 test images; not finished" in text, error
    record = json.loads((out / "reproduction.json").read_text())
    assert not record["finished"] and record["evaluation"]["images"] == 5
    code, text, error = cli("reproduce", tiny_protocol, "--out", out, "--as-it-is")
    assert code == 0 and "not finished" not in text, error
    code, _, error = cli("reproduce", tiny_protocol, "--out", out, "--limit", 5)
    assert code == 1 and "--limit is for --as-it-is" in error


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("seed", 1, "--seed is 1 there and should be 0"), ("chunk_size", 4, "--chunk-size is 4 there and should be None")],
)
@pytest.mark.parametrize("more", [[], ["--as-it-is"]])
def test_folder_of_another_run(
    cli: Cli, tmp_path: Path, tiny_protocol: str, setting: str, value: int, message: str, more: list[str]
) -> None:
    """Also one with a setting that the protocol leaves alone."""
    out = tmp_path / "run"
    assert cli("reproduce", tiny_protocol, "--out", out)[0] == 0
    (out / "reproduction.json").unlink()
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), setting: value}))
    code, _, error = cli("reproduce", tiny_protocol, "--out", out, *more)
    assert code == 1 and message in error and "another --out" in error and "--overwrite" not in error
    assert not (out / "reproduction.json").exists()


@pytest.mark.parametrize("wrong", ["colour = 1", "[[published]]\nlog_likelihood = true\nsource = ''\nlooked_up = ''"])
def test_protocols_are_checked(tmp_path: Path, tiny_protocol: str, wrong: str) -> None:
    path = tmp_path / "protocols" / "tiny.toml"
    text = path.read_text()
    path.write_text(f"{wrong}\n{text}" if "=" in wrong.splitlines()[0] else f"{text}\n{wrong}\n")
    with pytest.raises(ValueError):
        read_protocol(tiny_protocol)


def test_config_of_before(run: Path) -> None:
    path = run / "config.json"
    content = json.loads(path.read_text())
    for added in ("shared_variance", "normalize_gradients", "truncated_logistic"):
        del content[added]
    path.write_text(json.dumps(content))
    config = read_config(path)
    assert not config.shared_variance and not config.normalize_gradients


def test_normalized_adam() -> None:
    """Adam's steps on gradients of norm one, whatever the scale of the loss; a gradient of zero moves nothing."""
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected, still = (torch.nn.Parameter(start.clone()) for _ in range(3))
    ours, plain = NormalizedAdam([found, still], lr=0.1), Adam([expected], lr=0.1)
    for gradient in gradients:
        found.grad, still.grad = 1e3 * gradient, torch.zeros_like(still)
        expected.grad = gradient / gradient.norm()
        ours.step()
        plain.step()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(still, torch.nn.Parameter(start), rtol=0, atol=0)
    with pytest.raises(TypeError, match="closure"):
        ours.step(lambda: 0.0)


def test_normalized_gradients_are_another_run(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    weights = []
    for name, more in (("plain", []), ("normalized", ["--normalize-gradients"])):
        command = ["train", "--data", tiny_npz, "--out", tmp_path / name, "--hidden", 16, "--latent", 3, "-k", 8]
        assert cli(*command, "--epochs", 2, "--warmup", 1, *more)[0] == 0
        weights.append(torch.load(tmp_path / name / "checkpoint.pt")["model"]["encoder.mu.weight"])
    assert not torch.equal(*weights)


def test_flat_pseudo_inputs_and_shared_variance(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    small = ["--hidden", 16, "--latent", 3, "--epochs", 1, "--warmup", 0, "--data", tiny_npz]
    assert cli("train", *small, "-k", 8, "--pseudo-init", "flat", "--out", tmp_path / "flat")[0] == 0
    pseudo_inputs = torch.load(tmp_path / "flat" / "checkpoint.pt")["model"]["prior.pseudo_inputs"]
    assert (pseudo_inputs - 0.05).abs().max() < 0.1
    assert cli("train", *small, "--prior", "exemplar", "--shared-variance", "--out", tmp_path / "shared")[0] == 0
    assert torch.load(tmp_path / "shared" / "checkpoint.pt")["model"]["prior.logvar"].shape == ()


def test_flat_pseudo_inputs_of_grey_faces_start_in_the_middle() -> None:
    """Where the published code starts them, by its data set."""
    splits = tuple(make_split(np.full((4, 6), 0.5)) for _ in range(3))
    config = make_config({"pseudo_init": "flat", "components": 200, "hidden": 4, "latent": 2})
    for name, mean, deviation in (("freyfaces", 0.5, 0.02), ("mine", 0.05, 0.01)):
        vae = build(config, Dataset(name, "here", *splits, image_shape=(2, 3), kind="gray"))
        assert isinstance(vae.prior, VampPrior)
        start = vae.prior.pseudo_inputs.detach()
        assert float(start.mean()) == pytest.approx(mean, abs=5 * deviation / 1200**0.5)
        assert float(start.std()) == pytest.approx(deviation, rel=0.1)


def test_truncated_logistic_is_the_published_formula() -> None:
    """log_Logistic_256 of jmtomczak/vae_vampprior, in its float32: log(cdf(b) - cdf(a) + 1e-7)."""
    generator = torch.Generator().manual_seed(0)
    mean, x = torch.rand(50, 7, generator=generator), (torch.randint(256, (50, 7), generator=generator) + 0.5) / 256
    logscale = -4.5 * torch.rand(50, 7, generator=generator)
    scale = logscale.exp()
    lower = (torch.floor(x / (1 / 256)) * (1 / 256) - mean) / scale
    theirs = torch.log(torch.sigmoid(lower + 1 / 256 / scale) - torch.sigmoid(lower) + 1e-7)
    ours = TruncatedLogistic().log_prob((mean, logscale), x)
    # Both subtract two sigmoids in float32, each of which is rounded by up to 2^-24.
    assert bool(((ours - theirs).exp() - 1).abs().le(2**-22 / theirs.exp()).all())
    levels = (torch.arange(256) + 0.5) / 256
    half, wide = torch.full((256,), 0.5), torch.full((256,), -2.0)
    total = float(TruncatedLogistic().log_prob((half, wide), levels).exp().sum())
    assert total == pytest.approx(0.951, abs=1e-3)


def test_truncated_logistic_trains_grey_images_alone(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    grey = tmp_path / "grey.npz"
    np.savez(grey, x=np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    small = ["--hidden", 8, "--latent", 2, "--epochs", 2, "--warmup", 0, "--prior", "standard"]
    bounds = []
    for name, more in (("whole", []), ("truncated", ["--truncated-logistic"])):
        code, _, error = cli("train", *small, "--data", grey, "--out", tmp_path / name, *more)
        assert code == 0, error
        bounds.append(json.loads((tmp_path / name / "results.json").read_text())["best_validation_bound"])
    assert bounds[0] > bounds[1], "without the tails, a probability is smaller"
    code, _, error = cli("train", *small, "--data", tiny_npz, "--out", tmp_path / "no", "--truncated-logistic")
    assert code == 1 and "--truncated-logistic" in error and "binary" in error


def test_option_of_another_start() -> None:
    with pytest.raises(ConfigError, match="pseudo-init"):
        make_config({"pseudo_init": "blank"})
