"""The comparison of priors: its statistics, and that nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from fastvae.app.run.comparison import Row, judge

from .conftest import TINY, Cli


def row(prior: str, log_likelihood: list[float]) -> Row:
    count = len(log_likelihood)
    return Row(prior, log_likelihood, [-30.0] * count, [5.0] * count, [3] * count, [0.1] * count)


def test_paired_difference_beyond_noise() -> None:
    # The seeds differ by much more than the priors do, which pairing takes out.
    standard, vamp = [-30.0, -20.0, -25.0], [-29.0, -19.1, -23.9]
    verdict = judge([row("standard", standard), row("mixture", [-40.0] * 3), row("vamp", vamp)])
    assert (verdict.winner, verdict.runner_up) == ("vamp", "standard")
    assert verdict.difference == pytest.approx(1.0)
    interval = ttest_rel(vamp, standard).confidence_interval(0.95)
    assert verdict.margin == pytest.approx((interval.high - interval.low) / 2)
    assert verdict.beyond_noise
    assert str(verdict).startswith("vamp wins: it is better than standard by 1.00 nats")


def test_difference_within_noise_has_no_winner() -> None:
    verdict = judge([row("vamp", [-29.0, -20.5, -25.0]), row("standard", [-30.0, -20.0, -25.0])])
    assert not verdict.beyond_noise
    assert "No prior wins" in str(verdict) and "not more than the noise" in str(verdict)


def test_one_seed_tells_nothing() -> None:
    verdict = judge([row("vamp", [-20.0]), row("standard", [-30.0])])
    assert verdict.margin is None and not verdict.beyond_noise
    assert "does not tell" in str(verdict) and "wins" not in str(verdict)


def test_compare_and_compare_again(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    command = ["compare", "--data", tiny_npz, "--out", tmp_path, "--seeds", 2, *TINY, "--samples", 10]
    code, text, error = cli(*command)
    assert code == 0, error
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert [r["prior"] for r in summary["priors"]] == ["standard", "vamp"]
    assert summary["precision"] == "highest"
    assert all(len(r["log_likelihood"]) == 2 for r in summary["priors"])
    assert summary["verdict"]["sentence"] in text and "+- is the standard deviation over 2 seeds" in text
    for name in ("compare.png", *summary["pictures"]):
        assert (tmp_path / name).stat().st_size > 5000 and str(tmp_path / name) in text

    checkpoints = sorted(tmp_path.glob("*-seed*/checkpoint.pt"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert len(checkpoints) == 4
    (tmp_path / "vamp-seed1" / "evaluation.json").unlink()
    (tmp_path / "standard-seed0" / "results.json").unlink()
    code, _, error = cli(*command)
    assert code == 0, error
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
    assert json.loads((tmp_path / "compare.json").read_text()) == summary

    code, text, error = cli(*command, "--limit", 1)
    assert code == 0 and (tmp_path / "compare-test-1-of-8.json").exists(), error
    assert json.loads((tmp_path / "compare.json").read_text()) == summary


def test_compare_with_other_settings(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    """Refused where there are runs, unless they are to be replaced."""
    command = ["compare", "--data", tiny_npz, "--out", tmp_path, "--seeds", 1, *TINY, "--samples", 10]
    code, _, error = cli(*command)
    assert code == 0, error
    checkpoints = sorted(tmp_path.glob("*-seed*/checkpoint.pt"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert len(checkpoints) == 2
    code, _, error = cli(*command, "--hidden", 17)
    assert code == 1 and "standard-seed0" in error and "--hidden is 17" in error
    code, _, error = cli(*command, "--hidden", 17, "--overwrite")
    assert code == 0, error
    assert all(path.stat().st_mtime_ns != old for path, old in zip(checkpoints, times, strict=True))
