"""The named data sets, on files made here and, where FASTVAE_DATA is set, on the real ones."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.app.data.dataset import Dataset
from fastvae.app.data.named_sets import load
from fastvae.app.user_errors import DataError

REAL = os.environ.get("FASTVAE_DATA")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8) % 10


def write_idx(path: Path, array: np.ndarray, *, packed: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if packed else raw)


def write_mnist_idx(folder: Path, *, packed: bool = False, dotted: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ending = "-ubyte.gz" if packed else "-ubyte"
    parts = {"train-images-idx3": images(12), "train-labels-idx1": labels(12)}
    parts |= {"t10k-images-idx3": images(6, seed=1), "t10k-labels-idx1": labels(6)}
    for name, array in parts.items():
        name = name.replace("-idx", ".idx") if dotted else name
        write_idx(folder / (name + ending), array, packed=packed)


def write_mnist_npz(path: Path) -> None:
    np.savez(path, x_train=images(12), y_train=labels(12), x_test=images(6, seed=1), y_test=labels(6))


def check_small_mnist(data: Dataset) -> None:
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 2, 6]
    torch.testing.assert_close(data.train.x, torch.from_numpy(images(12)[:10].reshape(10, 784) / 255).float())
    assert data.validation.labels is not None and data.validation.labels.tolist() == [0, 1]
    assert data.dynamic and data.kind == "binary" and data.image_shape == (28, 28)
    # The held-out pixels were drawn with the grey levels as probabilities.
    assert set(data.test.x.unique().tolist()) == {0.0, 1.0}
    grey = torch.from_numpy(images(6, seed=1).reshape(6, 784) / 255)
    assert float(((data.test.x - grey) ** 2).mean()) == pytest.approx(float((grey * (1 - grey)).mean()), rel=0.05)


def test_digits() -> None:
    data, again = load("digits"), load("digits")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [1200, 297, 300]
    assert data.num_pixels == 64 and data.dynamic
    assert set((data.train.x * 16).unique().tolist()) == set(map(float, range(17)))
    assert set(data.test.x.unique().tolist()) == {0.0, 1.0}
    assert data.train.labels is not None and len(data.train.labels.unique()) == 10
    assert torch.equal(data.train.x, again.train.x) and torch.equal(data.test.x, again.test.x)


def test_mnist_npz(tmp_path: Path) -> None:
    write_mnist_npz(tmp_path / "mnist.npz")
    check_small_mnist(load("mnist", tmp_path))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_mnist_idx(tmp_path: Path, packed: bool, place: str) -> None:
    write_mnist_idx(tmp_path / place, packed=packed, dotted=packed)
    check_small_mnist(load("mnist", tmp_path))


def test_data_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist_npz(tmp_path / "mnist.npz")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    check_small_mnist(load("mnist"))


def test_static_mnist_npz_and_amat_agree(tmp_path: Path) -> None:
    bits = {part: images(4, seed=i).reshape(4, 784) > 127 for i, part in enumerate(("train", "valid", "test"))}
    (tmp_path / "npz").mkdir()
    (tmp_path / "amat").mkdir()
    packed = {part: np.packbits(x, axis=1) for part, x in bits.items()}
    np.savez(tmp_path / "npz" / "static_mnist.npz", **packed)  # type: ignore[arg-type]
    for part, x in bits.items():
        np.savetxt(tmp_path / "amat" / f"binarized_mnist_{part}.amat", x, fmt="%d")
    a, b = load("static-mnist", tmp_path / "npz"), load("static-mnist", tmp_path / "amat")
    assert torch.equal(a.train.x, torch.from_numpy(bits["train"]).float())
    for left, right in ((a.train, b.train), (a.validation, b.validation), (a.test, b.test)):
        assert torch.equal(left.x, right.x)
    assert not a.dynamic and a.kind == "binary" and a.test.labels is None


def test_freyfaces_takes_the_middle_of_each_level(tmp_path: Path) -> None:
    levels = images(20)[:, :, :20]
    np.savez(tmp_path / "freyfaces.npz", x=levels)
    data = load("freyfaces", tmp_path)
    assert data.kind == "gray" and data.image_shape == (28, 20)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [16, 2, 2]
    every = torch.cat([data.train.x, data.validation.x, data.test.x])
    assert torch.equal(every.flatten().sort()[0], torch.from_numpy((levels.flatten() + 0.5) / 256).float().sort()[0])


def test_caltech101_keeps_images_and_classes_together(tmp_path: Path) -> None:
    x = images(40).reshape(40, 784) > 127
    np.savez(tmp_path / "caltech101_silhouettes.npz", x=np.packbits(x, axis=1), y=np.arange(40))
    data = load("caltech101", tmp_path)
    assert data.test.labels is not None
    assert torch.equal(data.test.x, torch.from_numpy(x).float()[data.test.labels])


@pytest.mark.parametrize("name", ["mnist", "static-mnist", "freyfaces", "caltech101"])
def test_missing_file_says_which_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    message = str(error.value)
    assert name in message and str(tmp_path) in message and ".npz" in message
    assert "How to get it" in message and "FASTVAE_DATA" in message


def test_three_of_four_idx_files_are_not_mnist(tmp_path: Path) -> None:
    write_mnist_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="not found"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_idx(tmp_path: Path, packed: bool) -> None:
    write_mnist_idx(tmp_path, packed=packed)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*\n.*damaged or cut short"):
        load("mnist", tmp_path)


def test_idx_of_another_type(tmp_path: Path) -> None:
    write_mnist_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"\x00\x00\x0d" + path.read_bytes()[3:])
    with pytest.raises(DataError, match="not an IDX file of unsigned bytes"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 200, -30])
def test_truncated_npz(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "mnist.npz"
    write_mnist_npz(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"mnist\.npz: "):
        load("mnist", tmp_path)


def test_flipped_bits_in_npz(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    write_mnist_npz(path)
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="damaged"):
        load("mnist", tmp_path)


def test_npz_without_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=images(12), y_train=labels(12))
    with pytest.raises(DataError, match=r"no array 'x_test'; it holds x_train, y_train"):
        load("mnist", tmp_path)


def test_wrongly_shaped_mnist(tmp_path: Path) -> None:
    arrays = {"x_train": images(12)[:, :27], "y_train": labels(12), "x_test": images(6), "y_test": labels(6)}
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"uint8 \[12, 27, 28\]"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("text", ["0 1 2\n", "0 1 x\n", "0 1\n0\n", "0 1 0\n", ""])
def test_bad_amat(tmp_path: Path, text: str) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"binarized_mnist_{part}.amat").write_text(text)
    with pytest.raises(DataError, match=r"binarized_mnist_train\.amat"):
        load("static-mnist", tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"'cifar' is not known: it can be digits, mnist"):
        load("cifar")


@pytest.mark.skipif(REAL is None, reason="FASTVAE_DATA is not set")
@pytest.mark.parametrize(
    ("name", "sizes", "pixels", "lit"),
    [
        ("mnist", [50000, 10000, 10000], 784, 0.1307),
        ("static-mnist", [50000, 10000, 10000], 784, 0.13),
        ("freyfaces", [1565, 200, 200], 560, 0.6),
        ("caltech101", [4100, 2264, 2307], 784, 0.5),
    ],
)
def test_real_data(name: str, sizes: list[int], pixels: int, lit: float) -> None:
    data = load(name, REAL)
    assert [len(s) for s in (data.train, data.validation, data.test)] == sizes
    assert data.num_pixels == data.train.x.shape[1] == pixels
    for split in (data.train, data.validation, data.test):
        assert float(split.x.mean()) == pytest.approx(lit, rel=0.2)
        assert split.x.dtype == torch.float32
