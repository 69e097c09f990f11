"""The limits of the machine, measured beside the contenders: multiply-adds and copied bytes a second.

`probe.cpp` is compiled by the system's compiler as it is needed; without one the limits are unknown.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("probe.cpp")
MARCH = {"native": "native", "baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
_ITERATIONS = 4_000_000  # 12 chains of them: some 10 ms
_COPIED = 128 << 20  # bytes; several times any cache that two threads have to themselves


def has_isa(isa: str) -> bool:
    """Whether this machine runs the instructions of that set, as PyTorch sees it."""
    capability = torch.backends.cpu.get_cpu_capability()
    level = 2 if capability.startswith("AVX512") else 1 if capability == "AVX2" else 0
    return {"native": 0, "baseline": 0, "avx2": 1, "avx512": 2}[isa] <= level


def multiply_add_meter(isa: str = "native", dtype: torch.dtype = torch.float32) -> Callable[[], float] | None:
    """A probe of floating-point operations a second on all of torch's threads; None where it cannot be built or run."""
    library = _library(isa) if has_isa(isa) else None
    if library is None:
        return None
    function = library.multiply_add_rate_f32 if dtype == torch.float32 else library.multiply_add_rate_f64
    return _with_the_cores_to_itself(lambda: float(function(torch.get_num_threads(), _ITERATIONS)))


def _with_the_cores_to_itself(probe: Callable[[], float]) -> Callable[[], float]:
    """The probe's second run: beside the first PyTorch's threads may still spin, milliseconds after their last work."""

    def rate() -> float:
        probe()
        return probe()

    return rate


def copy_meter() -> Callable[[], float] | None:
    """A probe of bytes read and written a second on all of torch's threads; None where it does not compile."""
    library = _library("native")
    if library is None:
        return None
    source, target = _copy_buffers()

    def rate() -> float:
        return float(library.copy_rate(torch.get_num_threads(), source.numel(), target.data_ptr(), source.data_ptr()))

    return _with_the_cores_to_itself(rate)


@cache
def _copy_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(_COPIED, dtype=torch.uint8), torch.zeros(_COPIED, dtype=torch.uint8)


@cache
def _library(isa: str) -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or (isa != "native" and platform.machine() not in ("x86_64", "AMD64")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        # generic: GCC splits chains of multiply-adds where it tunes for some of AMD's cores
        flags = [
            "-O3",
            f"-march={MARCH[isa]}",
            "-mtune=generic",
            "-ffp-contract=fast",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-pthread",
        ]
        made = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built)], capture_output=True)
        if made.returncode != 0:
            return None
        library = ctypes.CDLL(str(built))  # stays loaded when the file is gone
    for name in ("multiply_add_rate_f32", "multiply_add_rate_f64"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_int64]
    library.copy_rate.restype = ctypes.c_double
    library.copy_rate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return library
