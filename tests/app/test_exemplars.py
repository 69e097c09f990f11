"""What `--prior exemplar` is where nothing more is said, and that a run keeps what it was begun with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fastvae import ExemplarPrior
from fastvae.app import workflow
from fastvae.app.data.named_sets import load
from fastvae.app.run import config as config_module
from fastvae.app.run.config import TrainConfig, begun, make_config, read_config
from fastvae.app.run.networks import build
from fastvae.app.run.protocol import protocol_names, read_protocol
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import train

from .conftest import TINY, Cli

SMALL = {"hidden": 8, "latent": 2, "epochs": 2, "warmup": 0, "prior": "exemplar"}


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sixty-four training images of `tiny_npz` are many; and no pictures, which take most of the time."""
    monkeypatch.setattr(config_module, "EXEMPLARS", 10)
    for name in ("draw_run", "draw_gap", "draw_comparison"):
        monkeypatch.setattr(workflow, name, lambda *_: None)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize(
    ("options", "subset", "shared"),
    [
        ([], 10, True),
        (["--no-shared-variance"], 10, False),
        (["--subset", 12], 12, True),
        (["--refresh", 0.5], None, True),
        (["--backward-components", 5], None, True),
    ],
)
def test_what_is_not_said_is_decided_when_a_run_begins(
    cli: Cli, tmp_path: Path, tiny_npz: Path, options: list[Any], subset: int | None, shared: bool
) -> None:
    """It stands in config.json, and the model is by it."""
    code, _, error = cli("train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY, "--prior", "exemplar", *options)
    assert code == 0, error
    found = settings(tmp_path / "run")
    assert (found["subset"], found["shared_variance"]) == (subset, shared)
    prior = load_run(tmp_path / "run").vae.prior
    assert isinstance(prior, ExemplarPrior) and prior.subset == subset and (prior.logvar is not None) == shared


@pytest.mark.parametrize(("images", "subset"), [(499, None), (500, None), (501, 500)])
def test_all_exemplars_where_there_are_few(images: int, subset: int | None) -> None:
    config = make_config({"prior": "exemplar"})
    assert begun(config, images) == replace(config, subset=subset)


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
def test_other_priors_have_no_exemplars(prior: str) -> None:
    config = make_config({"prior": prior})
    assert begun(config, 10**6) == config and not config.shared_variance


@pytest.mark.usefixtures("fewer")
def test_a_run_goes_on_with_what_it_was_begun_with(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    """An earlier version began with all exemplars, each with its own variance; so this run goes on."""
    run = tmp_path / "run"
    small = ["--data", tiny_npz, "--out", run, *TINY, "--prior", "exemplar"]
    assert cli("train", *small, "--subset", 64, "--no-shared-variance")[0] == 0
    config = settings(run)
    del config["shared_variance"]
    (run / "config.json").write_text(json.dumps({**config, "subset": None}))
    code, _, error = cli("train", "--out", run, "--resume", "--epochs", 3)
    assert code == 0, error
    assert settings(run) == {**config, "subset": None, "shared_variance": False, "epochs": 3}
    code, _, error = cli("train", "--out", run, "--resume", "--epochs", 4, "--shared-variance")
    assert code == 1 and "--shared-variance is True, but the run to be resumed was begun with False" in error


@pytest.mark.usefixtures("fewer")
def test_a_run_by_the_default_goes_on_to_the_same_bits(tmp_path: Path, tiny_npz: Path) -> None:
    config = make_config({"data": str(tiny_npz), **SMALL})
    data = load(config.data)
    straight = train(config, data, tmp_path / "straight")
    train(replace(config, epochs=1), data, tmp_path / "parts")
    saved = read_config(tmp_path / "parts" / "config.json")
    resumed = train(replace(saved, epochs=2), data, tmp_path / "parts", resume=True)
    assert settings(tmp_path / "parts") == settings(tmp_path / "straight")
    assert [line["validation"] for line in resumed["history"]] == [line["validation"] for line in straight["history"]]


def test_a_subset_of_all_is_all(tiny_npz: Path) -> None:
    """With several processes too, where each then encodes a share."""
    config = make_config({"data": str(tiny_npz), **SMALL, "subset": 64})
    prior = build(config, load(config.data)).prior
    assert isinstance(prior, ExemplarPrior) and prior.subset is None


@pytest.mark.usefixtures("fewer")
def test_a_comparison_has_the_same_default(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    command = ["compare", "--data", tiny_npz, "--priors", "vamp,exemplar", "--out", tmp_path, *TINY, "--samples", 5]
    assert cli(*command)[0] == 0
    found = settings(tmp_path / "exemplar-seed0")
    assert found["subset"] == 10 and found["shared_variance"]
    assert not settings(tmp_path / "vamp-seed0")["shared_variance"]
    before = (tmp_path / "exemplar-seed0" / "checkpoint.pt").stat().st_mtime_ns
    assert cli(*command)[0] == 0, "the same command goes on"
    assert (tmp_path / "exemplar-seed0" / "checkpoint.pt").stat().st_mtime_ns == before


def test_protocols_say_how_many_exemplars_a_step_takes() -> None:
    """They are compared with a run's settings, which no default may have changed."""
    exemplar = [read_protocol(name).config for name in protocol_names() if "exemplar" in name]
    assert [(c.subset, c.shared_variance, c.backward_components) for c in exemplar] == [(25_000, True, 1000)]
    for name in protocol_names():
        config: TrainConfig = read_protocol(name).config
        assert asdict(begun(config, 50_000)) == asdict(config)
