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

# Tells the rows that it writes on stdout, and after so many blocks waits to be killed.
TELLING = """
import itertools, sys, time
from fastvae import streaming
from fastvae.app.cli import main
from fastvae.app.scoring.resumable import ResumableArrays
streaming.blocks = lambda M, K, D, **_: streaming.Blocks(50, K)
last, blocks, write = int(sys.argv.pop(1)), itertools.count(1), ResumableArrays.write
def told(self, start, blocks_of_rows):
    write(self, start, blocks_of_rows)
    print("rows", start, start + len(blocks_of_rows[0]), flush=True)
    if next(blocks) == last:
        time.sleep(600)
ResumableArrays.write = told
main()
"""


def run_telling(arguments: list[Any], kill_after: int = 0) -> list[tuple[int, int]]:
    """Run in a process of its own; kill -9 it once it has told of so many blocks.  The rows that it told of."""
    command = [sys.executable, "-c", TELLING, str(kill_after), *map(str, arguments)]
    told = []
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("rows"):
                told.append((int(line.split()[1]), int(line.split()[2])))
                if len(told) == kill_after:
                    run.send_signal(signal.SIGKILL)
        errors = run.stderr.read()
    assert run.returncode == (-signal.SIGKILL if kill_after else 0), errors
    return told


def test_kill_9_loses_nothing_and_nothing_is_done_twice(tmp_path: Path, inputs: tuple[Path, Path]) -> None:  # noqa: F811
    arguments = [*options(inputs, tmp_path / "log_prob.npy"), "--score", tmp_path / "score.npy"]
    told = run_telling(arguments, kill_after=2)
    assert not (tmp_path / "log_prob.npy").exists()  # nothing that could be taken for a result
    told += run_telling(arguments, kill_after=3)
    told += run_telling(arguments)
    assert told == [(start, start + 50) for start in range(0, 500, 50)]
    want = wanted(inputs)
    assert np.array_equal(np.load(tmp_path / "log_prob.npy"), want[0])
    assert np.array_equal(np.load(tmp_path / "score.npy"), want[1])
    assert left(tmp_path) == ["log_prob.npy", "score.npy"]
