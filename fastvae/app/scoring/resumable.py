"""Arrays that are written row by row, survive a kill, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from fastvae._files import FileError
from fastvae.app.user_errors import RunError


class ResumableArrays:
    """Files .npy of the same number of rows, filled from the first row on.

    Beside the first file stands a journal: a line with what the job is, then a line with the number of finished rows
    after each block.  A block is on the disk before its line is; a line that was cut off does not count.  At the end
    the files are renamed to what they are to be called, and then the journal is removed.
    """

    def __init__(self, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]], dtype: str) -> None:
        self._paths, self._shapes, self._dtype = list(paths), list(shapes), np.dtype(dtype)
        # Another job may write a second file of the same name, so that its part is named after the first file too.
        first = hashlib.blake2b(str(paths[0].resolve()).encode(), digest_size=4).hexdigest()
        names = [f".{path.name}.{first}.part" if index else f".{path.name}.part" for index, path in enumerate(paths)]
        self._parts = [path.with_name(name) for path, name in zip(paths, names, strict=True)]
        self._journal = paths[0].with_name(f".{paths[0].name}.journal")
        self.rows, self.finished_rows = shapes[0][0], 0

    def refuse_result(self) -> None:
        """Raise RunError if a file is there that no unfinished job has put there."""
        existing = [str(path) for path in self._paths if path.exists()]
        if existing and not self._journal.exists():
            raise RunError(
                f"{' and '.join(existing)}: exists already. Say --overwrite to replace it, or name another file."
            )

    def open(self, job: Mapping[str, str], *, overwrite: bool) -> None:
        """Go on with what is there of the same job, or begin.

        Args:
            job: what the job is, in words that are the same for the same job.
            overwrite: begin in any case.

        Raises:
            RunError: there is the beginning of another job, and `overwrite` is not said.
            FileError: the files cannot be made, for example because the disk has no room for them.
        """
        begun = None if overwrite else self._read_journal()
        if begun is not None:
            earlier, finished = begun
            names = [name for name in {**earlier, **job} if earlier.get(name) != job.get(name)]
            if names:
                told = "; ".join(f"{n}: {earlier.get(n, 'none')} then, {job.get(n, 'none')} now" for n in names)
                raise RunError(
                    f"{self._paths[0]}: an unfinished job is here that differs ({told}). Give what it was given, or "
                    "say --overwrite to begin anew, or name another --out."
                )
            complete = finished == self.rows
            if all(part.exists() or (complete and path.exists()) for part, path in self._pairs()):
                self._cut_journal()
                self.finished_rows = finished
                return
        self._begin(job)

    def write(self, start: int, blocks: Sequence[np.ndarray]) -> None:
        """Put the rows from `start` on into all files, and then into the journal that they are there."""
        try:
            for part, shape, block in zip(self._parts, self._shapes, blocks, strict=True):
                with open(part, "r+b") as file:
                    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize
                    file.seek(_header_size(shape, self._dtype) + start * row_bytes)
                    file.write(np.ascontiguousarray(block, self._dtype).data)
                    _sync(file)
            self.finished_rows = start + len(blocks[0])
            with open(self._journal, "ab") as file:
                file.write(f"{self.finished_rows}\n".encode())
                _sync(file)
        except OSError as error:
            raise FileError(f"{self._paths[0]}: cannot be written ({error.strerror}).") from error

    def finish(self) -> None:
        """Put the files in their places; what stood there is replaced."""
        for part, path in self._pairs():
            if part.exists():  # else it was put there before a kill
                os.replace(part, path)
        _sync_folders(self._paths)
        self._journal.unlink()

    def discard(self) -> None:
        """Remove all that was begun; the results of earlier jobs stay."""
        for path in (self._journal, *self._parts):
            path.unlink(missing_ok=True)

    def _pairs(self) -> list[tuple[Path, Path]]:
        return list(zip(self._parts, self._paths, strict=True))

    def _cut_journal(self) -> None:
        """Cut a line off that was begun, lest the next one go on with it."""
        whole = self._journal.read_bytes().rfind(b"\n") + 1
        with open(self._journal, "r+b") as file:
            file.truncate(whole)
            _sync(file)

    def _read_journal(self) -> tuple[dict[str, Any], int] | None:
        """(the job, how many rows are finished); None where there is no journal, or not even its first line."""
        try:
            lines = self._journal.read_bytes().split(b"\n")[:-1]  # the last has no end: cut off, or empty
        except FileNotFoundError:
            return None
        if not lines:
            return None
        try:
            job, finished = json.loads(lines[0]), int(lines[-1]) if len(lines) > 1 else 0
            if not isinstance(job, dict) or not 0 <= finished <= self.rows:
                raise ValueError
        except ValueError as error:
            raise RunError(f"{self._journal}: is damaged. Say --overwrite to begin anew.") from error
        return job, finished

    def _begin(self, job: Mapping[str, str]) -> None:
        try:
            self.discard()
            for part, shape in zip(self._parts, self._shapes, strict=True):
                with open(part, "wb") as file:
                    _write_header(file, shape, self._dtype)
                    size = file.tell() + int(np.prod(shape, dtype=np.int64)) * self._dtype.itemsize
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now and not after hours
                    else:
                        file.truncate(size)
                    _sync(file)
            with open(self._journal, "wb") as file:
                file.write(json.dumps(dict(job)).encode() + b"\n")
                _sync(file)
            _sync_folders(self._paths)
        except OSError as error:
            self.discard()
            raise FileError(f"{self._paths[0]}: cannot be written ({error.strerror}).") from error
        self.finished_rows = 0


def _write_header(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    described = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy_format.write_array_header_1_0(file, described)


def _header_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    header = BytesIO()
    _write_header(header, shape, dtype)
    return header.tell()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folders(paths: Sequence[Path]) -> None:
    for folder in {path.absolute().parent for path in paths}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
