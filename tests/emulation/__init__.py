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
from fastvae.ops import Keeping, Operators

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


def register(library: Path, namespace: str, of_cpu: bool = False) -> Operators:
    """The operators that a library implements, those of the CPU alone too or not, under a namespace of their own."""
    definitions = torch.library.Library(namespace, "DEF")
    schemas = ops._SCHEMAS | ops._SCHEMAS_OF_CPU if of_cpu else ops._SCHEMAS
    for name, schema in schemas.items():
        definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", getattr(ops, f"_{name}"), lib=definitions)
    torch.ops.load_library(library)
    _keep.append(definitions)
    operators = [getattr(getattr(torch.ops, namespace), name).default for name in schemas]
    common = len(ops._SCHEMAS)
    return Operators(*operators[:common], keeping=Keeping(*operators[common:]) if of_cpu else None)


_keep: list[torch.library.Library] = []
