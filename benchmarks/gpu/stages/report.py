"""Tables and plots of what `bench` recorded, also where it ran out of time."""

from __future__ import annotations

from ..stage import Context, Stage


def _record(context: Context) -> str:
    return str(context.out / ("cpu.json" if context.dry else "cuda.json"))


STAGE = Stage("report", order=60, seconds=10, arguments=lambda context: ["-m", "benchmarks.report", _record(context)])
