"""The CUDA kernels on small shapes under compute-sanitizer: accesses out of bounds, and races."""

from __future__ import annotations

import shutil

from ..stage import Context, Stage


def arguments(context: Context) -> list[str]:
    return ["-m", "benchmarks.gpu.sanitize"]


def why_not(context: Context) -> str | None:
    if context.dry:
        return "a dry run has no GPU"
    return (
        None if shutil.which("compute-sanitizer") else "compute-sanitizer is not there; it comes with the CUDA toolkit"
    )


STAGE = Stage("sanitize", order=55, seconds=40, arguments=arguments, why_not=why_not)
