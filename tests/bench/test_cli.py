"""The command from end to end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import typer

import fastvae
from fastvae.app.bench import bench
from fastvae.app.user_errors import ConfigError
from tools.figures.__main__ import main as draw_figures
from tools.figures.labels import spread_out

ROOT = Path(fastvae.__file__).parents[1]
FIGURES = ["cpu-accuracy.png", "cpu-growth.png", "cpu-memory.png", "cpu-roofline.png", "cpu-time.png"]


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


def test_labels_do_not_cover_each_other() -> None:
    assert spread_out([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]
    for heights in ([0.5, 0.5, 0.5], [0.98, 0.99, 1.0], [0.0, 0.01, 1.4]):
        moved = spread_out(heights, 0.05)
        assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(moved))
        assert moved[-1] <= 1.0
