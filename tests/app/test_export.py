"""`fastvae export`: the best model's weights as safetensors; `fastvae train --tensorboard`: its history as events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastvae.app.options
from app.conftest import TINY, Cli
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.folder import RunFolder

RUN = ["train", "--data", "digits", *TINY, "--out", "run"]


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = fastvae.app.options.find_spec
    monkeypatch.setattr(fastvae.app.options, "find_spec", lambda name: None if name == package else find(name))


def test_the_exported_weights_are_the_best_models(cli: Cli) -> None:
    load = pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert cli(*RUN)[0] == 0
    code, out, _ = cli("export", "run")
    assert code == 0 and "run/model.safetensors" in out
    checkpoint = read_checkpoint(RunFolder(Path("run")))
    with load.safe_open("run/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(checkpoint["best_model"])
        for name, tensor in checkpoint["best_model"].items():
            assert torch.equal(file.get_tensor(name), tensor)
        metadata = file.metadata()
    assert json.loads(metadata["config"])["components"] == 8
    assert float(metadata["validation_bound"]) == checkpoint["best_bound"]
    assert int(metadata["epoch"]) == checkpoint["best_epoch"]

    code, _, err = cli("export", "run")
    assert code == 1 and "is there already; say --overwrite" in err
    assert cli("export", "run", "--overwrite")[0] == 0
    assert cli("export", "run", "--out", "other.safetensors")[0] == 0
    for out, words in (("weights.pt", "should be the name of a file"), ("none/model.safetensors", "does not exist")):
        code, _, err = cli("export", "run", "--out", out)
        assert code == 1 and words in err


def test_a_failed_export_leaves_the_earlier_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert cli(*RUN)[0] == 0 and cli("export", "run")[0] == 0
    before = Path("run/model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvae._files.os.fsync", full)
    code, _, err = cli("export", "run", "--overwrite")
    assert code == 1 and "No space left" in err
    assert Path("run/model.safetensors").read_bytes() == before
    assert not list(Path("run").glob(".*.part"))


def test_export_without_safetensors_or_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = cli("export", "nothing")
    assert code == 1 and "nothing" in err
    assert cli(*RUN)[0] == 0
    without("safetensors", monkeypatch)
    code, _, err = cli("export", "run")
    assert code == 1 and 'pip install "fastvae-kernels[safetensors]"' in err
    assert not Path("run/model.safetensors").exists()


def events(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(folder).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_events_are_the_history(cli: Cli) -> None:
    pytest.importorskip(
        "tensorboard", reason='tensorboard is not installed: pip install "fastvae-kernels[tensorboard]"'
    )
    assert cli(*RUN, "--tensorboard")[0] == 0
    assert cli("train", "--out", "run", "--resume", "--epochs", "3", "--tensorboard", "--device", "cpu")[0] == 0
    history = read_checkpoint(RunFolder(Path("run")))["history"]
    shown = events("run/tensorboard")
    assert {tag.partition("/")[0] for tag in shown} == {"train", "validation", "beta", "seconds"}
    assert shown["validation/bound"] == [
        (line["epoch"], pytest.approx(line["validation"]["bound"])) for line in history
    ]
    assert [step for step, _ in shown["train/kl"]] == [1, 2, 3]

    assert cli(*RUN, "--overwrite", "--tensorboard")[0] == 0
    assert [step for step, _ in events("run/tensorboard")["train/kl"]] == [1, 2]
    assert cli(*RUN, "--overwrite")[0] == 0
    assert not list(Path("run/tensorboard").glob("*"))  # they would be those of another run


def test_without_tensorboard_nothing_is_trained(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    without("tensorboard", monkeypatch)
    code, _, err = cli(*RUN, "--tensorboard")
    assert code == 1 and "--tensorboard needs tensorboard, which is not installed; pip install" in err
    assert not Path("run").exists()
