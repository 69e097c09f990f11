"""What the compiler on this machine makes of the kernels, maybe another version than that they were made with."""

from __future__ import annotations

from ..stage import Context, Stage


def arguments(context: Context) -> list[str]:
    # a dry run shows that it works; the whole report is a command of its own
    match = "^gaussian.kl" if context.dry else "(difference|product).*general"
    command = ["-m", "benchmarks.static_report", "--family", "triton", "--arch", "90", "--match", match]
    return [*command, "--out", str(context.out / "static.json")]


STAGE = Stage("static", order=20, seconds=40, arguments=arguments, variables=lambda context: {"TRITON_INTERPRET": None})
