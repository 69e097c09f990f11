"""One process at a time in a folder, whatever became of the one before."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.patience import PATIENCE

from fastvae._files import FileError
from fastvae.app.run.lock import locked
from fastvae.app.user_errors import RunError

from .conftest import ENVIRONMENT, TINY, Cli

HOLD = """
import sys, time
from pathlib import Path
from fastvae.app.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_with_the_name_of_the_process(
    cli: Cli, tmp_path: Path, tiny_npz: Path, holder: subprocess.Popen[str]
) -> None:
    """By all commands that write into it; sample only reads."""
    run = tmp_path / "run"
    user = f"{run}: is in use by process {holder.pid} on {platform.node()}"
    begin = ["train", "--data", tiny_npz, "--out", run, *TINY]
    code, _, error = cli(*begin)
    assert code == 1 and user in error and "\n" not in error.strip()
    code, _, error = cli("compare", "--data", tiny_npz, "--out", run, *TINY)
    assert code == 1 and user in error

    # A killed process leaves nothing that blocks the folder.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / ".lock").exists()
    code, _, error = cli(*begin)
    assert code == 0, error
    with locked(run):
        for command in (["train", "--out", run, "--resume"], ["evaluate", run], ["compare", "--out", run]):
            code, _, error = cli(*command)
            assert code == 1 and f"{run}: is in use by process {os.getpid()} on" in error
        assert cli("sample", run, "-n", 3)[0] == 0
    assert cli("evaluate", run, "-s", 3)[0] == 0


def test_a_run_of_a_comparison_is_locked_too(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    run = tmp_path / "all" / "vamp-seed0"
    with locked(run):
        (run / "config.json").touch()
        for more in ([], ["--overwrite"]):
            command = ["compare", "--data", tiny_npz, "--out", tmp_path / "all", *TINY, "--seeds", 1, "-s", 3, *more]
            code, _, error = cli(*command)
            assert code == 1 and "vamp-seed0: is in use by process" in error
        assert (run / "config.json").exists()


def test_two_trainings_started_at_once(tmp_path: Path, tiny_npz: Path) -> None:
    """One of them trains, to an end that is whole; the other says who does."""
    command = [sys.executable, "-m", "fastvae.app.cli", "train", "--data", str(tiny_npz), "--out", "run", *TINY]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = {process.pid: process.communicate(timeout=PATIENCE)[1] for process in processes}
    done = [process for process in processes if process.returncode == 0]
    assert len(done) == 1, told
    (other,) = (process for process in processes if process.returncode)
    # "another process" has only just begun, or is about to end
    reasons = "holds a run already", f"is in use by process {done[0].pid} on", "is in use by another process"
    assert any(reason in told[other.pid] for reason in reasons), told


def test_a_folder_that_gets_nothing_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "old" / "new" / "newer"):
        assert (tmp_path / "old" / "new" / "newer").is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [tmp_path / "old"] and not list((tmp_path / "old").iterdir())
    with locked(tmp_path / "old" / "kept"):
        (tmp_path / "old" / "kept" / "file").touch()
    assert {path.name for path in (tmp_path / "old" / "kept").iterdir()} == {".lock", "file"}


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    for name in (".checkpoint.pt.17.part", ".samples.png.17.part", "mine.part"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", ".lock-holder", ".samples.png.17.part", "mine.part"}


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"cannot be made or written to \(.*name another folder"),
        locked(tmp_path / name),
    ):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; tried without permissions, which the superuser does not have to keep to."""

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    told = r"new: cannot be made or written to \(Permission denied\)"
    with pytest.raises(FileError, match=told), locked(tmp_path / "new"):
        pass


def test_waiting_is_not_what_the_second_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s to try again")

    with locked(tmp_path):
        monkeypatch.setattr(time, "sleep", waits)
        with pytest.raises(RunError, match="is in use"), locked(tmp_path):
            pass
