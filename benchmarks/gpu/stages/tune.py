"""Which tiles are the fastest for the target shapes: every candidate's time, in tune.json."""

from __future__ import annotations

from ..stage import Context, Stage


def arguments(context: Context) -> list[str]:
    return ["-m", "benchmarks.gpu.tune", "--out", str(context.out), *(["--dry-run"] if context.dry else [])]


def variables(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


STAGE = Stage("tune", order=45, seconds=75, arguments=arguments, variables=variables)
