"""Compiles an emulation once for each state of its sources, and registers its operators.

Libraries are kept in build/emulation of the checkout, which `make clean` removes, under a hash of all that goes into
them.  Of processes that want one at the same time one compiles it and the others wait.  One that does not compile fails
with the compiler's words where it was tried, and for the rest of the run without trying again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock  # torch depends on it
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
# -O1: with -O2 CUDA's code runs as fast, since most of the time goes into changing threads.
FLAGS = (
    *("-std=c++17", "-O1", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


class CompileError(Exception):
    """The compiler's words; or, after the first time, where to find them."""


def library(name: str, sources: Iterable[Path], include: Sequence[Path], flags: Sequence[str]) -> Path:
    """The compiled library: kept from before if nothing has changed since.

    Raises:
        CompileError: now, or before in the same run.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = sorted(sources)
    headers = (path for folder in (*include, CSRC / "common") for path in sorted(folder.rglob("*.*h")))
    key = _key([*sources, *headers], flags)
    built, failure = BUILD / f"{name}-{key}.so", BUILD / f"{name}-{key}.log"
    with FileLock(BUILD / f"{name}.lock"):
        if built.exists():
            return built
        if failure.exists() and failure.read_text().splitlines()[:1] == [_run()]:
            raise CompileError(f"{name} does not compile, see {failure}")
        for old in BUILD.glob(f"{name}-*"):
            old.unlink()
        try:
            _compile(built, sources, [*FLAGS, *(f"-I{folder}" for folder in include), *flags])
        except subprocess.CalledProcessError as error:
            failure.write_text(f"{_run()}\n{error.stderr}")
            raise CompileError(f"{name} does not compile:\n{error.stderr}") from None
    return built


def _run() -> str:
    """This run of pytest, the same in all of its processes."""
    return os.environ.get("PYTEST_XDIST_TESTRUNUID") or f"process {os.getpid()}"


def _key(files: Iterable[Path], flags: Sequence[str]) -> str:
    """Changes with anything that goes into the library."""
    compiler = subprocess.run(["g++", "-v", "-march=native", "-E", "-x", "c++", "/dev/null"], capture_output=True)
    digest = hashlib.sha256(repr((FLAGS, flags, torch.__version__, torch.__file__)).encode() + compiler.stderr)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(built: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """All sources at the same time, as C++ whatever their names; `built` appears whole."""
    with TemporaryDirectory(dir=built.parent) as folder:

        def compiled(source: Path) -> str:
            target = str(Path(folder, f"{source.name}.o"))
            _call("g++", *flags, *(f"-isystem{p}" for p in include_paths()), "-x", "c++", "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compiled, sources))
        whole = Path(folder, built.name)
        _call("g++", "-shared", *objects, *(f"-L{p}" for p in library_paths()), "-lc10", "-ltorch_cpu", "-o", whole)
        whole.replace(built)


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def register(path: Path, namespace: str) -> torch.library.Library:
    """Load a library that implements operators under a namespace of its own; where to define these."""
    definitions = torch.library.Library(namespace, "DEF")
    _keep.append(definitions)
    torch.ops.load_library(path)
    return definitions


_keep: list[torch.library.Library] = []


def once(build: Callable[[], Any]) -> Callable[[], Any]:
    """Like functools.cache, but an exception is kept as well."""
    outcome: list[Any] = []

    def call() -> Any:
        if not outcome:
            try:
                outcome.append(build())
            except CompileError as error:
                outcome.append(CompileError(str(error).splitlines()[0]))
                raise
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    return call
