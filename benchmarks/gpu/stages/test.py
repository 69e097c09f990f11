"""The shared tests on the GPU, and those that only a GPU can run; in a dry run a few of them, interpreted."""

from __future__ import annotations

import importlib.util

from ..stage import Context, Stage

# There a kernel is called with tensors that are on the device; opcheck's own are on the CPU.
ON_A_GPU = [
    "tests",
    "-k",
    "((triton or cuda-emulated) and not opcheck and not static_report) or gpu",
    "--ignore=tests/bench",
]
DRY = ["tests/backends/test_gpu.py", "tests/backends/test_triton.py", "-k", "gpu or precision_follows or stream"]


def arguments(context: Context) -> list[str]:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(DRY if context.dry else ON_A_GPU)]
    # most of the time goes into compiling a kernel for each kind of call
    return [*command, "-n", "8"] if importlib.util.find_spec("xdist") and not context.dry else command


def variables(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


STAGE = Stage("test", order=30, seconds=90, arguments=arguments, variables=variables)
