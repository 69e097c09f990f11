"""The hierarchical model on the command line: the whole way of a run, and runs of versions that had no other model."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from support.capture import capture_in_name

from fastvae import HierarchicalVAE
from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.config import TrainConfig, make_config, read_config
from fastvae.app.run.folder import PICTURES, RunFolder
from fastvae.app.run.measuring import with_fixed_prior
from fastvae.app.run.networks import build
from fastvae.app.run.training import train
from fastvae.app.user_errors import ConfigError

from .conftest import TINY, Cli
from .test_train import assert_same, tiny_data

HVAE = TrainConfig(model="hvae", components=6, latent=3, hidden=12, epochs=3, warmup=1, batch_size=32)


def test_train_evaluate_sample(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, error = cli("train", "--model", "hvae", "--out", out, *TINY)
    assert code == 0, error
    for name in PICTURES:
        assert imread(out / f"{name}.png")[..., :3].std() > 0.02, f"{name} is blank"
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == "hvae"
    history = json.loads((out / "results.json").read_text())["history"]
    assert history[1]["validation"]["bound"] > history[0]["validation"]["bound"]

    code, text, error = cli("evaluate", out, "--samples", 20, "--limit", 30, "--device", "cpu")
    assert code == 0, error
    evaluation = json.loads((out / "evaluation-test-30-of-300.json").read_text())
    assert evaluation["elbo"] < evaluation["log_likelihood"] < -10 and evaluation["latent"] == 3
    assert "digits, hvae, vamp prior" in text and "active units of z2" in text and "KL(q(z2) || p(z2))" in text

    code, text, error = cli("sample", out, "-n", 7, "--draw", "--out", tmp_path / "seven.png")
    assert code == 0, error
    assert imread(tmp_path / "seven.png")[..., :3].std() > 0.02

    code, _, error = cli("train", "--out", out, "--resume", "--model", "vae")
    assert code == 1 and "--model is vae, but the run to be resumed was begun with hvae" in error
    code, _, error = cli("train", "--out", tmp_path / "other", "--model", "deep")
    assert code == 1 and "--model is 'deep'; it can be vae, hvae" in error


@torch.no_grad()
def test_a_model_as_large_as_the_papers() -> None:
    """40 latents at each level, layers of 300; logvar within [-6, 2]."""
    data = tiny_data()
    vae = build(make_config({"data": "mnist", "model": "hvae", "components": 20}), data)
    assert isinstance(vae, HierarchicalVAE)
    weights = {name: list(parameter.shape) for name, parameter in vae.named_parameters() if "value" in name}
    assert weights["encoder.body.0.value.weight"] == [300, 9] and weights["encoder.body.1.value.weight"] == [300, 300]
    for name, inputs in (("lower_encoder", (9, 40)), ("decoder", (40, 40))):
        assert weights[f"{name}.body.first.value.weight"] == [300, inputs[0]]
        assert weights[f"{name}.body.second.value.weight"] == [300, inputs[1]]
        assert weights[f"{name}.body.joined.value.weight"] == [300, 600]
    assert weights["lower_prior.body.0.value.weight"] == [300, 40]
    output = vae(data.train.x, num_samples=2)
    assert output.z.shape == (2, 80, 80)
    for logvar in (vae.lower_encoder(data.train.x, 100 * output.z2)[1], vae.lower_prior(100 * output.z2)[1]):
        assert float(logvar.min()) == -6 and float(logvar.max()) == 2


@pytest.mark.parametrize("prior", ["standard", "vamp"])
@pytest.mark.parametrize("kind", ["binary", "gray"])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, prior: str, kind: str) -> None:
    config, data = replace(HVAE, prior=prior), tiny_data(kind, dynamic=kind == "binary")
    straight = train(config, data, tmp_path / "straight")
    train(replace(config, epochs=2), data, tmp_path / "parts")
    torch.rand(17)
    assert_same(straight, train(config, data, tmp_path / "parts", resume=True))
    assert_same(straight, read_checkpoint(RunFolder(tmp_path / "parts")))


@pytest.mark.parametrize("prior", ["mixture", "exemplar"])
def test_other_priors_and_the_iwae_bound(tmp_path: Path, prior: str) -> None:
    config = replace(HVAE, prior=prior, bound="iwae", num_samples=3, gradient="dreg")
    last = train(config, tiny_data(), tmp_path)["history"][-1]
    assert last["validation"]["bound"] > last["validation"]["elbo"]


def test_evaluation_encodes_the_prior_once() -> None:
    vae = build(HVAE, tiny_data())
    fixed = with_fixed_prior(vae)
    assert isinstance(fixed, HierarchicalVAE) and fixed.lower_encoder is vae.lower_encoder
    x, bounds = tiny_data().train.x, []
    for model in (vae, fixed):
        torch.manual_seed(1)
        bounds.append(model(x).bound)
    assert torch.allclose(*bounds) and "pseudo_inputs" not in dict(fixed.prior.named_parameters())


@pytest.mark.usefixtures("tiny_npz")
def test_captured_training_has_the_same_numbers(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--data", "tiny.npz", *TINY, "--model", "hvae", "--learning-rate", "0.0009765625"]
    assert cli(*command, "--out", "plain")[0] == 0
    shapes = capture_in_name(monkeypatch)
    assert cli(*command, "--out", "captured")[0] == 0
    assert shapes
    plain, captured = (json.loads((Path(out) / "results.json").read_text())["history"] for out in ("plain", "captured"))
    for line in (*plain, *captured):
        line.pop("seconds")
    assert captured == plain


def test_compare(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    command = ["compare", "--data", tiny_npz, "--out", tmp_path / "all", "--seeds", 1, *TINY, "--samples", 10]
    code, _, error = cli(*command, "--model", "hvae")
    assert code == 0, error
    assert json.loads((tmp_path / "all" / "compare.json").read_text())["config"]["model"] == "hvae"
    code, _, error = cli(*command)
    assert code == 1 and "--model is vae" in error


def test_a_run_from_before_there_was_another_model(cli: Cli, run: Path, tmp_path: Path) -> None:
    """Its settings have no `model`, and it is read, evaluated and gone on with as what it was."""
    path = run / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("model") == "vae"
    path.write_text(json.dumps(settings))
    assert asdict(read_config(path)) == settings | {"model": "vae"}
    code, _, error = cli("evaluate", run, "--samples", 5, "--device", "cpu")
    assert code == 0, error
    other = Path(shutil.copytree(run, tmp_path / "other"))
    code, _, error = cli("train", "--out", run, "--resume", "--epochs", 3, "--device", "cpu")
    assert code == 0 and json.loads(path.read_text())["model"] == "vae", error
    code, _, error = cli("train", "--out", other, "--resume", "--model", "hvae")
    assert code == 1 and "--model is hvae" in error


def test_a_model_that_memory_cannot_hold_counts_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that are refused are those that there would be, but for biases."""
    data = load("digits", None)
    config = make_config({"model": "hvae", "prior": "standard", "hidden": 50})
    weights = sum(p.numel() for name, p in build(config, data).named_parameters() if name.endswith("weight"))
    monkeypatch.setattr("fastvae.app.run.networks.physical_memory", lambda: 20 * weights - 1)
    with pytest.raises(ConfigError, match=f"make {weights:,} weights"):
        build(config, data)
    monkeypatch.setattr("fastvae.app.run.networks.physical_memory", lambda: 20 * weights)
    build(config, data)
