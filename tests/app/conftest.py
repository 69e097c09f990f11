"""What the command line's tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import fastvae
from fastvae.app.data.named_sets import load
from fastvae.app.run.config import make_config
from fastvae.app.workflow import train_run

# For a process of its own, away from the checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fastvae.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

# Settings for `tiny_npz`, and quick on digits too.
TINY = ["--hidden", "16", "--latent", "3", "-k", "8", "--epochs", "2", "--warmup", "1", "--device", "cpu"]

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time by sharing their work out, much of it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_data_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests find no data but those they name."""
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from fastvae.app.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        if isinstance(stop.value.code, str):  # what sys.exit prints once it reaches the interpreter
            return 1, out, stop.value.code
        return stop.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and the file of the images that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_tiny(folder / "tiny.npz")
    config = make_config(
        {"data": str(data), "hidden": 16, "latent": 3, "components": 8, "epochs": 2, "warmup": 1, "prior": "vamp"}
    )
    train_run(Console(file=StringIO()), config, load(config.data), folder / "run", resume=False, device="cpu")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run of its own, as `train` with the options TINY leaves it, on `tiny_npz`."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """Eighty black and white images of 6 x 6 pixels in three classes."""
    return write_tiny(tmp_path / "tiny.npz")


def write_tiny(path: Path) -> Path:
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 80)
    x = random.random((80, 6, 6)) < 0.1 + 0.4 * (np.arange(6) // 2 == classes[:, None, None])
    np.savez(path, x=x.astype(np.uint8), y=classes)
    return path
