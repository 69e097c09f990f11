"""What the command line's tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """Eighty black and white images of 6 x 6 pixels in three classes."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 80)
    x = random.random((80, 6, 6)) < 0.1 + 0.4 * (np.arange(6) // 2 == classes[:, None, None])
    np.savez(tmp_path / "tiny.npz", x=x.astype(np.uint8), y=classes)
    return tmp_path / "tiny.npz"
