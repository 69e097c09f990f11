"""`make gpu DRY=1`, whole."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from fastvae.backends import native
from tools.gpu.__main__ import main
from tools.gpu.delivery import KEPT, REST
from tools.gpu.stage import LEFT_OUT, PASSED
from tools.gpu.stages import STAGES


def test_a_dry_run_of_every_stage(tmp_path: Path) -> None:
    """What the stages run on a GPU runs here too, as far as a CPU can, and comes back in few files."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("interprets, which it does not where there is a GPU")
    chosen = [s.name for s in STAGES if s.name != "build" or native.cuda_not_built() is None]  # to build takes minutes
    out = tmp_path / "out"
    assert main(["--dry-run", "--out", str(out), "--only", ",".join(chosen)]) == 0
    found = {s["name"]: s["status"] for s in json.loads((out / "gpu.json").read_text())["stages"]}
    assert list(found) == chosen and set(found.values()) <= {PASSED, LEFT_OUT}
    assert {name for name, status in found.items() if status == LEFT_OUT} <= {"keops", "flash-gmm"}
    assert json.loads((out / "tests.json").read_text())["runs"][0]["failed"] == 0
    assert {file.name for file in out.iterdir()} <= {*KEPT, REST} and len({*KEPT, REST}) <= 8
    with tarfile.open(out / REST) as tar:
        assert {"measure.log", "tune.json", "cpu.json", "train/run/results.json"} <= set(tar.getnames())
