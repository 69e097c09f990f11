"""The figures of `targets.py`: ceilings, the density in every precision, the sampler, memory, a CUDA graph."""

from __future__ import annotations

from ..stage import Context, Stage


def arguments(context: Context) -> list[str]:
    return ["-m", "benchmarks.gpu.measure", "--out", str(context.out), *(["--dry-run"] if context.dry else [])]


def variables(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


STAGE = Stage("measure", order=40, seconds=80, arguments=arguments, variables=variables)
