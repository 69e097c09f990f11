"""Points and mixtures in files that are read by rows: .npy, .safetensors, folders of .npy; .npz whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.app.data.array_files import read_npz
from fastvae.app.user_errors import DataError

_SCANNED = 2**24  # bytes of a block that is looked through
_MIXTURE = ("mu", "logvar", "log_weights")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NpyRows:
    """The rows of an .npy file as tensors, read and not mapped.

    A mapped file that another process cuts short ends this one without a message, and its pages count as memory.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: is not an .npy file of numbers, or is cut short ({error}).") from error
        if not isinstance(header, np.memmap) or (header.ndim and not header.flags.c_contiguous):
            raise DataError(f"{path}: should be rows one after the other; save numpy.ascontiguousarray of it.")
        self.path, self.shape, self.dtype = path, header.shape, header.dtype
        self._offset = header.offset

    def __getitem__(self, rows: Any) -> Tensor:
        first, shape = 0, self.shape
        if rows is not Ellipsis:
            start, stop, _ = rows.indices(self.shape[0])
            first, shape = start * math.prod(self.shape[1:]), (max(0, stop - start), *self.shape[1:])
        count = math.prod(shape)
        try:
            found = np.fromfile(self.path, self.dtype, count, offset=self._offset + first * self.dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from error
        if found.size != count:
            raise DataError(f"{self.path}: was cut short while it was read.")
        try:  # a tensor of the very memory that was read into
            return torch.from_numpy(found.reshape(shape).astype(self.dtype.newbyteorder("="), copy=False))
        except TypeError as error:
            raise DataError(f"{self.path}: cannot be read as a tensor ({error}).") from error


@dataclass(frozen=True)
class Arrays:
    """Arrays by their names, and the files that they are in."""

    path: Path
    arrays: dict[str, Any]
    files: tuple[Path, ...]

    def stamps(self) -> list[tuple[int, ...]]:
        """Number, size and times of change of each file, which tell whether one was changed meanwhile.

        A program may set st_mtime_ns back, as tools that copy files do; st_ctime_ns it may not.

        Raises:
            DataError: a file is gone.
        """
        try:
            return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, self.files)]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error


def open_points(path: Path) -> Arrays:
    """The points: an .npy file [M, D], or the array z, or the only one, of an .npz or .safetensors file.

    Raises:
        DataError: the file is not there, damaged, or holds something else.
    """
    found = _open(path, ("z",))
    if "z" in found.arrays:
        return Arrays(path, {"z": found.arrays["z"]}, found.files)
    if len(found.arrays) != 1:
        raise DataError(f"{path}: should hold the points as z; it holds {_names(found)}.")
    return Arrays(path, {"z": next(iter(found.arrays.values()))}, found.files)


def open_mixture(path: Path) -> Arrays:
    """The components: mu, logvar and perhaps log_weights of an .npz or .safetensors file or a folder of .npy files.

    Raises:
        DataError: as :func:`open_points`.
    """
    found = _open(path, _MIXTURE)
    for name in _MIXTURE[:2]:
        if name not in found.arrays:
            raise DataError(
                f"{path}: should hold mu [K, D], logvar (log sigma^2, [K, D] or what broadcasts to it) and perhaps "
                f"log_weights [K]; it holds {_names(found)}."
            )
    return Arrays(path, {name: found.arrays[name] for name in _MIXTURE if name in found.arrays}, found.files)


def _open(path: Path, names: tuple[str, ...]) -> Arrays:
    """All arrays of a file, or those of these names of a folder."""
    if path.is_dir():
        files = [file for name in names if (file := path / f"{name}.npy").is_file()]
        return Arrays(path, {file.stem: NpyRows(file) for file in files}, tuple(files))
    if path.suffix == ".npy":
        return Arrays(path, {path.stem: NpyRows(path)}, (path,))
    if path.suffix == ".npz":
        return Arrays(path, dict(read_npz(path)), (path,))
    if path.suffix == ".safetensors":
        return Arrays(path, _safetensors(path), (path,))
    raise DataError(f"{path}: should be an .npy, .npz or .safetensors file, or a folder of .npy files.")


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: reading it needs safetensors; pip install safetensors") from error
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is not a safetensors file, or is damaged ({error}).") from error


def _names(found: Arrays) -> str:
    return ", ".join(sorted(found.arrays)) or "nothing"


def fingerprint(opened: Arrays, on_bytes: Callable[[int], None]) -> str:
    """Shape, dtype and digest of the arrays, which tell whether a resumed job has the same inputs.

    All numbers are read once, and looked at on the way.

    Args:
        on_bytes: is called with the number of bytes read since the last call.

    Raises:
        DataError: an array holds NaN or infinity (log_weights: NaN or +inf), or is not floating.
    """
    digest, described = hashlib.blake2b(digest_size=16), []
    for name, array in opened.arrays.items():
        dtype = None
        for start, block in _row_blocks(opened.path, name, array):
            dtype = block.dtype
            if dtype not in _FLOATS:
                raise DataError(
                    f"{opened.path}: {name} is {_plain(dtype)}; it should be float16, 32 or 64, or bfloat16."
                )
            bad = block.isnan() | (block == torch.inf) if name == "log_weights" else ~block.isfinite()
            if bad.any():
                rows = bad.reshape(len(block), -1).any(1) if block.ndim else bad.reshape(1)
                raise DataError(
                    f"{opened.path}: {name} holds {'NaN or +' if name == 'log_weights' else 'NaN or '}infinity, first "
                    f"at index {start + int(rows.nonzero()[0])}."
                )
            digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(block.nbytes)
        described.append(f"{name} {_plain(dtype)} {list(_shape(array))}")
    return f"{', '.join(described)}, digest {digest.hexdigest()}"


def size_in_bytes(opened: Arrays) -> int:
    """Of all files."""
    return sum(path.stat().st_size for path in opened.files)


def _row_blocks(path: Path, name: str, array: Any) -> Iterator[tuple[int, Tensor]]:
    shape = _shape(array)
    width = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, _SCANNED // (8 * width))
    try:
        for start in range(0, shape[0] if shape else 1, step):
            block = array[start : start + step] if shape else array[...]
            yield start, block if isinstance(block, Tensor) else torch.tensor(block)
    except TypeError as error:
        raise DataError(f"{path}: {name} should be numbers in floating point ({error}).") from error


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.get_shape() if hasattr(array, "get_shape") else array.shape)


def _plain(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
