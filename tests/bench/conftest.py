"""One thread, no data of the machine's own, and the smallest settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvae.benchmarks import probe
from fastvae.benchmarks.timing import Settings

TINY = Settings(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small only lose time by sharing their work out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take microseconds; what they find is only looked at roughly."""
    monkeypatch.setattr(probe, "_ITERATIONS", 20_000)
    monkeypatch.setattr(probe, "_COPIED", 1 << 20)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests find no data but those they name, and leave nothing behind."""
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
