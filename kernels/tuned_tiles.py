"""The file of tuned tiles: for each key the fastest tile, and all that were timed.

    {"format": "...", "tiles": {KEY: [{"rows": 128, ..., "milliseconds": 0.41}, ...]}}

The fastest stands first, and is the choice.  The file is written whole or not at all, and keeps what other processes
have added meanwhile.  For one key the entry that was there first stays, so that the ranks of one training agree from
their next run on.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tiles import Tile

FORMAT = "fastvae tiles 1"
Entries = dict[str, list[dict[str, Any]]]

_warned: set[str] = set()


class Timed(NamedTuple):
    """A candidate, and how long a call takes with it; None where the call failed, and why."""

    tile: Tile
    milliseconds: float | None
    failure: str = ""


def path() -> Path:
    """Where the file is.

    Raises:
        RuntimeError: no variable says so, and there is no home folder.
    """
    if named := os.environ.get("FASTVAE_CACHE_DIR"):
        return Path(named) / "tiles.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae" / "tiles.json"


def find(key: str, candidates: Sequence[Tile]) -> Tile | None:
    """The choice for a key, if there is one and it is still a candidate."""
    try:
        return _choice(_read(path()), key, candidates)
    except (OSError, RuntimeError, ValueError):
        return None  # `keep` warns of it


def keep(key: str, timed: Sequence[Timed], candidates: Sequence[Tile]) -> Tile:
    """Add what was timed, the fastest first; returns the choice for the key: another process's, if that came first."""
    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            entries = _read_or_set_aside(file)
            if (choice := _choice(entries, key, candidates)) is not None:
                return choice
            entries[key] = [_entry(one) for one in timed]
            _write(file, entries)
    except (OSError, RuntimeError) as error:
        if str(error) not in _warned:
            _warned.add(str(error))
            warnings.warn(f"the choice of tiles is kept for this process alone: {error}", stacklevel=2)
    return timed[0].tile


def _entry(timed: Timed) -> dict[str, Any]:
    entry: dict[str, Any] = timed.tile._asdict() | {"milliseconds": timed.milliseconds}
    return entry | {"failure": timed.failure} if timed.failure else entry


def _tile(entry: dict[str, Any]) -> Tile:
    return Tile(*(int(entry[name]) for name in Tile._fields))


def _choice(entries: Entries, key: str, candidates: Sequence[Tile]) -> Tile | None:
    """The first entry, unless it is no candidate, because it was written for other kernels."""
    tile = _tile(entries[key][0]) if key in entries else None
    return tile if tile in candidates else None


def _read(file: Path) -> Entries:
    """Everything in the file; nothing where there is none.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        for timed in content["tiles"].values():
            _tile(timed[0])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return content["tiles"]


def _read_or_set_aside(file: Path) -> Entries:
    try:
        return _read(file)
    except ValueError as error:
        names = (file.with_name(f"{file.name}.bad{n or ''}") for n in itertools.count())
        aside = next(name for name in names if not name.exists())
        message = f"{file} is no record of tiles ({error}); it becomes {aside}, and tiles are timed anew"
        warnings.warn(message, stacklevel=3)
        os.replace(file, aside)
        return {}


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other processes out.  Where the file system cannot, one of two that write at once loses its entry."""
    with open(file.with_name(f"{file.name}.lock"), "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, entries: Entries) -> None:
    # The same folder, because os.replace is atomic only within one file system.
    handle, part = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with open(handle, "w") as out:
            json.dump({"format": FORMAT, "tiles": dict(sorted(entries.items()))}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
