"""Arrays that are written row by row, survive a kill, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from fastvae._files import FileError, whole_file
from fastvae.app.user_errors import RunError

Rows = tuple[int, int]  # start, stop


class ResumableArrays:
    """Files .npy of the same number of rows, filled block by block by one process or several.

    Beside the first file stands a journal: a line with what the job is, then a line "start stop" for each finished
    block of rows.  A block is on the disk before its line is; a line that was cut off does not count.  Each further
    process has a journal of its own, without the first line.  At the end the files are renamed to what they are to be
    called, and then the journal is removed.

    Args:
        paths, shapes, dtype: of the files.
        rank: the process, of those that fill the files; the first one alone opens and finishes the job.
    """

    def __init__(self, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]], dtype: str, rank: int = 0) -> None:
        self._paths, self._shapes, self._dtype = list(paths), list(shapes), np.dtype(dtype)
        # Another job may write a second file of the same name, so that its part is named after the first file too.
        first = hashlib.blake2b(str(paths[0].resolve()).encode(), digest_size=4).hexdigest()
        names = [f".{path.name}.{first}.part" if index else f".{path.name}.part" for index, path in enumerate(paths)]
        self._parts = [path.with_name(name) for path, name in zip(paths, names, strict=True)]
        self._journal = paths[0].with_name(f".{paths[0].name}.journal")
        self._rank, self._files = rank, ExitStack()
        self._opened: list[Any] = []  # the parts, and this process's journal
        self.rows = shapes[0][0]
        self.finished: list[Rows] = []  # by this process and those before it, sorted, none beside the other

    @property
    def finished_rows(self) -> int:
        return sum(stop - start for start, stop in self.finished)

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
        begun = None if overwrite else self._read_journals()
        if begun is not None:
            earlier, finished = begun
            names = [name for name in {**earlier, **job} if earlier.get(name) != job.get(name)]
            if names:
                told = "; ".join(f"{n}: {earlier.get(n, 'none')} then, {job.get(n, 'none')} now" for n in names)
                raise RunError(
                    f"{self._paths[0]}: an unfinished job is here that differs ({told}). Give what it was given, or "
                    "say --overwrite to begin anew, or name another --out."
                )
            complete = finished == _merged([(0, self.rows)])
            if all(part.exists() or (complete and path.exists()) for part, path in self._pairs()):
                self._write_journal(job, finished)
                return
        self._begin(job)

    def join(self, finished: Sequence[Rows]) -> None:
        """Take part in a job that is open.

        The files are kept open: if the job is begun anew elsewhere, by files that are new, what this process still
        writes does not get into these.

        Args:
            finished: the rows that are done.
        """
        self.finished = list(finished)
        try:
            own = self._journal if self._rank == 0 else self._journal.with_name(f"{self._journal.name}.{self._rank}")
            parts = self._parts if self.unfinished() else []  # some may be in their places, put there before a kill
            for path, mode in [*((part, "r+b") for part in parts), (own, "ab")]:
                self._opened.append(self._files.enter_context(open(path, mode)))  # noqa: SIM115  see close
        except OSError as error:
            raise FileError(f"{self._paths[0]}: cannot be written ({error.strerror}).") from error

    def unfinished(self) -> list[Rows]:
        """The rows that are not done, sorted."""
        edges = [0, *(edge for rows in self.finished for edge in rows), self.rows]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def write(self, start: int, blocks: Sequence[np.ndarray]) -> None:
        """Put the rows from `start` on into all files, and then into the journal that they are there."""
        *parts, journal = self._opened
        try:
            for file, shape, block in zip(parts, self._shapes, blocks, strict=True):
                row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize
                file.seek(_header_size(shape, self._dtype) + start * row_bytes)
                file.write(np.ascontiguousarray(block, self._dtype).data)
                _sync(file)
            done = start, start + len(blocks[0])
            journal.write(_line(done))
            _sync(journal)
        except OSError as error:
            raise FileError(f"{self._paths[0]}: cannot be written ({error.strerror}).") from error
        self.finished = _merged([*self.finished, done])

    def finish(self) -> None:
        """Put the files in their places, once all processes have done their rows; what stood there is replaced."""
        self.close()
        begun = self._read_journals()
        if begun is None or begun[1] != _merged([(0, self.rows)]):
            raise RunError(f"{self._journal}: does not have all rows. The same command goes on from here.")
        self._write_journal(*begun)
        for part, path in self._pairs():
            if part.exists():  # else it was put there before a kill
                os.replace(part, path)
        _sync_folders(self._paths)
        self._journal.unlink()

    def discard(self) -> None:
        """Remove all that was begun; the results of earlier jobs stay."""
        self.close()
        for path in (self._journal, *self._other_journals(), *self._parts):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._files.close()
        self._opened = []

    def _pairs(self) -> list[tuple[Path, Path]]:
        return list(zip(self._parts, self._paths, strict=True))

    def _other_journals(self) -> list[Path]:
        """Those of the processes but the first."""
        begin = f"{self._journal.name}."
        found = (path for path in self._journal.absolute().parent.iterdir() if path.name.startswith(begin))
        return [path for path in found if path.name.removeprefix(begin).isdecimal()]

    def _read_journals(self) -> tuple[dict[str, Any], list[Rows]] | None:
        """(the job, the rows that are finished); None where there is no journal, or not even its first line."""
        path = self._journal
        try:
            lines = path.read_bytes().split(b"\n")[:-1]  # the last has no end: cut off, or empty
            if not lines:
                return None
            job = json.loads(lines.pop(0))
            if not isinstance(job, dict):
                raise ValueError
            finished = [self._rows_of(line) for line in lines]
            for path in self._other_journals():
                finished += [self._rows_of(line) for line in path.read_bytes().split(b"\n")[:-1]]
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(f"{path}: is damaged. Say --overwrite to begin anew.") from error
        return job, _merged(finished)

    def _rows_of(self, line: bytes) -> Rows:
        start, stop = map(int, line.split())
        if not 0 <= start <= stop <= self.rows:
            raise ValueError
        return start, stop

    def _write_journal(self, job: Mapping[str, str], finished: list[Rows]) -> None:
        """One journal in the place of all."""
        with whole_file(self._journal) as file:
            file.write(json.dumps(dict(job)).encode() + b"\n" + b"".join(map(_line, finished)))
        for path in self._other_journals():
            path.unlink()
        self.finished = finished

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
            self._write_journal(job, [])
            _sync_folders(self._paths)
        except OSError as error:
            self.discard()
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self._paths[0]}: cannot be written ({error.strerror}).") from error


def _merged(rows: Sequence[Rows]) -> list[Rows]:
    """Sorted, and those that touch or overlap as one; without empty ones."""
    merged: list[Rows] = []
    for start, stop in sorted(rows):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return merged


def _line(rows: Rows) -> bytes:
    return f"{rows[0]} {rows[1]}\n".encode()


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
