"""`fastvae bench` with the Triton and CUDA kernels beside the peers."""

from __future__ import annotations

from ..stage import Context, Stage

OURS = [f"fastvae-triton-{precision}" for precision in ("highest", "high", "medium")]
PEERS = [*OURS, "fastvae-cuda", "eager", "expansion", "expansion-compile", "expansion-tf32", "keops", "flash-gmm"]
SHAPES = [(4096, 50_000, 64), (100, 500, 40)]


def arguments(context: Context) -> list[str]:
    command = ["-m", "fastvae.app.cli", "bench", "mixture", "gaussian", "--overwrite", "--out", str(context.out)]
    if context.dry:
        return [*command, "--quick", "--device", "cpu", "--shapes", "16,40,8", "--peers", f"{OURS[0]},eager,expansion"]
    shapes = [part for shape in SHAPES for part in ("--shapes", ",".join(map(str, shape)))]
    return [*command, "--device", "cuda", *shapes, "--peers", ",".join(PEERS)]


def variables(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


STAGE = Stage("bench", order=50, seconds=70, arguments=arguments, variables=variables)
