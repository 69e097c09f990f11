"""Reading arrays from the file formats data sets come in; nothing is ever unpickled."""

from __future__ import annotations

import gzip
import warnings
import zipfile
import zlib
from math import prod
from pathlib import Path

import numpy as np

from fastvae.app.user_errors import DataError

_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


def _damaged(path: Path, problem: object) -> DataError:
    return DataError(f"{path}: cannot be read ({problem}).\nThe file is damaged or cut short; get it again.")


def read_npz(path: Path, required: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read every array of a NumPy .npz archive.

    Raises:
        DataError: the file is damaged, lacks one of the `required` arrays, or holds pickled objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except _DAMAGE as error:
        # NumPy takes whatever it does not know for a pickle, and tells how to load that unsafely.
        problem = "it is no .npz archive" if "pickle" in str(error) else error
        raise _damaged(path, problem) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: is a single array, not an .npz archive; save it with numpy.savez.")
    arrays = {}
    with archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except ValueError as error:
                if "allow_pickle" in str(error):
                    raise DataError(
                        f"{path}: array {key!r} holds pickled Python objects, which are not read because "
                        "they can run code.\nSave it again as numbers, for example as uint8."
                    ) from error
                raise _damaged(path, error) from error
            except _DAMAGE as error:
                raise _damaged(path, error) from error
    for key in required:
        if key not in arrays:
            raise DataError(f"{path}: has no array {key!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, the format MNIST is published in, gzipped or not.

    The header is two zero bytes, 0x08 for unsigned bytes, the number of dimensions, and each dimension as
    a big-endian 32-bit integer.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: is not an IDX file of unsigned bytes (it begins with {raw[:4].hex(' ')}).")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise _damaged(path, "the header is cut short")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    if len(raw) - header != prod(shape):
        raise _damaged(path, f"{len(raw) - header} bytes of data where its header promises {prod(shape)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_amat(path: Path) -> np.ndarray:
    """Read an .amat file, an image a line, pixels 0 or 1 with spaces between: uint8 [N, pixels]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is an error below
            pixels = np.loadtxt(path, dtype=np.uint8, ndmin=2)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if pixels.size == 0 or pixels.max() > 1:
        raise DataError(f"{path}: every number should be 0 or 1, and there should be some.")
    return pixels
