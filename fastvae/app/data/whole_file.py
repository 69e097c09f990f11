"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastvae.app.user_errors import FileError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears as `path` only once everything is written and on the disk.

    If the block raises, or is interrupted, whatever stood at `path` before is untouched.

    Raises:
        FileError: the file cannot be written; the message says why, for example that the disk is full.
    """
    # The same folder, because os.replace is atomic only within one file system.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            sync(file)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # torch.save turns an OSError of the file into a RuntimeError of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, OSError | RuntimeError) and isinstance(reason, OSError):
            raise FileError(
                f"{path}: cannot be written ({reason.strerror or reason}); what was there before is kept."
            ) from error
        raise


def sync(file: BinaryIO) -> None:
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    with whole_file(path) as file:
        file.write(as_json(content))


def as_json(content: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
