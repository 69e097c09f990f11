"""The command's whole runs: quick, and interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.image import imread
from support.patience import PATIENCE

import fastvae
from fastvae.app.bench import bench
from fastvae.benchmarks import timing
from tools.figures.__main__ import main as draw_figures

from .conftest import TINY

ROOT = Path(fastvae.__file__).parents[1]
FIGURES = ["cpu-accuracy.png", "cpu-growth.png", "cpu-memory.png", "cpu-roofline.png", "cpu-time.png"]


class Run(NamedTuple):
    """The folder of a run, and what it printed."""

    folder: Path
    told: str


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, told = tmp_path_factory.mktemp("quick"), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(told):
        monkeypatch.setattr(timing, "QUICK", TINY)
        bench(["mixture"], out=folder, peers="eager,expansion", quick=True)
    return Run(folder, told.getvalue())


def test_a_quick_run_writes_record_and_page(quick_run: Run) -> None:
    folder, told = quick_run
    assert sorted(path.name for path in folder.iterdir()) == ["cpu.json", "cpu.md"]
    assert str(folder / "cpu.json") in told and str(folder / "cpu.md") in told and "the best peer" in told
    page = (folder / "cpu.md").read_text()
    assert "## Targets" in page and "| eager | " in page


def test_its_figures_are_drawn_from_the_record(quick_run: Run, tmp_path: Path) -> None:
    quick = quick_run.folder
    assert draw_figures([str(quick / "cpu.json"), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cpu.md", *FIGURES])
    with_figures = (tmp_path / "cpu.md").read_text()
    assert with_figures.startswith((quick / "cpu.md").read_text())
    assert all(f"![{name}]({name})" in with_figures for name in FIGURES)
    for name in FIGURES:
        pixels = imread(tmp_path / name)
        assert pixels[..., :3].std() > 0.02, f"{name} is blank"


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    script = "import typer; from fastvae.app.bench import bench; typer.run(bench)"
    command = [sys.executable, "-c", script, "mixture", "--peers", "eager", "--out", str(tmp_path)]
    command += [part for K in range(100, 400) for part in ("--shapes", f"8,{K},4")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "cpu.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, told
    cases = json.loads((tmp_path / "cpu.json").read_text())["cases"]
    assert cases and all(case["contenders"]["fastvae"]["status"] == "measured" for case in cases.values())
    assert f"keeps the {len(cases)} cases measured so far" in told
