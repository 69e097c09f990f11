"""The CUDA kernels on a CPU: see cuda_runtime.h.

What runs is everything in csrc/cuda but the device guard: host checks, launches and kernels, thread by thread.  What
it cannot show is what only a GPU has: its memory model, its timing, its exp and log.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fastvae.ops import Operators

from . import CSRC, HERE, compile_library, register

CUDA = CSRC / "cuda"


@cache
def operators() -> Operators:
    """Built once a run, which takes a C++ compiler and some seconds."""
    global _library
    sources = [*CUDA.glob("*.cu"), *CUDA.glob("*_ops.cpp"), HERE / "device.cpp"]
    flags = [f"-I{HERE}", f"-I{CUDA}", "-DFASTVAE_CUDA_LIBRARY=fastvae_emulated", "-DFASTVAE_CUDA_KEY=CPU"]
    with TemporaryDirectory() as folder:
        library = compile_library(Path(folder, "cuda.so"), sources, flags)
        found = register(library, "fastvae_emulated")
        _library = ctypes.CDLL(str(library))
    return found


def launches() -> int:
    """How many kernels were launched so far."""
    return _ask("emulated_launches")


def largest_shared() -> int:
    """The most shared memory that a block had of any launch since this was last asked, in bytes."""
    return _ask("emulated_largest_shared")


def _ask(name: str) -> int:
    operators()
    assert _library is not None
    question = getattr(_library, name)
    question.restype = ctypes.c_int64
    return int(question())


_library: ctypes.CDLL | None = None
