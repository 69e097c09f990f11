"""Training the published code beside ours: on a stand-in for it, of one weight."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.run.config import TrainConfig
from tools.experiments import anchor_training

CODE = """
import torch

class VAE(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.idle_input = torch.eye(2)

    def calculate_loss(self, x, beta=1., average=False):
        kl = (self.w - torch.rand(())) ** 2
        return x.mean() + beta * kl, -x.mean(), kl
"""
NAME = "vampprior-static-mnist"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the published code's names, and a data set of 300 images; the modules are forgotten afterwards."""
    for name, text in (("models/VAE.py", CODE), ("utils/optimizer.py", "from torch.optim import Adam as AdamNormGrad")):
        file = tmp_path / "code" / name
        file.parent.mkdir(parents=True)
        file.with_name("__init__.py").touch()
        file.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("scipy.misc", "models", "models.VAE", "utils", "utils.optimizer"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is taken back
        del sys.modules[name]
    x = Split(torch.ones(300, 4))
    data = Dataset("static-mnist", "made here", x, x, x, image_shape=(2, 2), kind="binary")
    monkeypatch.setattr(anchor_training, "load", lambda name: data)
    return tmp_path / "code"


def train(checkout: Path, work: Path, epochs: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return anchor_training.measure(checkout, NAME, work, epochs)
    finally:
        torch.set_num_threads(threads)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(checkout: Path, tmp_path: Path) -> None:
    whole = train(checkout, tmp_path / "whole", 4)
    assert train(checkout, tmp_path / "parts", 2)["published_code"] == whole["published_code"][:2]
    parts = train(checkout, tmp_path / "parts", 4)
    assert parts["published_code"] == whole["published_code"] and len(set(whole["published_code"])) == 4
    assert not whole["ended"] and len(whole["fastvae"]) > 300
    told = anchor_training.markdown(whole)
    assert "| 4 |" in told and "trained for 4 epochs, which were not all" in told


def test_it_ends_as_the_published_code_does() -> None:
    config = TrainConfig(warmup=3, patience=2)

    def ended(*bounds: float) -> bool:
        return anchor_training.ended([{"validation": bound} for bound in bounds], config)

    assert not ended(-5, -6, -7, -8)  # waiting begins with the last epoch of the warm-up
    assert ended(-5, -6, -7, -8, -9)
    assert not ended(-5, -6, -7, -8, -4, -5, -5)
    assert ended(-5, -6, -7, -8, -4, -5, -5, -4)  # as good is not better


def test_what_is_no_working_copy_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anchor_training.main([str(tmp_path / "nowhere"), NAME]) == 2
    assert "no working copy of jmtomczak/vae_vampprior" in capsys.readouterr().err
