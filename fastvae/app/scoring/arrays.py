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
from pydantic import NonNegativeInt, TypeAdapter
from pydantic_core import from_json
from torch import Tensor

from fastvae.app.data.array_files import read_npy_header, read_npz
from fastvae.app.user_errors import DataError

_SCANNED = 2**24  # bytes of a block that is looked through
_MIXTURE = ("mu", "logvar", "log_weights")
_SAFETENSORS_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{f"{letter}{8 * size}": f"<{letter.lower()}{size}" for letter in "IU" for size in (1, 2, 4, 8)},
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FileRows:
    """The rows of an array in a file as tensors, read and not mapped.

    A mapped file that another process cuts short ends this one without a message, and its pages count as memory.

    Args:
        path: the file.
        shape, dtype: of the array, as it is stored.
        offset: bytes before it.
        bfloat16: whether its uint16 numbers are the bits of bfloat16 numbers, which NumPy has no dtype for.

    Raises:
        DataError: the file ends before the array does.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int, *, bfloat16: bool = False
    ) -> None:
        self.path, self.shape, self.dtype, self._offset, self._bfloat16 = path, shape, dtype, offset, bfloat16
        needed, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if size < needed:
            raise DataError(
                f"{path}: is cut short: by its header it should hold {needed:,} bytes or more, and it holds {size:,}."
            )

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
            block = torch.from_numpy(found.reshape(shape).astype(self.dtype.newbyteorder("="), copy=False))
        except TypeError as error:
            raise DataError(
                f"{self.path}: holds {self.dtype}, which cannot be read as a tensor; save it as float32 or another "
                "floating dtype."
            ) from error
        return block.view(torch.bfloat16) if self._bfloat16 else block


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
        return Arrays(path, {file.stem: _npy(file) for file in files}, tuple(files))
    if path.suffix == ".npy":
        return Arrays(path, {path.stem: _npy(path)}, (path,))
    if path.suffix == ".npz":
        return Arrays(path, dict(read_npz(path)), (path,))
    if path.suffix == ".safetensors":
        return Arrays(path, _safetensors(path), (path,))
    raise DataError(f"{path}: should be an .npy, .npz or .safetensors file, or a folder of .npy files.")


def _npy(path: Path) -> FileRows:
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            offset = file.tell()
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: is not an .npy file of numbers, or is cut short ({error}).") from error
    if fortran and sum(size > 1 for size in shape) > 1:
        raise DataError(f"{path}: should be rows one after the other; save numpy.ascontiguousarray of it.")
    if dtype.hasobject:
        raise DataError(f"{path}: holds Python objects, not numbers; save it as float32 or another floating dtype.")
    return FileRows(path, shape, dtype, offset)


@dataclass(frozen=True)
class _Stored:
    """What the header of a safetensors file says of an array."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER = TypeAdapter(dict[str, _Stored])


def _safetensors(path: Path) -> dict[str, FileRows]:
    """All arrays of a safetensors file: 8 bytes with the header's length, the header in JSON, the arrays' bytes.

    The safetensors library is not asked, because it maps the file; see :class:`FileRows`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise DataError(
                f"{path}: is not a safetensors file, or is cut short: by its first 8 bytes it should hold "
                f"{8 + length:,} bytes or more, and it holds {size:,}."
            )
        header = file.read(length)
    try:
        said = from_json(header)
        said.pop("__metadata__", None)
        stored = _HEADER.validate_python(said)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not a safetensors file, or is damaged: its header is not that of one.") from error
    arrays = {}
    for name, array in stored.items():
        if array.dtype not in _SAFETENSORS_DTYPES:
            raise DataError(f"{path}: {name} is {array.dtype}, which cannot be read; save it as F32, or leave it out.")
        dtype, (begin, end) = np.dtype(_SAFETENSORS_DTYPES[array.dtype]), array.data_offsets
        needed = math.prod(array.shape) * dtype.itemsize
        if end - begin != needed:
            raise DataError(
                f"{path}: is damaged: {name} takes {needed:,} bytes by its shape and dtype, and has {end - begin:,}."
            )
        arrays[name] = FileRows(path, array.shape, dtype, 8 + length + begin, bfloat16=array.dtype == "BF16")
    return arrays


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
        described.append(f"{name} {_plain(dtype)} {list(array.shape)}")
    return f"{', '.join(described)}, digest {digest.hexdigest()}"


def size_in_bytes(opened: Arrays) -> int:
    """Of all files."""
    return sum(path.stat().st_size for path in opened.files)


def _row_blocks(path: Path, name: str, array: Any) -> Iterator[tuple[int, Tensor]]:
    shape = array.shape
    width = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, _SCANNED // (8 * width))
    try:
        for start in range(0, shape[0] if shape else 1, step):
            block = array[start : start + step] if shape else array[...]
            yield start, block if isinstance(block, Tensor) else torch.tensor(block)
    except TypeError as error:
        raise DataError(f"{path}: {name} should be numbers in floating point ({error}).") from error


def _plain(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
