"""Reading arrays from the file formats data sets come in; nothing is ever unpickled."""

from __future__ import annotations

import gzip
import warnings
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from fastvae.app.data.physical_memory import physical_memory
from fastvae.app.user_errors import DataError

_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


def _damaged(path: Path, problem: object) -> DataError:
    if isinstance(problem, OSError) and problem.strerror:  # the file may be as it should
        return DataError(f"{path}: cannot be read ({problem.strerror}).")
    return DataError(f"{path}: cannot be read ({problem}).\nThe file is damaged or cut short; get it again.")


def read_npz(path: Path, required: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read every array of a NumPy .npz archive.

    Raises:
        DataError: the file is damaged, lacks one of the `required` arrays, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {
                name.removesuffix(".npy"): _read_member(archive, name, path)
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except DataError:
        raise
    except _DAMAGE as error:
        raise _not_an_archive(path, error) from error
    for key in required:
        if key not in arrays:
            raise DataError(f"{path}: has no array {key!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    return arrays


def _not_an_archive(path: Path, error: Exception) -> DataError:
    if isinstance(error, zipfile.BadZipFile) and path.is_file():
        with open(path, "rb") as file:
            if file.read(len(npy_format.MAGIC_PREFIX)) == npy_format.MAGIC_PREFIX:
                return DataError(f"{path}: is a single array, not an .npz archive; save it with numpy.savez.")
    return _damaged(path, error)


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """Read one array, after a check that the archive holds as many numbers as the array's header promises.

    Without the check NumPy would ask for the memory of a trillion numbers that are not there.
    """
    key = name.removesuffix(".npy")
    with archive.open(name) as file:
        shape, _, dtype = read_npy_header(file)
        header = file.tell()
    if dtype.hasobject:
        raise DataError(
            f"{path}: array {key!r} holds pickled Python objects, which are not read because "
            "they can run code.\nSave it again as numbers, for example as uint8."
        )
    there, promised = archive.getinfo(name).file_size - header, prod(shape) * dtype.itemsize
    if there != promised:
        raise _damaged(path, f"array {key!r} has {there} bytes of data where its header promises {promised}")
    memory = physical_memory()
    if memory is not None and promised > memory:
        raise DataError(
            f"{path}: array {key!r} takes {promised / 2**30:,.0f} GiB and this machine has {memory / 2**30:,.0f} GiB "
            "of memory. Save fewer images, or smaller ones."
        )
    with archive.open(name) as file:
        return np.asarray(npy_format.read_array(file, allow_pickle=False))


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What an .npy file begins with: the shape, whether the first index changes fastest, and the numbers' dtype.

    Raises:
        ValueError: it is no .npy file, or is cut short here.
    """
    version = npy_format.read_magic(file)
    read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array is stored in format {version[0]}.{version[1]}, which no array of numbers needs")
    return read(file)


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
