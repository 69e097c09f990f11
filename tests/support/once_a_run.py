"""What takes long to make is made by one process of a run of pytest: the others wait for it and read it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock  # torch depends on it

Made = TypeVar("Made")


def once_a_run(request: pytest.FixtureRequest, name: str, make: Callable[[Path], Made]) -> Made:
    """What make(folder) returns, which is called in the first process that asks for `name`.

    Args:
        make: may leave files in the folder, which is there for the whole run; what it returns is pickled.
    """
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):  # of pytest-xdist: then this folder is the worker's, within the run's
        folder = folder.parent
    files, made = folder / f"made-{name}", folder / f"made-{name}.pickle"
    with FileLock(folder / f"made-{name}.lock"):
        if not made.exists():
            files.mkdir(exist_ok=True)
            part = made.with_suffix(".part")
            part.write_bytes(pickle.dumps(make(files)))
            part.replace(made)
    return pickle.loads(made.read_bytes())
