"""The source archive, which the tests of what is shipped look at and build wheels from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .once_a_run import once_a_run

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, folder: Path, **variables: str) -> str:
    """What Python prints when called with a command line, in `folder` and away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_archive(request: pytest.FixtureRequest) -> Path:
    """The archive, built once a run: two builds at once would remove each other's files in the checkout."""

    def build(folder: Path) -> Path:
        call("-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT, folder=folder)
        (archive,) = folder.glob("fastvae_kernels-*.tar.gz")
        return archive

    return once_a_run(request, "source-archive", build)
