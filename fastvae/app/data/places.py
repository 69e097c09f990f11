"""Where data files are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from fastvae.app.user_errors import DataError

NAMES = ("digits", "mnist", "static-mnist", "freyfaces", "caltech101")


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Where data files are looked for: `data_dir`, else the environment's FASTVAE_DATA, else ./data."""
    return Path(data_dir or os.environ.get("FASTVAE_DATA") or "data").expanduser()


def is_own_file(data: str) -> bool:
    """Whether `data` is the path of an .npz file of the user's own, and not a name."""
    return data.endswith(".npz")


def own_file(data: str, data_dir: str | Path | None = None) -> Path:
    """The absolute path of an .npz file of the user's own: as it is said, or else within `data_dir`.

    Raises:
        DataError: there is no such file; the message says where it was looked for.
    """
    path = Path(data).expanduser()
    places = [path] if data_dir is None else [path, Path(data_dir).expanduser() / path]
    for place in places:
        if place.is_file():
            return place.absolute()
    looked = " and ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise DataError(
        f"{data}: there is no such file (looked for it as {looked}).\n"
        "If it has moved, say where it is with --data. A new one is saved with numpy.savez_compressed(path, "
        "x_train=images), images a uint8 [N, height, width]."
    )


def check_name(data: str, data_dir: str | Path | None = None, *, binarize: bool = False) -> None:
    """Check what can be known without reading any data.

    Raises:
        DataError: `data` is neither a name nor an .npz file that is there, or `binarize` is not for it.
    """
    if is_own_file(data):
        own_file(data, data_dir)
    elif data not in NAMES:
        raise DataError(f"data {data!r} is not known: it can be {', '.join(NAMES)}, or the path of an .npz file.")
    elif binarize:
        raise DataError(f"--binarize is for .npz files of your own; {data} comes with its own treatment.")
