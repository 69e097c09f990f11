"""Kernels' own source, compiled for a machine that cannot run them and registered as operators of their own.

`cuda`: the CUDA kernels on a CPU.  `avx512`: the AVX-512 kernels on a CPU without AVX-512.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastvae import ops
from fastvae.ops import Operators

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


def compile_library(library: Path, sources: Iterable[Path], flags: Sequence[str]) -> Path:
    """Compile the sources, as C++ whatever their names, into `library`; its path."""
    includes = [f"-isystem{path}" for path in include_paths()]
    objects = []
    for source in sources:
        objects.append(library.with_name(f"{library.stem}-{source.stem}.o"))
        subprocess.run(["g++", *FLAGS, *flags, *includes, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", "-shared", *objects, *paths, "-lc10", "-ltorch_cpu", "-o", library], check=True)
    return library


def register(library: Path, namespace: str) -> Operators:
    """The operators that a library implements, under a namespace of their own."""
    definitions = torch.library.Library(namespace, "DEF")
    for name, schema in ops._SCHEMAS.items():
        definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", getattr(ops, f"_{name}"), lib=definitions)
    torch.ops.load_library(library)
    _keep.append(definitions)
    return Operators(*(getattr(getattr(torch.ops, namespace), name).default for name in Operators._fields))


_keep: list[torch.library.Library] = []
