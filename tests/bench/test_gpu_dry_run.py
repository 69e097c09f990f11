"""`make gpu DRY=1`: its measurements, and all of it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from support.interpreter import hasten

from fastvae.backends import native
from tools.gpu import gpu_targets as targets
from tools.gpu.__main__ import main
from tools.gpu.delivery import KEPT, REST
from tools.gpu.measure import main as measure
from tools.gpu.stage import LEFT_OUT, PASSED
from tools.gpu.stages import STAGES

# Of the stages: what goes together, because one needs what another leaves.  `measure` has a test of its own.
TOGETHER = ["build", "test", "train", "bench,figures", "sanitize", "tune", "keops", "flash-gmm", "static"]


def test_every_stage_has_a_dry_run() -> None:
    assert {name for names in TOGETHER for name in names.split(",")} | {"measure"} == {stage.name for stage in STAGES}


@pytest.mark.parametrize("names", TOGETHER)
def test_a_dry_run(names: str, tmp_path: Path) -> None:
    """What the stages run on a GPU runs here too, as far as a CPU can, and comes back in few files."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("interprets, which it does not where there is a GPU")
    if names == "build" and native.cuda_not_built() is not None:
        pytest.skip("it would build the extension, which takes minutes")
    out = tmp_path / "out"
    assert main(["--dry-run", "--out", str(out), "--only", names]) == 0
    found = {s["name"]: s["status"] for s in json.loads((out / "gpu.json").read_text())["stages"]}
    assert list(found) == names.split(",")
    assert set(found.values()) <= ({PASSED, LEFT_OUT} if names in ("keops", "flash-gmm") else {PASSED})
    assert {file.name for file in out.iterdir()} <= {*KEPT, REST} and len({*KEPT, REST}) <= 8
    if names == "test":
        assert json.loads((out / "tests.json").read_text())["runs"][0]["failed"] == 0
    with tarfile.open(out / REST) as tar:
        left = {"train": "train/run/results.json", "tune": "tune.json", "bench,figures": "cpu.json"}.get(names)
        assert left is None or left in tar.getnames()


def test_a_dry_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure, and no target judged by any of them; one that fails costs no other."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("interprets, which it does not where there is a GPU")
    hasten()

    def broken(*arguments: object) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr("tools.gpu.ceilings.copy_rate", broken)
    assert measure(["--dry-run", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "measure.json").read_text())
    assert found["dry"] and found["failed"] == {"copy rate": "RuntimeError: no memory"}
    assert {"multiply-add rate", "both high", "forward expansion tf32", "rsample"} <= set(found["figures"])
    assert found["figures"]["error highest"] < 1e-4 < found["figures"]["error medium"] < 0.1
    told = (tmp_path / "targets.md").read_text()
    assert told.count(targets.NEVER_RUN) == len(targets.TARGETS)
    assert {"step cuda captured 7, call", "step eager 7, call", "KL graph cuda"} <= set(found["figures"])
    (row,) = [line for line in told.splitlines() if line.startswith("| step cuda captured 7 |")]
    assert row.count("s |") == 2  # a time by each clock
