"""The AVX-512 kernels on an x86-64 machine without AVX-512: see avx512.cpp.

What runs is all of csrc/cpu as it is on a machine that has it, but for its intrinsics, which are loops here; the
compiler does the arithmetic of wide vectors with narrow ones, and rounds alike.
"""

from __future__ import annotations

from support.internals import EXPONENT_SCHEMAS, SCHEMAS, ExponentOperators, Operators, define

from .library import CSRC, HERE, library, once, register


@once
def operators() -> tuple[Operators, ExponentOperators]:
    sources = [*(CSRC / "cpu").glob("*_ops.cpp"), HERE / "avx512.cpp"]
    # -O0: what optimising saves the tests is less than it takes
    flags = ["-O0", "-DFASTVAE_CPU_LIBRARY=fastvae_avx512", "-Wno-psabi", "-Wno-unused-parameter"]
    built = library("avx512", sources, [CSRC / "cpu"], flags)
    namespace = register(built, "fastvae_avx512")
    return Operators(*define("", SCHEMAS, namespace)), ExponentOperators(*define("", EXPONENT_SCHEMAS, namespace))
