"""The AVX-512 kernels on an x86-64 machine without AVX-512: see avx512.cpp.

What runs is all of csrc/cpu as it is on a machine that has it, but for its intrinsics, which are loops here; the
compiler does the arithmetic of wide vectors with narrow ones, and rounds alike.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fastvae.ops import Operators

from . import CSRC, HERE, compile_library, register


@cache
def operators() -> Operators:
    """Built once a run, which takes a C++ compiler and some seconds."""
    sources = [*(CSRC / "cpu").glob("*_ops.cpp"), HERE / "avx512.cpp"]
    flags = [f"-I{CSRC / 'cpu'}", "-DFASTVAE_CPU_LIBRARY=fastvae_avx512", "-Wno-psabi", "-Wno-unused-parameter"]
    with TemporaryDirectory() as folder:
        return register(compile_library(Path(folder, "avx512.so"), sources, flags), "fastvae_avx512", True)
