"""The experiment with an exemplar prior's ways of training: what it records, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import load_run
from tools.experiments import exemplar

NAMES = "vamp", "subset-500", "refresh-shared"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Eighty images of 5 x 5 pixels; subsets that fit them."""
    file, random = tmp_path / "tiny.npz", np.random.default_rng(0)
    np.savez(file, x=(random.random((80, 5, 5)) < 0.3).astype(np.uint8))
    small = {"data": str(file), "prior": "exemplar", "hidden": 8, "latent": 2, "components": 6, "epochs": 2}
    monkeypatch.setattr(exemplar, "SETTINGS", small)
    monkeypatch.setattr(exemplar, "EVERY", 2)
    monkeypatch.setattr(exemplar, "SAMPLES", 5)
    monkeypatch.setattr(exemplar, "SHOWN", (1, 2, 3))
    monkeypatch.setattr(exemplar, "SUBSET", {"subset": 20})
    monkeypatch.setattr(exemplar, "REFRESH", {"refresh": 0.01, "neighbours": 5})
    monkeypatch.setitem(exemplar.WAYS, "subset-500", {"subset": 20, "shared_variance": False})
    return small


def test_ways_are_trained_and_recorded(
    short: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was stopped goes on; the record has what each run is worth beside the VampPrior's."""
    short["epochs"] = 1
    assert exemplar.main([str(tmp_path), "--only", "vamp"]) == 0
    assert read_checkpoint(RunFolder(tmp_path / "vamp"))["epoch"] == 1
    short["epochs"] = 2
    command = [str(tmp_path), "--only", *NAMES, "--out", str(tmp_path / "record.json")]
    assert exemplar.main(command) == 0
    assert capsys.readouterr().err.count("vamp: epoch") == 2, "the first epoch is not trained again"
    found = json.loads((tmp_path / "record.json").read_text())
    assert (
        list(found["ways"]) == list(NAMES)
        and (found["images"], found["importance_samples"]) == (4, 5)
        and found["code"]["digest"]
    )
    for name, way in found["ways"].items():
        assert way["finished"] and len(way["validation"]["elbo"]) == way["epochs"] == 2
        assert way["elbo"] == pytest.approx(way["reconstruction"] - way["kl"]) and way["elbo"] < way["log_likelihood"]
        assert ("better_by" in way) == (name != "vamp")
    own, shared = (found["ways"][name]["settings"] for name in NAMES[1:])
    assert (own["subset"], own["shared_variance"]) == (20, False)
    assert (shared["refresh"], shared["neighbours"], shared["shared_variance"]) == (0.01, 5, True)
    assert found["ways"]["subset-500"]["better_by"] == pytest.approx(
        found["ways"]["subset-500"]["log_likelihood"] - found["ways"]["vamp"]["log_likelihood"]
    )
    table = exemplar.markdown(found).splitlines()
    assert len(table) == 2 + len(NAMES) and "own variances" in table[3] and "one variance" in table[4]
    assert [len(of(found).splitlines()) for of in (exemplar.term_table, exemplar.gradient_table)] == [5, 4]

    (tmp_path / "record.json").unlink()
    assert exemplar.main([*command, "--as-they-are"]) == 0
    again = json.loads((tmp_path / "record.json").read_text())
    for way in (*again["ways"].values(), *found["ways"].values()):
        assert 0 < way.pop("step_seconds") < 1
    assert again["ways"] == found["ways"] and again["gradients"] == found["gradients"]


def test_gradients_are_whole_where_all_is_encoded(short: dict[str, Any], tmp_path: Path) -> None:
    """A subset of all, and a refresh of all, leave nothing out; a refresh of few leaves some."""
    short["epochs"] = 1
    exemplar.trained("subset-500", RunFolder(tmp_path), load(short["data"]))
    run = load_run(tmp_path)
    exemplar.SUBSET["subset"], exemplar.REFRESH["refresh"], exemplar.REFRESH["neighbours"] = 64, 0.999, 0
    found = exemplar.gradients(run)
    for way in found.values():
        assert way["distance"] < 0.05 and way["arrives"] == pytest.approx(1, abs=0.05)
    exemplar.REFRESH["refresh"] = 0.25
    fewer = exemplar.gradients(run)["refresh"]
    assert fewer["distance"] > 0.05 and 0.1 < fewer["arrives"] < 0.5
