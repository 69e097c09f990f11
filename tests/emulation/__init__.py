"""The CUDA kernels' own source, compiled for the CPU and registered as operators of their own: see cuda_runtime.h.

What runs is everything in csrc/cuda but the device guard: host checks, launches and kernels, thread by thread.  What
it cannot show is what only a GPU has: its memory model, its timing, its exp and log.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastvae import ops
from fastvae.ops import Operators

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DFASTVAE_CUDA_LIBRARY=fastvae_emulated", "-DFASTVAE_CUDA_KEY=CPU"),
)


def build(folder: Path) -> Path:
    """Compile into `folder`; the library."""
    sources = [*CUDA.glob("*.cu"), *CUDA.glob("*_ops.cpp"), HERE / "device.cpp"]
    includes = [f"-I{HERE}", f"-I{CUDA}", *(f"-isystem{path}" for path in include_paths())]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run(["g++", *FLAGS, *includes, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    library = folder / "emulated.so"
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", "-shared", *objects, *paths, "-lc10", "-ltorch_cpu", "-o", library], check=True)
    return library


def load(library: Path) -> Operators:
    """The operators of a library that was built here."""
    namespace = torch.library.Library("fastvae_emulated", "DEF")
    for name, schema in ops._SCHEMAS.items():
        namespace.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastvae_emulated::{name}", getattr(ops, f"_{name}"), lib=namespace)
    torch.ops.load_library(library)
    operators = Operators(*(getattr(torch.ops.fastvae_emulated, name).default for name in Operators._fields))
    _keep.extend((namespace, ctypes.CDLL(str(library))))
    return operators


def launches() -> int:
    """How many kernels were launched so far."""
    return _ask("emulated_launches")


def largest_shared() -> int:
    """The most shared memory that a block had of any launch since this was last asked, in bytes."""
    return _ask("emulated_largest_shared")


def _ask(name: str) -> int:
    question = getattr(_keep[1], name)
    question.restype = ctypes.c_int64
    return int(question())


_keep: list[Any] = []
