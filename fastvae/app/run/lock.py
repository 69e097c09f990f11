"""A folder that one process at a time may write to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fastvae._files import FileError
from fastvae.app.user_errors import RunError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process alone; make it first, and remove it afterwards if nothing was put into it.

    The operating system holds the lock, and gives it up when the process ends, however it ends.

    Raises:
        RunError: another process has the folder; the message names it.
        FileError: the folder cannot be made or written to.
    """
    lock, holder, made = FileLock(folder / ".lock", blocking=False), folder / ".lock-holder", []
    try:
        made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder}: is in use by {_read(holder)}. Wait until that is done, or take another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        _remove_empty(made)
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{folder}: cannot be made or written to ({reason}); name another folder.") from error
    try:
        # Not in the lock's own file, which some systems let nobody else read.
        holder.write_text(f"process {os.getpid()} on {platform.node() or 'this machine'}")
        for kind in ("json", "pt"):
            for part in folder.glob(f".*.{kind}.*.part"):
                part.unlink()  # what a killed process had not finished writing
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
            if {path.name for path in folder.iterdir()} == {".lock"}:
                (folder / ".lock").unlink()
        lock.release()
        _remove_empty(made)


def _read(holder: Path) -> str:
    try:
        return holder.read_text() or "another process"
    except OSError:  # it has only just begun, or is about to end
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
