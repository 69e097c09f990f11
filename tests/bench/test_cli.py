"""The command from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from matplotlib.image import imread

import fastvae
from fastvae.app.bench import bench
from fastvae.app.user_errors import ConfigError
from fastvae.benchmarks import timing
from tools.figures.__main__ import main as draw_figures
from tools.figures.labels import spread_out

from .conftest import TINY

ROOT = Path(fastvae.__file__).parents[1]
FIGURES = ["cpu-accuracy.png", "cpu-growth.png", "cpu-memory.png", "cpu-roofline.png", "cpu-time.png"]


def test_a_quick_run_writes_record_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its figures are drawn from the record."""
    monkeypatch.setattr(timing, "QUICK", TINY)
    bench(["mixture"], out=tmp_path, peers="eager,expansion", quick=True)
    told = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]
    assert str(tmp_path / "cpu.json") in told and str(tmp_path / "cpu.md") in told
    page = (tmp_path / "cpu.md").read_text()
    assert "## Targets" in page and "| eager | " in page
    assert "the best peer" in told
    assert draw_figures([str(tmp_path / "cpu.json"), "--out", str(tmp_path / "figures")]) == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(["cpu.md", *FIGURES])
    with_figures = (tmp_path / "figures" / "cpu.md").read_text()
    assert with_figures.startswith(page) and all(f"![{name}]({name})" in with_figures for name in FIGURES)
    for name in FIGURES:
        pixels = imread(tmp_path / "figures" / name)
        assert pixels[..., :3].std() > 0.02, f"{name} is blank"


def test_figures_of_what_is_no_record_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw_figures([str(tmp_path / "none.json"), "--out", str(tmp_path / "figures")]) == 2
    assert "there is no record" in capsys.readouterr().err and not (tmp_path / "figures").exists()


def test_peers_from_a_file_and_a_wrong_one_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from ..peer import Peer\nfrom . import eager\nPEER = Peer('off', lambda *a: eager.log_prob(*a) + 1)\n"
    (tmp_path / "off.py").write_text(source)
    with pytest.raises(typer.Exit) as stop:
        bench(["mixture"], out=tmp_path, shapes=["3,20,4"], peers=f"eager,{tmp_path / 'off.py'}", quick=True)
    assert stop.value.exit_code == 1
    assert "off gives a wrong result: log p is off by 1" in capsys.readouterr().out
    # Done already, it is not measured again, but is still wrong.
    before = (tmp_path / "cpu.json").read_text()
    with pytest.raises(typer.Exit):
        bench(["mixture"], out=tmp_path, shapes=["3,20,4"], peers=f"eager,{tmp_path / 'off.py'}", quick=True)
    assert (tmp_path / "cpu.json").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["1024x40"]}, "--shapes 1024x40: should be M,K,D"),
        ({"shapes": ["1,0,3"]}, "should be at least 1"),
        ({"suite": ["speed"]}, "the suites are mixture, gaussian, train-step"),
        ({"peers": "eager,,keops"}, "single commas"),
        ({"peers": "eagre"}, "no peer 'eagre'"),
        ({"isa": "avx1024"}, "baseline, avx2, avx512"),
        ({"device": "tpu"}, "should be cpu or cuda"),
        ({"inputs": "flat"}, "no file flat"),
    ],
)
def test_bad_options_are_told_before_anything_is_measured(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(**options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    deadline = time.monotonic() + 60
    while not (tmp_path / "cpu.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    cases = json.loads((tmp_path / "cpu.json").read_text())["cases"]
    assert cases and all(case["contenders"]["fastvae"]["status"] == "measured" for case in cases.values())
    assert f"keeps the {len(cases)} cases measured so far" in told


def test_labels_do_not_cover_each_other() -> None:
    assert spread_out([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]
    for heights in ([0.5, 0.5, 0.5], [0.98, 0.99, 1.0], [0.0, 0.01, 1.4]):
        moved = spread_out(heights, 0.05)
        assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(moved))
        assert moved[-1] <= 1.0
