"""Data that have moved: found where --data or --data-dir says, and refused if they are others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvae.app.data.named_sets import load

from .conftest import TINY, Cli


@pytest.fixture
def moved(run: Path, tmp_path: Path, tiny_npz: Path) -> tuple[Path, Path]:
    """A run, and the place to which its data have moved."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(tiny_npz)}))
    (tmp_path / "elsewhere").mkdir()
    return run, tiny_npz.rename(tmp_path / "elsewhere" / "tiny.npz")


def commands(run: Path) -> list[list[object]]:
    return [["evaluate", run, "-s", 3], ["sample", run], ["train", "--out", run, "--resume", "--epochs", 3]]


def test_a_run_whose_data_have_moved(cli: Cli, moved: tuple[Path, Path]) -> None:
    run, now = moved
    for command in commands(run):
        code, _, error = cli(*command)
        assert code == 1 and "tiny.npz: there is no such file" in error and "--data" in error
        for place in (["--data", now], ["--data-dir", now.parent]):
            code, _, error = cli(*command, *place)
            assert code == 0, error
    # Training keeps the new place.
    assert json.loads((run / "config.json").read_text())["data"] == str(now)
    assert cli("evaluate", run, "-s", 3)[0] == 0


def rewrite(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with np.load(path) as archive:
            x, y = archive["x"], archive["y"]
        np.savez(path, x=change(x), y=y[: len(change(x))])

    return apply


def one_pixel(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[79, 5, 5] = 1 - x[79, 5, 5]
    return x


@pytest.mark.parametrize(
    "change",
    [one_pixel, lambda x: 1 - x, lambda x: x[:70], lambda x: x.reshape(80, 4, 9), lambda x: x[:, :5], lambda x: x / 2],
)
def test_data_that_are_not_those_of_the_run(
    cli: Cli, moved: tuple[Path, Path], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    run, now = moved
    rewrite(change)(now)
    before = {path: path.read_bytes() for path in run.iterdir()} | {run / ".lock": b""}
    for command in commands(run):
        code, _, error = cli(*command, "--data", now)
        assert code == 1 and str(now) in error and "does not hold the images that the run was begun with" in error
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_file_that_changed_where_it_is(cli: Cli, moved: tuple[Path, Path], tmp_path: Path) -> None:
    run, now = moved
    now = now.rename(tmp_path / "tiny.npz")
    rewrite(one_pixel)(now)
    for command in commands(run):
        code, _, error = cli(*command)
        assert code == 1 and "does not hold the images that the run was begun with" in error
    run.rename(tmp_path / "vamp-seed0")
    code, _, error = cli("compare", "--priors", "vamp,standard", "--data", now, "--out", tmp_path, *TINY, "-s", 3)
    assert code == 1 and "does not hold the images" in error and "--overwrite" in error


def test_named_data_cannot_become_others(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    assert cli("train", "--out", tmp_path / "run", *TINY)[0] == 0
    code, _, error = cli("train", "--out", tmp_path / "run", "--resume", "--data", tiny_npz)
    assert code == 1 and "begun with digits" in error
    code, _, error = cli("evaluate", tmp_path / "run", "--data", tiny_npz)
    assert code == 1 and "does not hold the images" in error


def test_runs_of_before_the_fingerprint_can_be_used(cli: Cli, moved: tuple[Path, Path]) -> None:
    run, now = moved
    config = json.loads((run / "config.json").read_text())
    assert len(config.pop("data_sha256")) == 64
    (run / "config.json").write_text(json.dumps(config))
    for command in commands(run):
        code, _, error = cli(*command, "--data", now)
        assert code == 0, error
    assert len(json.loads((run / "config.json").read_text())["data_sha256"]) == 64


def test_an_npz_file_is_looked_for_in_the_data_folder_too(cli: Cli, moved: tuple[Path, Path], tmp_path: Path) -> None:
    _, now = moved
    code, _, error = cli("train", "--data", "tiny.npz", "--data-dir", now.parent, "--out", tmp_path / "b", *TINY)
    assert code == 0, error
    assert json.loads((tmp_path / "b" / "config.json").read_text())["data"] == str(now)
    code, _, error = cli("train", "--data", "none.npz", "--data-dir", now.parent, "--out", tmp_path / "c", *TINY)
    assert code == 1 and f"{tmp_path / 'none.npz'} and {now.parent / 'none.npz'}" in error


def test_the_fingerprint_is_of_all_that_is_learnt_from(tmp_path: Path) -> None:
    x = np.arange(40 * 12, dtype=np.uint8).reshape(40, 3, 4)

    def fingerprint(name: str = "a.npz", **arrays: np.ndarray) -> str:
        np.savez(tmp_path / name, **arrays)  # type: ignore[arg-type]
        return load(str(tmp_path / name)).fingerprint

    first = fingerprint(x_train=x, x_test=x[:5])
    assert fingerprint("b.npz", x_train=x, x_test=x[:5]) == first
    others = [
        fingerprint(x_train=x, x_test=x[1:6]),
        fingerprint(x_train=x, x_test=x[:6]),
        fingerprint(x_train=x, x_valid=x[:5]),
        fingerprint(x_train=x.reshape(40, 4, 3), x_test=x[:5].reshape(5, 4, 3)),
        fingerprint(x_train=x[::-1], x_test=x[:5]),
    ]
    assert len({first, *others}) == 6
