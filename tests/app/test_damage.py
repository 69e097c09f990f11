"""Runs whose files are damaged, disks that are full, starts that fail: a line that says so, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from fastvae._files import FileError, whole_file, whole_files, write_json
from fastvae.app import workflow
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import load_run
from fastvae.app.workflow import evaluate_once

from .conftest import TINY, Cli


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which stays once there was one."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(cli: Cli, *command: object) -> str:
    """What a command says that ends in a line and exit code 1."""
    code, text, error = cli(*command)
    assert code == 1 and error.startswith("error: ") and "\n" not in error and "Traceback" not in text + error
    return error


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(config: Path) -> None:
        content = json.loads(config.read_text())
        change(content)
        config.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (edit(lambda c: c.update(epochs="many")), "--epochs is 'many'; it should be a whole number"),
        (edit(lambda c: c.update(epochs=2.5)), "--epochs is 2.5; it should be a whole number"),
        (edit(lambda c: c.update(epochs=True)), "--epochs is True; it should be a whole number"),
        (edit(lambda c: c.update(hidden=None)), "--hidden is None; it should be a whole number"),
        (edit(lambda c: c.update(hidden=[16])), "--hidden is [16]; it should be a whole number"),
        (edit(lambda c: c.update(hidden=-3)), "--hidden is -3; it should be 1 or more"),
        (edit(lambda c: c.update(num_samples="1")), "--samples is '1'; it should be a whole number"),
        (edit(lambda c: c.update(learning_rate="fast")), "--learning-rate is 'fast'; it should be a number"),
        (edit(lambda c: c.update(learning_rate=float("inf"))), "--learning-rate is inf; it should be a finite number"),
        (edit(lambda c: c.update(refresh=2.0)), "--refresh is 2.0; it should be at most 1.0"),
        (edit(lambda c: c.update(prior=7)), "--prior is 7; it can be standard, mixture, vamp, exemplar"),
        (edit(lambda c: c.update(data=3)), "--data is 3; it should be text"),
        (edit(lambda c: c.update(binarize="no")), "--binarize is 'no'; it should be true or false"),
        (edit(lambda c: c.update(warmup=2)), "--warmup is 2 of 2 epochs"),
        (edit(lambda c: c.pop("latent")), "latent should be there"),
        (edit(lambda c: c.update(depth=3)), "depth should not be there"),
        (lambda config: config.write_text("[]"), "it should hold an option's name and value a line, in braces"),
        (lambda config: config.write_text("{"), "config.json: cannot be read"),
        (lambda config: config.write_text("[" * 100_000), "config.json: cannot be read"),
        (lambda config: config.write_bytes(b"\xff\xfe\x00"), "config.json: cannot be read"),
        (lambda config: (config.unlink(), config.mkdir()), "config.json: cannot be read (Is a directory)"),
        (lambda config: config.unlink(), "holds no run"),
    ],
)
def test_settings_that_are_damaged(
    cli: Cli, tmp_path: Path, run: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(run / "config.json")
    for command in (["train", "--resume", "--out", run], ["evaluate", run], ["sample", run]):
        assert told in refused(cli, *command)


def other_model(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for name in ("model", "best_model"):
        state[name]["encoder.mu.bias"] = torch.zeros(4)
    torch.save(state, path)


def lacking(key: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        del state[key]
        torch.save(state, path)

    return apply


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(b"hello" * 100), "is damaged or not a checkpoint"),
        (lambda path: (path.unlink(), path.mkdir()), "is damaged or not a checkpoint"),
        (lambda path: torch.save([1, 2], path), "is not a checkpoint of this version"),
        (lambda path: torch.save({"epoch": 3}, path), "is not a checkpoint of this version"),
        (lacking("history"), "is not a checkpoint of this version"),
        (other_model, "is of another model than"),
        (other_model, "(encoder.mu.bias is [4] there and should be [3])"),
    ],
)
def test_checkpoints_that_are_damaged(cli: Cli, run: Path, spoil: Callable[[Path], None], told: str) -> None:
    spoil(run / "checkpoint.pt")
    for command in (["train", "--resume", "--out", run, "--epochs", 3], ["evaluate", run], ["sample", run]):
        error = refused(cli, *command)
        assert told in error and str(run / "checkpoint.pt") in error and "--overwrite" in error


@pytest.mark.parametrize("optimizer", [{}, {"state": {}, "param_groups": []}, {"state": 3, "param_groups": [{}]}])
def test_an_optimizer_of_another_model(cli: Cli, run: Path, optimizer: dict[str, Any]) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**state, "optimizer": optimizer}, run / "checkpoint.pt")
    assert "its optimizer is of another model" in refused(cli, "train", "--out", run, "--resume", "--epochs", 3)


def test_another_runs_settings_with_this_checkpoint(cli: Cli, tmp_path: Path, tiny_npz: Path, run: Path) -> None:
    """Settings and checkpoint of two runs, whose models differ by their prior."""
    standard = tmp_path / "standard"
    assert cli("train", "--data", tiny_npz, "--out", standard, *TINY, "--prior", "standard")[0] == 0
    (run / "config.json").write_bytes((standard / "config.json").read_bytes())
    for command in (["train", "--resume", "--out", run, "--epochs", 3], ["evaluate", run], ["sample", run]):
        assert "is of another model than" in refused(cli, *command)


def test_an_evaluation_that_is_damaged_counts_as_none(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("evaluate", run, "-s", 3)[0] == 0
    path, plan, loaded = run / "evaluation.json", EvaluationPlan(samples=3), load_run(run)
    whole, console = json.loads(path.read_text()), Console(file=StringIO())
    monkeypatch.setattr(workflow, "evaluate_run", mock.Mock(side_effect=AssertionError("made anew")))
    assert asdict(evaluate_once(console, loaded, plan)) == whole
    for content in ("", "{}", "[]", json.dumps({**whole, "log_likelihood": "high"}), json.dumps({**whole, "gap": 5})):
        path.write_text(content)
        with pytest.raises(AssertionError, match="made anew"):
            evaluate_once(console, loaded, plan)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the disk full for the files with certain names, from the first on or later."""

    def fill(*names: str) -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(f".{part}." in name for part in names):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file is written to is told by /proc alone")
    return fill


FULL = "cannot be written (No space left on device); what was there before is kept"


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt"])
def test_a_full_disk_at_the_start_leaves_nothing(
    cli: Cli, tmp_path: Path, tiny_npz: Path, full_disk: Callable[..., None], name: str
) -> None:
    full_disk(name)
    assert FULL in refused(cli, "train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.npz"]


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt"])
def test_a_full_disk_costs_no_old_run(
    cli: Cli, tiny_npz: Path, run: Path, full_disk: Callable[..., None], name: str
) -> None:
    before = contents(run)
    full_disk(name)
    again = ["train", "--data", tiny_npz, "--out", run, *TINY, "--hidden", 17, "--overwrite"]
    for command in (again, ["train", "--out", run, "--resume", "--epochs", 3]):
        error = refused(cli, *command)
        assert FULL in error and str(run / name) in error
    assert contents(run) == before


def test_a_full_disk_at_the_end_can_be_resumed(
    cli: Cli, tmp_path: Path, tiny_npz: Path, full_disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context():
        full_disk("results.json", "curves.png", "evaluation.json")
        assert f"results.json: {FULL}" in refused(cli, "train", "--data", tiny_npz, "--out", run, *TINY)
        assert read_checkpoint(RunFolder(run))["epoch"] == 2
        assert f"evaluation.json: {FULL}" in refused(cli, "evaluate", run, "-s", 3)
    monkeypatch.undo()
    assert cli("train", "--out", run, "--resume")[0] == 0
    assert (run / "results.json").exists() and (run / "curves.png").exists()


@pytest.mark.parametrize("numbers", [10_000, 300_000])
def test_torchs_own_error_of_a_full_disk_is_told(tmp_path: Path, numbers: int) -> None:
    """torch.save turns the OSError of a write into a RuntimeError about positions."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # bytes of a file, as good as a full disk
    try:
        with pytest.raises(FileError, match="File too large"), whole_file(tmp_path / "checkpoint.pt") as file:
            torch.save({"a": torch.zeros(numbers)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writes", [1, 2, 5, 9])
def test_ctrl_c_while_torch_writes_is_no_error(tmp_path: Path, writes: int) -> None:
    """torch.save turns it, too, into a RuntimeError about positions."""

    class Interrupted:
        left = writes

        def write(self, content: bytes) -> int:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return file.write(content)

        def flush(self) -> None:
            file.flush()

    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "checkpoint.pt") as file:
        torch.save({"a": torch.zeros(3)}, Interrupted())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_between_files_that_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Settings without their checkpoint, or a checkpoint without its settings, would be no run."""
    paths, real, calls = [tmp_path / "config.json", tmp_path / "checkpoint.pt"], os.replace, []
    (tmp_path / "results.json").touch()

    def replace(part: Path, path: Path) -> None:
        if len(calls) == after:
            calls.append(path)
            raise KeyboardInterrupt
        calls.append(path)
        real(part, path)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), whole_files(*paths, outdated=[tmp_path / "results.json"]) as files:
        for file in files:
            file.write(b"new")
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_nothing_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read-only file system says to opening a file, and again to deleting one."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FileError, match=r"file: cannot be written \(Read-only file system\)"):
        write_json(tmp_path / "file", 3)


def test_other_errors_while_writing_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of another kind"), whole_file(tmp_path / "file"):
        raise RuntimeError("of another kind")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", float("nan"))
    assert not list(tmp_path.iterdir())


def fail_in_first_epoch(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fastvae.app.run.training._one_epoch", fail)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), 1, "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "there is not enough memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_start_that_fails_leaves_nothing_behind(
    cli: Cli,
    tmp_path: Path,
    tiny_npz: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    told: str,
) -> None:
    before = contents(run)
    fail_in_first_epoch(monkeypatch, error)
    for command in (["--out", tmp_path / "new" / "run"], ["--out", run, "--overwrite"]):
        got, text, message = cli("train", "--data", tiny_npz, *command, *TINY)
        assert got == code and told in message and "Traceback" not in text + message
    assert not (tmp_path / "new").exists() and contents(run) == before


def test_errors_of_ours_are_not_hidden(
    cli: Cli, tmp_path: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_first_epoch(monkeypatch, RuntimeError("a mistake in the code"))
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        cli("train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY)


def test_settings_without_a_finished_epoch_block_nothing(cli: Cli, tmp_path: Path, tiny_npz: Path, run: Path) -> None:
    (run / "checkpoint.pt").unlink()
    assert "no epoch has been finished here yet" in refused(cli, "evaluate", run)
    code, _, error = cli("train", "--data", tiny_npz, "--out", run, *TINY, "--hidden", 17)
    assert code == 0, error
    assert json.loads((run / "config.json").read_text())["hidden"] == 17
