"""`fastvae score` is killed by kill -9, again and again, and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.patience import PATIENCE

import fastvae.streaming
from fastvae.app.scoring.resumable import ResumableArrays

from .conftest import ENVIRONMENT, Cli
from .test_score import inputs, left, options, wanted  # noqa: F401  a fixture among them

# Tells the rows that it writes on stdout, and after so many blocks waits to be killed.  The second of the processes of
# torchrun kills itself then, once the first one waits: one that is ended as it writes might not tell of its last rows.
TELLING = """
import itertools, os, signal, sys, time
from fastvae import streaming
from fastvae.app.cli import main
from fastvae.app.scoring.resumable import ResumableArrays
streaming.blocks = lambda M, K, D, **_: streaming.Blocks(50, K)
last, blocks, write = int(sys.argv.pop(1)), itertools.count(1), ResumableArrays.write
def told(self, start, blocks_of_rows):
    write(self, start, blocks_of_rows)
    os.write(1, f"\\nrows {start} {start + len(blocks_of_rows[0])}\\n".encode())  # whole, whoever else writes
    if next(blocks) == last:
        if os.environ.get("RANK") == "0":
            open(os.environ["FIRST_WAITS"], "w").close()
        if os.environ.get("RANK") == "1":
            while not os.path.exists(os.environ["FIRST_WAITS"]):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
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


def test_processes_of_torchrun_share_the_rows_and_one_that_is_killed_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
    tmp_path: Path,
    inputs: tuple[Path, Path],  # noqa: F811
) -> None:
    """Two processes begin, one goes on, and two end it."""
    out, score = tmp_path / "log_prob.npy", tmp_path / "score.npy"
    arguments = [*options(inputs, out), "--score", score]
    first_waits = tmp_path / "first-waits"

    def by_two(kill_after: int) -> tuple[list[tuple[int, int]], subprocess.CompletedProcess[str]]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        command = [*torchrun, sys.executable, "-c", TELLING, str(kill_after), *map(str, arguments)]
        environment = {**ENVIRONMENT, "FIRST_WAITS": str(first_waits)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        lines = [line.split() for line in run.stdout.splitlines() if line.startswith("rows")]
        return [(int(start), int(stop)) for _, start, stop in lines], run

    told, run = by_two(kill_after=2)
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in run.stderr
    assert not out.exists() and (tmp_path / ".log_prob.npy.journal.1").exists()
    assert sorted(told) == [(0, 50), (50, 100), (100, 150), (150, 200)]
    first_waits.unlink()

    write = ResumableArrays.write

    def one_block(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        if self.finished_rows > 50 * len(told):
            raise KeyboardInterrupt
        write(self, start, blocks)

    with monkeypatch.context() as patch:
        patch.setattr("fastvae.streaming.blocks", lambda M, K, D, **_: fastvae.streaming.Blocks(50, K))
        patch.setattr(ResumableArrays, "write", one_block)
        code, _, _ = cli(*arguments)
    assert code == 130 and not out.exists()

    more, run = by_two(kill_after=0)
    assert run.returncode == 0, run.stderr
    rows = [row for start, stop in [*told, *more] for row in range(start, stop)]
    assert len(rows) == len(set(rows)) == 450  # 50 by the one process
    assert f"40 components, {50 * len(told) + 50} of them by an earlier run, by 2 processes" in run.stdout
    assert run.stdout.count("500 rows against") == 1
    want = wanted(inputs)
    assert np.array_equal(np.load(out), want[0]) and np.array_equal(np.load(score), want[1])
    assert left(tmp_path) == ["log_prob.npy", "score.npy"]
