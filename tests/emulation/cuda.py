"""The CUDA kernels on a CPU: see cuda_runtime.h.

What runs is everything in csrc/cuda but the device guard and usable.cu, which asks the driver: host checks, launches
and kernels, thread by thread.  What it cannot show is what only a GPU has: its memory model, its timing, its exp and
log.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from support.internals import SCHEMAS, Operators, define

from .library import CSRC, HERE, library, once, register

CUDA = CSRC / "cuda"


def _library() -> Path:
    kernels = (file for file in CUDA.glob("*.cu") if file.name != "usable.cu")  # which asks a driver
    sources = [*kernels, *CUDA.glob("*_ops.cpp"), HERE / "device.cpp"]
    # not fortified: that takes a jump to another stack for a mistake
    flags = ["-DFASTVAE_CUDA_LIBRARY=fastvae_emulated", "-DFASTVAE_CUDA_KEY=CPU", "-U_FORTIFY_SOURCE"]
    return library("cuda", sources, [HERE, CUDA], flags)


@once
def _loaded() -> tuple[dict[str, Operators], ctypes.CDLL]:
    built = _library()
    definitions = register(built, "fastvae_emulated")
    operators = {"cuda": Operators(*define("", SCHEMAS, definitions))}
    mixture = [schema for schema in SCHEMAS if schema.name.startswith("mixture")]
    for precision in ("high", "medium"):
        handles = define(f"cuda_{precision}_", mixture, definitions)
        of_precision = {schema.name: handle for schema, handle in zip(mixture, handles, strict=True)}
        operators[f"cuda-{precision}"] = operators["cuda"]._replace(**of_precision)
    return operators, ctypes.CDLL(str(built))


def operators(backend: str = "cuda") -> Operators:
    """Those of a backend in the registry: "cuda", "cuda-high" or "cuda-medium"."""
    return of_backends()[backend]


def of_backends() -> dict[str, Operators]:
    """The operators of each."""
    return _loaded()[0]


def launches() -> int:
    """How many kernels were launched so far."""
    return _ask("emulated_launches")


def largest_shared() -> int:
    """The most shared memory that a block had of any launch since this was last asked, in bytes."""
    return _ask("emulated_largest_shared")


def matrix_bank_conflicts() -> int:
    """How many times 128 bytes of shared memory were read so far in addition to once for each matrix loaded."""
    return _ask("emulated_matrix_bank_conflicts")


def _ask(name: str) -> int:
    question = getattr(_loaded()[1], name)
    question.restype = ctypes.c_int64
    return int(question())
