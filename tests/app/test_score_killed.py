"""`fastvae score` is killed by kill -9, again and again, and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .conftest import ENVIRONMENT
from .test_score import inputs, left, options, wanted  # noqa: F401  a fixture among them

# Slow enough to be killed in the middle, and with the number of rows that each process computed told on stdout.
SLOW = """
import sys, time
from fastvae import streaming
from fastvae.app.cli import main
from fastvae.app.scoring.resumable import ResumableArrays
streaming.blocks = lambda M, K, D, **_: streaming.Blocks(50, K)
write = ResumableArrays.write
def told(self, start, blocks):
    time.sleep(0.02)
    write(self, start, blocks)
    print("rows", start, start + len(blocks[0]), flush=True)
ResumableArrays.write = told
sys.argv = ["fastvae", *sys.argv[1:]]
main()
"""


def run_slowly(arguments: list[Any], kill_after: int | None = None) -> list[tuple[int, int]]:
    """Run in a process of its own; kill -9 it once it has told of so many blocks.  The rows that it told of."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    told = []
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("rows"):
                told.append((int(line.split()[1]), int(line.split()[2])))
            if kill_after is not None and len(told) >= kill_after:
                run.send_signal(signal.SIGKILL)
                told += [tuple(map(int, rest.split()[1:])) for rest in run.stdout if rest.startswith("rows")]
        errors = run.stderr.read()
    assert run.returncode == (0 if kill_after is None else -signal.SIGKILL), errors
    return told


def test_kill_9_loses_nothing_and_nothing_is_done_twice(tmp_path: Path, inputs: tuple[Path, Path]) -> None:  # noqa: F811
    arguments = [*options(inputs, tmp_path / "log_prob.npy"), "--score", tmp_path / "score.npy"]
    told = run_slowly(arguments, kill_after=2)
    assert not (tmp_path / "log_prob.npy").exists()  # nothing that could be taken for a result
    told += run_slowly(arguments, kill_after=3)
    told += run_slowly(arguments)
    # A block that was being written as the process died may have no line on stdout; every other block has one.
    assert [start for start, _ in told] == sorted({start for start, _ in told})
    assert len(told) >= 8 and told[-1][1] == 500
    want = wanted(inputs)
    assert np.array_equal(np.load(tmp_path / "log_prob.npy"), want[0])
    assert np.array_equal(np.load(tmp_path / "score.npy"), want[1])
    assert left(tmp_path) == ["log_prob.npy", "score.npy"]
