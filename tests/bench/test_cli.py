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
from benchmarks.labels import apart
from benchmarks.report import main as report
from fastvae.app.bench import bench
from fastvae.app.user_errors import ConfigError

ROOT = Path(fastvae.__file__).parents[1]
PICTURES = ["cpu-accuracy.png", "cpu-growth.png", "cpu-memory.png", "cpu-roofline.png", "cpu-time.png"]


def test_a_quick_run_writes_record_page_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(["mixture"], out=tmp_path, peers="eager,expansion", quick=True)
    told = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == PICTURES
    for name in PICTURES:
        pixels = imread(tmp_path / name)
        assert pixels[..., :3].std() > 0.02, f"{name} is blank"
        assert str(tmp_path / name) in told
    page = (tmp_path / "cpu.md").read_text()
    assert "## Targets" in page and "| eager | " in page and "![cpu-time.png]" in page
    assert "the best peer" in told
    for path in PICTURES:
        (tmp_path / path).unlink()
    assert report([str(tmp_path / "cpu.json")]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == PICTURES


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
    assert apart([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]
    for heights in ([0.5, 0.5, 0.5], [0.98, 0.99, 1.0], [0.0, 0.01, 1.4]):
        moved = apart(heights, 0.05)
        assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(moved))
        assert moved[-1] <= 1.0
