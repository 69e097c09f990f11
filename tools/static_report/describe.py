"""Compile kernels and describe their machine code: the numbers of the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import torch

from fastvae.benchmarks.errors import BenchmarkError

from . import disassembly, limits
from .families import all_families, cuda_family
from .kernel import Kernel


def describe(families: Sequence[str], arches: Sequence[str], match: str = "") -> dict[str, Any]:
    """Compile and read everything.

    Args:
        families: names; none means all that can be compiled here.
        arches: "80", "90", "100".
        match: a regular expression; only kernels whose "name, case" it finds are compiled.

    Raises:
        BenchmarkError: a name is unknown, or a family that was named cannot be compiled here.
    """
    known = all_families()
    for name in families:
        if name not in known:
            raise BenchmarkError(f"--family {name}: the families are {', '.join(known)}")
        if why := known[name].missing():
            raise BenchmarkError(f"--family {name}: {why}")
    for arch in arches:
        if arch not in map(str, limits.MULTIPROCESSOR):
            raise BenchmarkError(f"--arch {arch}: should be of {', '.join(map(str, limits.MULTIPROCESSOR))}")
    chosen = [known[name] for name in families] or [f for f in known.values() if f.missing() is None]
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise BenchmarkError(f"--match {match}: not a regular expression ({error})") from None
    found = [
        {"family": family.name, **entry(kernel)}
        for arch in arches
        for family in chosen
        for kernel in family.kernels(int(arch), pattern)
    ]
    return {"versions": _versions(), "kernels": found}


def entry(kernel: Kernel) -> dict[str, Any]:
    """What the report holds of one kernel."""
    code = disassembly.read(kernel)
    bound = limits.floor(kernel.work)
    loop = code.loops[0] if code.loops else None
    return {
        "kernel": kernel.name,
        "case": kernel.case,
        "arch": kernel.arch,
        "registers": code.registers,
        "stack": code.stack,
        "local": code.local,
        "local_accesses": code.local_accesses,
        "shared": kernel.shared,
        "threads": kernel.threads,
        "blocks": limits.blocks_at_once(kernel.arch, code.registers, kernel.threads, kernel.shared),
        "tensor_cores": kernel.tensor_cores,
        "matrix": code.matrix,
        "fp32": {name: code.instructions[name] for name in ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2")},
        "fp64": {name: code.instructions[name] for name in ("DFMA", "DADD", "DMUL")},
        "exp2": code.exp2,
        "shuffles": code.instructions["SHFL"],
        "loads": {str(width): count for width, count in sorted(code.loads.items())},
        "stores": {str(width): count for width, count in sorted(code.stores.items())},
        "wide_loads": code.wide_loads,
        "memory": dict(sorted(code.memory.items())),
        "loop": {"instructions": loop.instructions, "kinds": dict(sorted(loop.kinds.items()))} if loop else None,
        "instructions": code.instructions.total(),
        "work": dict(kernel.work),
        "floor_seconds": bound[0] if bound else None,
        "bound_by": bound[1] if bound else None,
    }


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    if cuda_family.missing() is None:
        versions["nvcc"] = cuda_family.version()
    return versions
