"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


class FileError(OSError):
    """A file or a folder cannot be written; the message says why and what becomes of it."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears as `path` only once everything is written and on the disk.

    If the block raises, or is interrupted, whatever stood at `path` before is untouched.

    Raises:
        FileError: the file cannot be written; the message says why, for example that the disk is full.
    """
    with whole_files(path) as (file,):
        yield file


@contextmanager
def whole_files(*paths: Path, outdated: Sequence[Path] = ()) -> Iterator[list[BinaryIO]]:
    """Open binary files that belong together, as `whole_file` does one: all of them appear, in this order, or none.

    The `outdated` files, which tell of what stood there before, are deleted once the new ones are there.
    """
    # The same folder, because os.replace is atomic only within one file system.
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(part, "wb")) for part in parts]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        try:
            _replace(parts, paths, outdated)
        except KeyboardInterrupt:  # between two of these files
            _replace(parts, paths, outdated)
            raise
    except BaseException as error:
        for part in parts:
            with suppress(OSError):  # there may be none
                part.unlink()
        # torch.save turns an OSError of the file, and an interruption, into a RuntimeError of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, RuntimeError) and isinstance(reason, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(error, OSError | RuntimeError) and isinstance(reason, OSError):
            names = " and ".join(map(str, paths))
            raise FileError(
                f"{names}: cannot be written ({reason.strerror}); what was there before is kept."
            ) from error
        raise


def _replace(parts: Sequence[Path], paths: Sequence[Path], outdated: Sequence[Path]) -> None:
    """Put all that has not been put in its place yet, and delete what is outdated."""
    for part, path in zip(parts, paths, strict=True):
        if part.exists():
            os.replace(part, path)
    for path in outdated:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    with whole_file(path) as file:
        file.write(as_json(content))


def as_json(content: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
