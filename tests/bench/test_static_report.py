"""The kernels' machine code, compiled here for GPUs that are not here: the bars that a change must not break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static_report import limits
from benchmarks.static_report.__main__ import main
from benchmarks.static_report.families import all_families
from benchmarks.static_report.report import markdown

ROOT = Path(__file__).parents[2]
MAIN = ("forward_kernel", "parameters_kernel", "sample")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every Triton kernel for sm_90, and the large ones for the other two, each architecture in its own process."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("static")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = []
    for arch, match in (("90", ""), ("80", "_kernel, h"), ("100", "_kernel, h")):
        command = [sys.executable, "-m", "benchmarks.static_report", "--family", "triton", "--arch", arch]
        command += ["--match", match, "--out", str(folder / f"{arch}.json")]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    for process in running:
        told, _ = process.communicate(timeout=900)
        assert process.returncode == 0, told.decode()
    return [k for path in sorted(folder.glob("*.json")) for k in json.loads(path.read_text())["kernels"]]
