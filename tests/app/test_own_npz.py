"""An .npz file of the user's own: what is taken, how it is read, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvae.app.data.dataset import Dataset
from fastvae.app.data.named_sets import load
from fastvae.app.user_errors import DataError

GREY = np.random.default_rng(0).integers(0, 256, (40, 4, 6), dtype=np.uint8)


def load_arrays(tmp_path: Path, binarize: bool = False, **arrays: Any) -> Dataset:
    np.savez(tmp_path / "mine.npz", **arrays)
    return load(str(tmp_path / "mine.npz"), binarize=binarize)


def test_grey_levels(tmp_path: Path) -> None:
    data = load_arrays(tmp_path, x_train=GREY, x_valid=GREY[:5], x_test=GREY[5:12], y_test=np.arange(7))
    assert data.kind == "gray" and not data.dynamic and data.image_shape == (4, 6)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 5, 7]
    torch.testing.assert_close(data.test.x, torch.from_numpy((GREY[5:12].reshape(7, 24) + 0.5) / 256).float())
    assert data.test.labels is not None and data.test.labels.tolist() == list(range(7))


def test_floats_mean_the_same_as_levels(tmp_path: Path) -> None:
    a = load_arrays(tmp_path, x_train=GREY)
    b = load_arrays(tmp_path, x_train=GREY / 255)
    assert torch.equal(a.train.x, b.train.x)


def test_missing_sets_are_cut_off_and_keep_their_labels(tmp_path: Path) -> None:
    flat = (np.arange(40)[:, None] + np.zeros((1, 9))).astype(np.uint8)  # image i is all i
    data = load_arrays(tmp_path, x=flat, y=np.arange(40))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [32, 4, 4]
    assert data.image_shape == (3, 3)
    seen = []
    for split in (data.train, data.validation, data.test):
        assert split.labels is not None
        assert torch.equal((split.x[:, 0] * 256 - 0.5).long(), split.labels)
        seen += split.labels.tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)


@pytest.mark.parametrize("high", [1, 255])
def test_two_levels_are_binary(tmp_path: Path, high: int) -> None:
    data = load_arrays(tmp_path, x_train=(GREY > 127).astype(np.uint8) * high)
    assert data.kind == "binary" and not data.dynamic
    assert set(data.train.x.unique().tolist()) == {0.0, 1.0}


def test_binarize(tmp_path: Path) -> None:
    data = load_arrays(tmp_path, x_train=GREY, binarize=True)
    assert data.kind == "binary" and data.dynamic
    assert len(data.train.x.unique()) > 100 and set(data.test.x.unique().tolist()) == {0.0, 1.0}


def test_image_shape_of_flat_images(tmp_path: Path) -> None:
    flat = GREY.reshape(40, 24)
    assert load_arrays(tmp_path, x_train=flat).image_shape == (1, 24)
    assert load_arrays(tmp_path, x_train=flat, image_shape=np.array([4, 6])).image_shape == (4, 6)
    with pytest.raises(DataError, match="image_shape"):
        load_arrays(tmp_path, x_train=flat, image_shape=np.array([5, 6]))


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"x": GREY, "x_train": GREY}, r"holds both x and x_train, so it is not clear"),
        ({"pictures": GREY}, r"should hold x_train or x; it holds pictures"),
        ({"x_train": GREY / 128}, r"x_train holds values from 0 to 1\.99"),
        ({"x_train": GREY / 255 - 0.1}, r"x_train holds values from -0\.1"),
        ({"x_train": GREY.astype(np.int64)}, r"x_train is int64"),
        ({"x_train": GREY[:5]}, r"holds 5 training images; at least 10"),
        ({"x_train": GREY[:0]}, r"x_train is \[0, 4, 6\]"),
        ({"x_train": GREY[:, 0, 0]}, r"x_train is \[40\]"),
        ({"x_train": np.stack([GREY] * 3, -1)}, r"more than one channel"),
        ({"x_train": GREY, "x_test": GREY[:, :3]}, r"x_test is \[40, 3, 6\]"),
        ({"x_train": GREY, "y_train": np.arange(39)}, r"y_train is int64 \[39\]"),
        ({"x_train": GREY, "y_train": np.linspace(0, 1, 40)}, r"y_train is float64"),
    ],
)
def test_what_is_refused(tmp_path: Path, arrays: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        load_arrays(tmp_path, **arrays)
    assert str(tmp_path / "mine.npz") in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path: Path, value: float) -> None:
    x = GREY / 255
    x[7, 1, 1] = value
    with pytest.raises(DataError, match=r"NaN or infinity in 1 images, the first at index 7"):
        load_arrays(tmp_path, x_train=x)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: there is no such file") as error:
        load(str(tmp_path / "nothing.npz"))
    assert "savez_compressed" in str(error.value)


def write_claim(path: Path, shape: tuple[int, ...], descr: str = "|u1", data: bytes = bytes(1000)) -> None:
    """An archive of one array whose header claims a shape, whatever data there are."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", header.getvalue() + data)


@pytest.mark.parametrize(
    ("shape", "promised"), [((10**12, 28, 28), 784 * 10**12), ((999,), 999), ((1001,), 1001), ((-1, 28, 28), -784)]
)
def test_headers_that_claim_what_is_not_there(tmp_path: Path, shape: tuple[int, ...], promised: int) -> None:
    """Refused before memory is asked for: 784 TB of it would stop the program."""
    write_claim(tmp_path / "claim.npz", shape)
    with pytest.raises(DataError, match=rf"'x_train' has 1000 bytes of data where its header promises {promised}\b"):
        load(str(tmp_path / "claim.npz"))


def test_arrays_that_memory_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvae.app.data.array_files.physical_memory", lambda: 2**20)
    write_claim(tmp_path / "large.npz", (2**21, 1), data=bytes(2**21))
    with pytest.raises(DataError, match=r"takes 0 GiB and this machine has 0 GiB"):
        load(str(tmp_path / "large.npz"))


def test_damaged_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x_train.npy", b"hello" * 100)
    (tmp_path / "b.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x07\x00" + bytes(100))
    for name in ("a.npz", "b.npz", "c.npz"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read .*\n.*damaged"):
            load(str(tmp_path / name))


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(DataError, match=r"array 'x_train' holds pickled Python objects"):
        load_arrays(tmp_path, x_train=np.array([Bomb(trace)], dtype=object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(DataError, match=r"bare\.npz"):
        load(str(tmp_path / "bare.npz"))
    assert not trace.exists()


def test_a_single_array_is_not_an_archive(tmp_path: Path) -> None:
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, GREY)
    with pytest.raises(DataError, match="single array"):
        load(str(tmp_path / "one.npz"))
