"""`fastvae score`: files in, a file out, whole or not at all, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvae
from fastvae.app.run.ranks import Ranks
from fastvae.app.scoring import arrays, resumable
from fastvae.app.scoring.resumable import ResumableArrays
from fastvae.app.scoring.score import _share
from fastvae.app.user_errors import DataError, RunError

from .conftest import Cli


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Points and a mixture."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.standard_normal((500, 3), dtype=np.float32))
    mixture = {name: rng.standard_normal((40, 3), dtype=np.float32) for name in ("mu", "logvar")}
    np.savez(tmp_path / "mixture.npz", **mixture, log_weights=np.full(40, -4, np.float32))
    return tmp_path / "z.npy", tmp_path / "mixture.npz"


def wanted(inputs: tuple[Path, Path], dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, np.ndarray]:
    mixture = np.load(inputs[1])
    arguments = [torch.from_numpy(a).to(dtype) for a in (np.load(inputs[0]), *(mixture[n] for n in mixture))]
    return tuple(found.numpy() for found in fastvae.mixture_log_prob_and_score(*arguments))


def options(inputs: tuple[Path, Path], out: Path) -> list[Any]:
    return ["score", "--points", inputs[0], "--mixture", inputs[1], "--out", out, "--device", "cpu"]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("z.npy", "mixture.npz"))


def saved(path: Path, z: np.ndarray) -> Path:
    """Points in a file of the format that its name says."""
    if path.suffix == ".npy":
        np.save(path, z)
    else:
        pytest.importorskip("safetensors.torch").save_file({"z": torch.from_numpy(z)}, path)
    return path


def test_densities_and_scores(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    out, score = tmp_path / "log_prob.npy", tmp_path / "score.npy"
    code, text, error = cli(*options(inputs, out), "--score", score)
    assert code == 0, error
    want = wanted(inputs)
    assert np.array_equal(np.load(out), want[0]) and np.array_equal(np.load(score), want[1])
    assert "500 rows against 40 components" in text and str(out) in text and str(score) in text
    assert left(tmp_path) == ["log_prob.npy", "score.npy"]

    code, _, error = cli(*options(inputs, out))
    assert code == 1 and f"{out}: exists already. Say --overwrite" in error
    code, _, error = cli(*options(inputs, out), "--dtype", "float64", "--overwrite")
    assert code == 0 and np.array_equal(np.load(out), wanted(inputs, torch.float64)[0])


def test_every_format_gives_the_same(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    z, mixture = torch.from_numpy(np.load(inputs[0])), np.load(inputs[1])
    (tmp_path / "folder").mkdir()
    for name in mixture:
        np.save(tmp_path / "folder" / f"{name}.npy", mixture[name])
    np.savez(tmp_path / "only.npz", anything=z)
    np.save(tmp_path / "swapped.npy", z.numpy().astype(">f4"))
    save_file({"z": z, "other": torch.zeros(1)}, tmp_path / "z.safetensors")
    save_file({name: torch.from_numpy(mixture[name]) for name in mixture}, tmp_path / "mixture.safetensors")
    points = [tmp_path / name for name in ("z.npy", "only.npz", "swapped.npy", "z.safetensors")]
    (tmp_path / "swapped").mkdir()
    for name in mixture:
        np.save(tmp_path / "swapped" / f"{name}.npy", mixture[name].astype(mixture[name].dtype.newbyteorder()))
    mixtures = [tmp_path / name for name in ("folder", "mixture.npz", "mixture.safetensors", "swapped")]
    for index, pair in enumerate(itertools.zip_longest(points, mixtures, fillvalue=mixtures[-1])):
        out = tmp_path / f"{index}.npy"
        code, _, error = cli(*options(pair, out), "--memory", 1)
        assert code == 0, error
        assert np.allclose(np.load(out), wanted(inputs)[0], atol=1e-5)
        assert np.array_equal(np.load(out), np.load(tmp_path / "0.npy"))


@pytest.mark.parametrize("shape", [(), (3,), (1, 3)])
def test_a_logvar_of_another_byte_order_that_all_components_share(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], shape: tuple[int, ...]
) -> None:
    mixture = tmp_path / "folder"
    mixture.mkdir()
    mu, logvar = np.load(inputs[1])["mu"], np.full(shape, 0.5, np.float32)
    np.save(mixture / "mu.npy", mu)
    np.save(mixture / "logvar.npy", logvar.astype(logvar.dtype.newbyteorder()))
    code, _, error = cli(*options((inputs[0], mixture), tmp_path / "out.npy"))
    assert code == 0, error
    want = fastvae.mixture_log_prob(*map(torch.from_numpy, (np.load(inputs[0]), mu, logvar)))
    assert np.array_equal(np.load(tmp_path / "out.npy"), want.numpy())


@pytest.mark.parametrize("rows", [np.s_[300:500], ...])
@pytest.mark.parametrize("name", ["z.npy", "z.safetensors"])
def test_a_file_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path, name: str, rows: Any) -> None:
    """Where the file is mapped, the operating system ends the process instead."""
    opened = arrays.open_points(saved(tmp_path / name, np.zeros((500, 3)))).arrays["z"]
    os.truncate(tmp_path / name, 9000)
    with pytest.raises(DataError, match=r"z\.[a-z]*: was cut short while it was read"):
        opened[rows]


@pytest.mark.parametrize("name", ["z.npy", "z.safetensors"])
@pytest.mark.parametrize("left_over", [3000, -1, 100, 8, 3, 0])
def test_a_file_that_is_cut_short_is_told_before_the_work(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], name: str, left_over: int
) -> None:
    z = saved(tmp_path / name, np.load(inputs[0]))
    whole = z.stat().st_size
    size = left_over % whole
    os.truncate(z, size)
    before = left(tmp_path)
    code, _, error = cli(*options((z, inputs[1]), tmp_path / "out.npy"))
    assert code == 1 and f"{z}: is" in error and "is cut short" in error, error
    if size > 1000:  # more than the header
        assert f"it should hold {whole:,} bytes or more, and it holds {size:,}." in error
    assert left(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (0, 3), (4, 2, 3)])
def test_rows_of_safetensors(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As their library reads them."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    stored = {"first": torch.zeros(3, dtype=torch.uint8), "z": (10 * torch.randn(shape)).to(dtype)}
    save_file(stored, tmp_path / "z.safetensors", metadata={"a": "b"})
    z = arrays.open_points(tmp_path / "z.safetensors").arrays["z"]
    for rows in (..., np.s_[:], np.s_[1:4], np.s_[9:12])[: None if shape else 1]:
        assert z[rows].dtype == dtype and torch.equal(z[rows], stored["z"][rows])


def test_a_vector_of_a_program_that_stores_columns_is_read(tmp_path: Path) -> None:
    """Its header says so of a vector too, whose rows are one after the other whatever it says."""
    with open(tmp_path / "z.npy", "wb") as file:
        described = {"descr": "<f8", "fortran_order": True, "shape": (5,)}
        np.lib.format.write_array_header_1_0(file, described)
        np.arange(5.0).tofile(file)
    assert arrays.open_points(tmp_path / "z.npy").arrays["z"][1:3].tolist() == [1.0, 2.0]


GOOD = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ([], "its header is not that of one"),
        ({"z": 1}, "its header is not that of one"),
        ({"z": GOOD | {"shape": [-4, -3]}}, "its header is not that of one"),
        ({"z": GOOD | {"data_offsets": [-8, 40]}}, "its header is not that of one"),
        ({"z": GOOD | {"shape": [4, 4]}}, "z takes 64 bytes by its shape and dtype, and has 48"),
        ({"z": GOOD | {"dtype": "F8_E4M3"}}, "z is F8_E4M3, which cannot be read"),
        ({"z": GOOD | {"dtype": "I32"}}, "z must be a floating tensor, not torch.int32"),
    ],
)
def test_a_wrong_header_of_safetensors_is_told(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], header: Any, told: str
) -> None:
    text, z = json.dumps(header).encode(), tmp_path / "z.safetensors"
    z.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    code, _, error = cli(*options((z, inputs[1]), tmp_path / "out.npy"))
    assert code == 1 and str(z) in error and told in error and "Traceback" not in error, error
    assert left(tmp_path) == ["z.safetensors"]


def test_no_points(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    np.save(inputs[0], np.zeros((0, 3), np.float32))
    code, _, error = cli(*options(inputs, tmp_path / "a.npy"), "--score", tmp_path / "b.npy")
    assert code == 0, error
    assert np.load(tmp_path / "a.npy").shape == (0,) and np.load(tmp_path / "b.npy").shape == (0, 3)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> list[Any]:
    """The arguments of a job that was stopped after four of ten blocks."""
    monkeypatch.setattr("fastvae.streaming.blocks", lambda M, K, D, **_: fastvae.streaming.Blocks(50, K))
    arguments = options(inputs, tmp_path / "out.npy")

    write = ResumableArrays.write

    def until_200(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        if start >= 200:
            raise KeyboardInterrupt
        write(self, start, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableArrays, "write", until_200)
        code, text, _ = cli(*arguments)
        assert code == 130 and "The same command goes on from here" in text
    assert left(tmp_path) == [".out.npy.journal", ".out.npy.part"]
    return arguments


def test_goes_on_after_a_stop(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], stopped: list[Any]) -> None:
    os.utime(inputs[0])  # the same content
    code, text, error = cli(*stopped)
    assert code == 0, error
    assert "200 of them by an earlier run" in text
    assert left(tmp_path) == ["out.npy"]
    stopped[stopped.index(tmp_path / "out.npy")] = tmp_path / "at-once.npy"
    assert cli(*stopped)[0] == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.load(tmp_path / "at-once.npy"))


def test_another_job_is_not_mixed_with_what_was_begun(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], stopped: list[Any]
) -> None:
    for more, told in (
        (["--dtype", "float64"], "--dtype: of the inputs then, float64 now"),
        (["--memory", 7], "--memory: 256 then, 7 now"),
        (["--impl", "composite"], "--impl: default then, composite now"),
        (["--score", tmp_path / "score.npy"], "--score: no then, yes now"),
    ):
        code, _, error = cli(*stopped, *more)
        assert code == 1 and told in error and "--overwrite" in error
    z = np.load(inputs[0])
    z[400, 1] += 1
    np.save(inputs[0], z)
    code, _, error = cli(*stopped)
    assert code == 1 and "points: z float32 [500, 3], digest" in error
    assert left(tmp_path) == [".out.npy.journal", ".out.npy.part"]  # what was begun is kept
    code, _, error = cli(*stopped, "--overwrite")
    assert code == 0 and np.allclose(np.load(tmp_path / "out.npy"), wanted(inputs)[0], atol=1e-5)


@pytest.mark.parametrize("cut", [1, 3, 7, 8, 9, 12, 15])
def test_a_torn_journal_is_read_up_to_its_last_whole_line(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], stopped: list[Any], cut: int
) -> None:
    """As a power cut may leave it: rows are computed again at worst."""
    journal = tmp_path / ".out.npy.journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    code, text, error = cli(*stopped)
    assert code == 0, error
    assert ("150" if cut <= 8 else "100") + " of them by an earlier run" in text
    assert np.allclose(np.load(tmp_path / "out.npy"), wanted(inputs)[0], atol=1e-5)


def test_a_torn_line_does_not_run_into_the_next(tmp_path: Path) -> None:
    """A second stop after the one that tore it."""

    def go_on() -> ResumableArrays:
        results = ResumableArrays([tmp_path / "a.npy"], [(1000,)], "float32")
        results.open({"job": "1"}, overwrite=False)
        results.join(results.finished)
        return results

    go_on().write(0, [np.zeros(150, np.float32)])
    journal = tmp_path / ".a.npy.journal"
    journal.write_bytes(journal.read_bytes()[:-2])  # 15, of 150
    results = go_on()
    assert results.finished_rows == 0
    results.write(0, [np.zeros(20, np.float32)])
    assert go_on().finished_rows == 20


def test_a_damaged_journal_is_told(cli: Cli, tmp_path: Path, stopped: list[Any]) -> None:
    journal = tmp_path / ".out.npy.journal"
    good = journal.read_bytes()
    for damaged in (
        b"\x00\x00\n0 9\n",
        b"[]\n0 9\n",
        *(good + line for line in (b"9 501\n", b"9 8\n", b"9\n", b"x\n")),
    ):
        journal.write_bytes(damaged)
        code, _, error = cli(*stopped)
        assert code == 1 and "journal: is damaged. Say --overwrite" in error
    assert cli(*stopped, "--overwrite")[0] == 0
    (tmp_path / "out.npy").unlink()


def test_a_kill_at_every_step_of_the_end(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    """Between the renaming of two files, and before the journal is removed: the next run puts the rest in place."""
    out, score = tmp_path / "out.npy", tmp_path / "score.npy"
    arguments = [*options(inputs, out), "--score", score]
    replace, unlink = os.replace, Path.unlink
    for step in (0, 1, 2):
        calls = itertools.count()

        def stop_renaming(*paths: Path, calls: Any = calls, step: int = step) -> None:
            if paths[1].suffix == ".npy" and next(calls) == step:
                raise KeyboardInterrupt  # nothing after it runs, as after a kill
            replace(*paths)

        def stop_unlinking(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".journal" and not missing_ok:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(resumable.os, "replace", stop_renaming)
            patch.setattr(Path, "unlink", stop_unlinking)
            assert cli(*arguments)[0] == 130
        assert (tmp_path / ".out.npy.journal").exists()
        with monkeypatch.context() as patch:
            patch.setattr(ResumableArrays, "write", lambda *_: pytest.fail("computed again"))
            code, _, error = cli(*arguments)
        assert code == 0, error
        want = wanted(inputs)
        assert np.array_equal(np.load(out), want[0]) and np.array_equal(np.load(score), want[1])
        assert left(tmp_path) == ["out.npy", "score.npy"]
        out.unlink(), score.unlink()


def test_inputs_that_change_meanwhile_give_no_result(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    write = ResumableArrays.write

    def changing(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        write(self, start, blocks)
        np.save(inputs[0], np.zeros((500, 3), np.float32))

    monkeypatch.setattr(ResumableArrays, "write", changing)
    code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
    assert code == 1 and "was changed while it was read" in error and left(tmp_path) == []

    def keeping_its_time(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        before = os.stat(inputs[0])
        write(self, start, blocks)
        np.save(inputs[0], np.ones((500, 3), np.float32))  # as large as before
        os.utime(inputs[0], ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(ResumableArrays, "write", keeping_its_time)
    code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
    assert code == 1 and "was changed while it was read" in error and left(tmp_path) == []

    def touching(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        write(self, start, blocks)
        os.utime(inputs[0], (1, 1))

    monkeypatch.setattr(ResumableArrays, "write", touching)  # the content is the same
    assert cli(*options(inputs, tmp_path / "out.npy"))[0] == 0


def test_inputs_that_change_and_are_put_back_give_no_mixed_result(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    """Changed while the third block is written, stopped at the eighth, restored, and run again."""
    monkeypatch.setattr("fastvae.streaming.blocks", lambda M, K, D, **_: fastvae.streaming.Blocks(50, K))
    points, write = inputs[0].read_bytes(), ResumableArrays.write

    def changing(self: ResumableArrays, start: int, blocks: list[np.ndarray]) -> None:
        if start == 100:
            np.save(inputs[0], np.zeros((500, 3), np.float32))
        if start == 350:
            raise KeyboardInterrupt
        write(self, start, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableArrays, "write", changing)
        code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
        assert code == 1 and "was changed while it was read" in error and left(tmp_path) == []
    inputs[0].write_bytes(points)
    assert cli(*options(inputs, tmp_path / "out.npy"))[0] == 0
    assert np.allclose(np.load(tmp_path / "out.npy"), wanted(inputs)[0], atol=1e-5)


def test_an_input_that_is_removed_meanwhile_is_told(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(ResumableArrays, "write", lambda *_: inputs[0].unlink())
    code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
    assert code == 1 and "z.npy: cannot be read (No such file or directory)" in error


def test_a_full_disk_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resumable.os, "posix_fallocate", full)
    monkeypatch.setattr(ResumableArrays, "write", lambda *_: pytest.fail("computed"))
    code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
    assert code == 1 and "cannot be written (No space left on device)" in error and left(tmp_path) == []


def test_a_second_process_is_refused(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".out.npy.lock"):
        code, _, error = cli(*options(inputs, tmp_path / "out.npy"))
    assert code == 1 and "is being written by another process" in error


def test_journals_of_several_processes_are_one_job(tmp_path: Path) -> None:
    """Three begin, two go on, one ends: each journal counts, and none is left."""
    values = np.arange(100, dtype=np.float32)

    def processes(count: int) -> list[ResumableArrays]:
        joined = [ResumableArrays([tmp_path / "a.npy"], [(100,)], "float32", rank) for rank in range(count)]
        joined[0].open({"job": "1"}, overwrite=False)
        for each in joined:
            each.join(joined[0].finished)
        return joined

    def write(each: ResumableArrays, start: int, stop: int) -> None:
        each.write(start, [values[start:stop]])

    three = processes(3)
    write(three[0], 0, 10), write(three[1], 10, 20), write(three[2], 70, 80)
    write(three[0], 30, 40)
    assert left(tmp_path) == [".a.npy.journal", ".a.npy.journal.1", ".a.npy.journal.2", ".a.npy.part"]
    two = processes(2)
    assert two[1].finished == [(0, 20), (30, 40), (70, 80)] and two[1].finished_rows == 40
    assert two[0].unfinished() == [(20, 30), (40, 70), (80, 100)]
    write(three[1], 20, 30)  # by a process that outlived its job: into the same file, and into no journal that counts
    two = processes(2)
    assert two[0].finished == two[1].finished == [(0, 20), (30, 40), (70, 80)]
    write(two[0], 20, 70), write(two[1], 80, 100)
    with pytest.raises(RunError, match="does not have all rows"):
        ResumableArrays([tmp_path / "a.npy"], [(101,)], "float32").finish()
    last = processes(1)[0]
    assert last.unfinished() == []
    last.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), values) and left(tmp_path) == ["a.npy"]


def test_each_process_has_about_as_many_rows() -> None:
    for unfinished in ([(0, 1000)], [(0, 3), (10, 400), (500, 501)], []):
        for count, most in ((1, 300), (3, 300), (4, 7), (7, 10**6)):
            shares = [_share(unfinished, most, Ranks(rank, count)) for rank in range(count)]
            rows = sorted(row for share in shares for block in share for row in range(*block))
            assert rows == [row for block in unfinished for row in range(*block)]
            assert all(stop - start <= most for share in shares for start, stop in share)
            each = [sum(stop - start for start, stop in share) for share in shares]
            assert max(each) - min(each) <= max((stop - start for share in shares for start, stop in share), default=0)


def broken(tmp_path: Path, name: str, value: Any) -> Path:
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, **value)
    else:
        np.save(path, value)
    return path


Z = np.zeros((4, 3), np.float32)
MIXTURE = {"mu": np.zeros((5, 3), np.float32), "logvar": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("points", "mixture", "told"),
    [
        (np.zeros((4, 2), np.float32), MIXTURE, "z must be [..., 3] to match mu [5, 3], not [4, 2]"),
        (np.zeros(4, np.float32), MIXTURE, "z must be [M, D], not [4]"),
        (np.zeros((4, 3), np.int32), MIXTURE, "z must be a floating tensor, not torch.int32"),
        (
            np.zeros((4, 3), "U2"),
            MIXTURE,
            "error: z.npy: holds <U2, which cannot be read as a tensor; save it as float32",
        ),
        (np.asfortranarray(np.zeros((4, 3))), MIXTURE, "numpy.ascontiguousarray"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), MIXTURE, "z holds NaN or infinity, first at index 1."),
        (np.array([[0, 0, 0], [0, 0, 0], [np.inf, 0, 0]]), MIXTURE, "z holds NaN or infinity, first at index 2."),
        (Z, MIXTURE | {"logvar": np.array(np.nan)}, "logvar holds NaN or infinity"),
        (Z, MIXTURE | {"logvar": np.zeros(2)}, "logvar must be broadcastable to [1, 3]"),
        (Z, MIXTURE | {"log_weights": np.zeros(4)}, "log_weights must be [5]"),
        (Z, MIXTURE | {"log_weights": np.array([0, 0, 0, np.nan, 0])}, "log_weights holds NaN or +infinity"),
        (Z, {"mu": Z, "scale": Z}, "logvar (log sigma^2, [K, D] or what broadcasts to it)"),
        (Z, MIXTURE | {"mu": np.zeros((0, 3))}, "mu must be [K, D] with K >= 1"),
        (np.zeros((4, 0), np.float32), MIXTURE, "z must be [..., 3] to match mu [5, 3], not [4, 0]"),
    ],
)
def test_wrong_contents_are_told(cli: Cli, tmp_path: Path, points: Any, mixture: Any, told: str) -> None:
    files = broken(tmp_path, "z.npy", points), broken(tmp_path, "mixture.npz", mixture)
    code, _, error = cli(*options(files, tmp_path / "out.npy"))
    assert code == 1 and told.replace("z.npy", str(files[0])) in error and "Traceback" not in error, error
    assert str(files[0]) in error or str(files[1]) in error
    assert left(tmp_path) == []


def test_a_weight_of_zero_is_allowed(cli: Cli, tmp_path: Path) -> None:
    weights = np.array([0.0, -np.inf, 0, 0, 0], np.float32)
    files = broken(tmp_path, "z.npy", Z), broken(tmp_path, "mixture.npz", MIXTURE | {"log_weights": weights})
    assert cli(*options(files, tmp_path / "out.npy"))[0] == 0
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()


def test_wrong_files_and_options_are_told(cli: Cli, tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    z, mixture = inputs
    (tmp_path / "bad.npy").write_bytes(z.read_bytes()[:-8])
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "text.txt").write_text("1 2 3")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, told in (
        ("bad.npy", "cut short"),
        ("empty.npy", "is not an .npy file"),
        ("bad.safetensors", "is not a safetensors file"),
        ("text.txt", "should be an .npy, .npz or .safetensors file"),
        ("none.npy", "there is no such file"),
    ):
        code, _, error = cli(*options((tmp_path / name, mixture), tmp_path / "out.npy"))
        assert code == 1 and told in error and name in error, error
    for out, told in (
        (z, "is one of the other files"),
        (tmp_path / "out.txt", "should be the name of an .npy file"),
        (tmp_path / "none" / "out.npy", "does not exist"),
    ):
        code, _, error = cli(*options(inputs, out))
        assert code == 1 and told in error, error
    out = tmp_path / "out.npy"
    assert "is one of the other files" in cli(*options(inputs, out), "--score", out)[2]
    assert "--dtype is 'half'" in cli(*options(inputs, out), "--dtype", "half")[2]


def test_a_file_that_may_not_be_read_is_told(
    cli: Cli, tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not damaged."""
    np.savez(tmp_path / "z.npz", z=Z)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "z.npz")

    monkeypatch.setattr("zipfile.ZipFile", refused)  # where the tests' user may read everything, too
    code, _, error = cli(*options((tmp_path / "z.npz", inputs[1]), tmp_path / "out.npy"))
    assert code == 1 and error == f"error: {tmp_path / 'z.npz'}: cannot be read (Permission denied)."


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="takes a folder that takes no files")
def test_a_folder_that_takes_no_files_is_told(cli: Cli, inputs: tuple[Path, Path]) -> None:
    code, _, error = cli(*options(inputs, Path("/proc/out.npy")))
    assert code == 1 and "/proc/out.npy: cannot be written" in error


def test_a_block_of_a_file_is_in_memory_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels are given the very memory that was read into."""
    np.save(tmp_path / "z.npy", np.zeros((500, 3), np.float32))
    read: list[np.ndarray] = []
    fromfile, score = np.fromfile, fastvae.streaming.mixture_log_prob
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: read.append(fromfile(*a, **k)) or read[-1])
    given: list[int] = []

    def looking(z: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        given.append(z.data_ptr())
        return score(z, *arguments, **options)

    monkeypatch.setattr("fastvae.streaming.mixture_log_prob", looking)
    z = arrays.open_points(tmp_path / "z.npy").arrays["z"]
    fastvae.streamed_log_prob(z, torch.zeros(4, 3), torch.zeros(()))
    assert given and set(given) <= {block.ctypes.data for block in read}


def test_the_whole_of_an_array_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    z = np.random.default_rng(0).standard_normal((1000, 3))
    np.save(tmp_path / "z.npy", z)
    monkeypatch.setattr(arrays, "_SCANNED", 240)
    read: list[int] = []
    first = arrays.fingerprint(arrays.open_points(tmp_path / "z.npy"), read.append)
    assert sum(read) == z.nbytes and len(read) == 100
    monkeypatch.setattr(arrays, "_SCANNED", 2**24)
    assert arrays.fingerprint(arrays.open_points(tmp_path / "z.npy"), read.append) == first
    z[999, 2] += 1
    np.save(tmp_path / "z.npy", z)
    assert arrays.fingerprint(arrays.open_points(tmp_path / "z.npy"), read.append) != first


def test_two_jobs_with_a_second_file_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    shapes, blocks = [(10,), (10, 2)], [np.arange(4, dtype=np.float32), np.ones((4, 2), np.float32)]
    first = ResumableArrays([tmp_path / "a.npy", tmp_path / "score.npy"], shapes, "float32")
    other = ResumableArrays([tmp_path / "b.npy", tmp_path / "score.npy"], shapes, "float32")
    for results, factor in ((first, 1), (other, 2)):
        results.open({"job": "1"}, overwrite=False)
        results.join(results.finished)
        results.write(0, [factor * block for block in blocks])
    first.write(4, [np.arange(6, dtype=np.float32), np.ones((6, 2), np.float32)])
    first.finish()
    assert (np.load(tmp_path / "score.npy") == 1).all()


def test_a_journal_without_its_part_begins_anew(tmp_path: Path) -> None:
    def begun() -> ResumableArrays:
        results = ResumableArrays([tmp_path / "a.npy"], [(10,)], "float32")
        results.open({"job": "1"}, overwrite=False)
        results.join(results.finished)
        return results

    results = begun()
    results.write(0, [np.arange(4, dtype=np.float32)])
    assert begun().finished_rows == 4
    (tmp_path / ".a.npy.part").unlink()
    assert begun().finished_rows == 0 and (tmp_path / ".a.npy.part").exists()
    with pytest.raises(RunError, match="job: 1 then, 2 now"):
        ResumableArrays([tmp_path / "a.npy"], [(10,)], "float32").open({"job": "2"}, overwrite=False)
    assert json.loads((tmp_path / ".a.npy.journal").read_bytes().split(b"\n")[0]) == {"job": "1"}
