"""The data sets that are known by name, and where their files are looked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastvae._files import whole_file
from fastvae.app.data.array_files import read_amat, read_idx, read_npz
from fastvae.app.data.dataset import Dataset, binarise_held_out, cut, make_split
from fastvae.app.data.own_npz import load_npz
from fastvae.app.data.places import check_name, data_folder, is_own_file, own_file
from fastvae.app.user_errors import DataError


def load(name: str, data_dir: str | Path | None = None, *, binarize: bool = False, download: bool = False) -> Dataset:
    """Load a data set by name, or from an .npz file of the user's own.

    Args:
        name: digits, mnist, static-mnist, freyfaces, caltech101, or the path of an .npz file; see `load_npz`.
        data_dir: the folder with the files; see `data_folder` and `own_file`.
        binarize: binarise the grey images of an .npz file dynamically.
        download: fetch mnist from OpenML if it is not in the folder.

    Raises:
        DataError: the data are not there or not right; the message says which file, where, and how to get it.
    """
    check_name(name, data_dir, binarize=binarize)
    if is_own_file(name):
        return load_npz(own_file(name, data_dir), binarize=binarize)
    folder = data_folder(data_dir)
    if download and name == "mnist":
        return _mnist(folder, download=True)
    return NAMED[name](folder)


def _digits(_: Path) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = cut(digits.images.reshape(-1, 64) / 16, digits.target, validation=297, test=300)
    source = "scikit-learn's load_digits"
    return Dataset("digits", source, *binarise_held_out(splits), image_shape=(8, 8), kind="binary", dynamic=True)


def _mnist(folder: Path, download: bool = False) -> Dataset:
    places = [folder, folder / "mnist", folder / "MNIST" / "raw"]
    archive = next((p / "mnist.npz" for p in places if (p / "mnist.npz").is_file()), None)
    idx = None if archive else next((files for files in map(_idx_files, places) if files), None)
    if archive is None and idx is None and download:
        archive = _download_mnist(folder)
    if archive is not None:
        keys = ("x_train", "y_train", "x_test", "y_test")
        arrays = read_npz(archive, keys)
        parts, source = [arrays[key] for key in keys], str(archive)
    elif idx is not None:
        parts, source = [read_idx(file) for file in idx], str(idx[0].parent)
    else:
        raise _missing(
            "mnist",
            "mnist.npz, or train-images-idx3-ubyte and its three companions, gzipped or not,",
            places,
            "Keras's mnist.npz and MNIST's own IDX files both serve, or --download fetches it from OpenML",
        )
    x, y, x_test, y_test = parts
    for images, labels in ((x, y), (x_test, y_test)):
        right = images.dtype == np.uint8 and images.shape[1:] == (28, 28) and labels.shape == images.shape[:1]
        if not right or len(images) < 6:
            raise DataError(
                f"{source}: MNIST images should be uint8 [N, 28, 28] with N labels; here are {images.dtype} "
                f"{list(images.shape)} with labels {list(labels.shape)}."
            )
    first = len(x) - len(x) // 6  # of the 60,000: 50,000 to train on and the last 10,000 to validate
    sets = (x[:first], y[:first]), (x[first:], y[first:]), (x_test, y_test)
    train, validation, test = (make_split(a.reshape(-1, 784) / np.float32(255), b) for a, b in sets)
    splits = binarise_held_out((train, validation, test))
    return Dataset("mnist", source, *splits, image_shape=(28, 28), kind="binary", dynamic=True)


def _idx_files(folder: Path) -> list[Path] | None:
    found = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        # Some unpackers write train-images.idx3-ubyte.
        spellings = [n + end for n in (name, name.replace("-idx", ".idx")) for end in ("-ubyte", "-ubyte.gz")]
        file = next((folder / s for s in spellings if (folder / s).is_file()), None)
        if file is None:
            return None
        found.append(file)
    return found


def _download_mnist(folder: Path) -> Path:
    from sklearn.datasets import fetch_openml

    try:
        bunch = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff", n_retries=1, delay=1)
    except (OSError, ValueError) as error:
        raise DataError(
            f"mnist: could not be fetched from OpenML ({error}).\n"
            f"Put Keras's mnist.npz or MNIST's four IDX files into {folder} instead."
        ) from error
    x, y = bunch.data.astype(np.uint8).reshape(-1, 28, 28), bunch.target.astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "mnist.npz") as file:
        np.savez_compressed(file, x_train=x[:60000], y_train=y[:60000], x_test=x[60000:], y_test=y[60000:])
    return folder / "mnist.npz"


def _static_mnist(folder: Path) -> Dataset:
    parts = ("train", "valid", "test")
    places = [folder, folder / "static-mnist", folder / "MNIST_static"]
    for place in places:
        archive = place / "static_mnist.npz"
        amat = [place / f"binarized_mnist_{part}.amat" for part in parts]
        if archive.is_file():
            arrays = read_npz(archive, parts)
            images = [_unpack(arrays[part], archive, part) for part in parts]
            source = str(archive)
        elif all(file.is_file() for file in amat):
            images = [read_amat(file) for file in amat]
            for file, x in zip(amat, images, strict=True):
                if x.shape[1] != 784:
                    raise DataError(f"{file}: a line should hold 784 pixels and holds {x.shape[1]}.")
            source = str(place)
        else:
            continue
        train, validation, test = map(make_split, images)
        return Dataset("static-mnist", source, train, validation, test, image_shape=(28, 28), kind="binary")
    raise _missing(
        "static-mnist",
        "static_mnist.npz, or the three files binarized_mnist_{train,valid,test}.amat,",
        places,
        "it is the fixed binarisation of Larochelle and Murray (2011), published as those three .amat files",
    )


def _freyfaces(folder: Path) -> Dataset:
    path = folder / "freyfaces.npz"
    if not path.is_file():
        hint = "it holds x, uint8 [1965, 28, 20]; the repository jmtomczak/vae_vampprior has the faces"
        raise _missing("freyfaces", path.name, [folder], hint)
    x = read_npz(path, ("x",))["x"]
    if x.dtype != np.uint8 or x.shape[1:] != (28, 20) or len(x) < 10:
        raise DataError(f"{path}: x should be uint8 [1965, 28, 20] and is {x.dtype} {list(x.shape)}.")
    held_out = max(1, 200 * len(x) // 1965)
    splits = cut((x.reshape(-1, 560) + 0.5) / 256, None, validation=held_out, test=held_out)
    return Dataset("freyfaces", str(path), *splits, image_shape=(28, 20), kind="gray")


def _caltech101(folder: Path) -> Dataset:
    path = folder / "caltech101_silhouettes.npz"
    if not path.is_file():
        hint = "it holds x, uint8 [8671, 98] of packed bits, and y, the classes [8671]"
        raise _missing("caltech101", path.name, [folder], hint)
    arrays = read_npz(path, ("x", "y"))
    x, y = _unpack(arrays["x"], path, "x"), arrays["y"]
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or len(x) < 10:
        raise DataError(f"{path}: y should be the class of each of {len(x)} images and is {y.dtype} {list(y.shape)}.")
    # As large as the published split's; which image is where in that one is not in this file.
    splits = cut(x, y, validation=2264 * len(x) // 8671, test=2307 * len(x) // 8671)
    return Dataset("caltech101", str(path), *splits, image_shape=(28, 28), kind="binary")


def _unpack(packed: np.ndarray, path: Path, key: str) -> np.ndarray:
    """Unpack uint8 [N, 98], eight pixels a byte, into uint8 [N, 784]."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != 98 or len(packed) == 0:
        raise DataError(
            f"{path}: {key} should be uint8 [N, 98], 784 pixels packed into bits, and is {packed.dtype} "
            f"{list(packed.shape)}."
        )
    return np.unpackbits(packed, axis=1)


def _missing(name: str, files: str, places: list[Path], hint: str) -> DataError:
    looked = "\n  ".join(str(place.absolute()) for place in places)
    return DataError(
        f"{name}: {files} not found. Looked in\n  {looked}\n"
        f"How to get it: {hint}. Say where it is with --data-dir or the environment variable FASTVAE_DATA."
    )


NAMED: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "static-mnist": _static_mnist,
    "freyfaces": _freyfaces,
    "caltech101": _caltech101,
}
