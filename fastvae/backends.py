"""Which backends there are, what `impl=None` chooses, and what is built: :func:`info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastvae import ops, triton_kernels  # noqa: F401  the schemas, before the kernels that implement them

IMPLS = ("reference", "composite", "cpu", "triton", "cuda")
_EXTENSION = Path(__file__).parent / "_C.abi3.so"
_BUILD = (
    "build it with `pip install --no-build-isolation .` on a machine with a C++17 compiler, ninja and torch >= 2.10"
)


def _load_extension() -> str | None:
    """Load the compiled kernels; the reason why not, or None."""
    if not _EXTENSION.exists():
        return "the extension was not built"
    try:
        torch.ops.load_library(_EXTENSION)
    except OSError as error:  # built for another machine, or against a torch that this one cannot serve
        return f"the extension does not load: {error}"
    return None


_missing = _load_extension()
_BUILD_CUDA = "build fastvae again with nvcc on the PATH or CUDA_HOME set; FASTVAE_CUDA=1 fails where there is none"


def _missing_cuda() -> str | None:
    """Why there are no CUDA kernels, or None."""
    if _missing is not None:
        return _missing
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastvae::mixture_log_prob", "CUDA"):
        return "the extension was built without CUDA"
    return None


def choose(impl: str | None, device: torch.device) -> str:
    """The backend that runs: the one named, or by device where none is.

    =========  ==========================================
    device     impl=None
    =========  ==========================================
    cpu        "cpu" if the extension is built, else "composite"
    any other  "composite"
    =========  ==========================================

    "triton" has only run in Triton's interpreter and "cuda" only emulated; what was never run on a GPU is never the
    default on one.

    Raises:
        ValueError: no backend has that name, or it does not run on that device.
        RuntimeError: the backend is not built here.
    """
    if impl is None:
        return "cpu" if device.type == "cpu" and _missing is None else "composite"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))} or None, not {impl!r}")
    # a graph cannot look for packages; compiled, the operator itself raises
    compiling = torch.compiler.is_compiling()
    if impl == "triton" and not compiling and (why := triton_kernels.missing(device)) is not None:
        raise RuntimeError(f"impl='triton' cannot run: {why}; impl='composite' runs on {device}")
    if impl == "cuda":
        if not compiling and (why := _missing_cuda()) is not None:
            raise RuntimeError(f"impl='cuda' cannot run: {why}; {_BUILD_CUDA}; impl='composite' runs on {device}")
        if device.type != "cuda":
            raise ValueError(
                f"impl='cuda' takes tensors on a CUDA device, these are on {device}; move them, or use impl=None"
            )
    if impl == "cpu":
        if device.type != "cpu":
            raise ValueError(f"impl='cpu' takes tensors on the CPU, these are on {device}; move them, or use impl=None")
        if _missing is not None:
            raise RuntimeError(f"impl='cpu' cannot run: {_missing}; {_BUILD}")
    return impl


def _precision_of_torch() -> str:
    return torch.get_float32_matmul_precision()


# What torch.compiler.assume_constant_result sets, which would import the compiler along with fastvae: a graph keeps the
# setting of its first call.
_precision_of_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def at_precision(backend: str, precision: str | None, dtype: torch.dtype) -> str:
    """The operators of a backend that compute with `precision`, None being PyTorch's own setting.

    Triton alone has others than the "highest", and these for float32.
    """
    if backend != "triton" or dtype != torch.float32:
        return backend
    precision = precision or _precision_of_torch()
    return backend if precision == "highest" else f"{backend}-{precision}"


class Info(dict[str, str]):
    """What is built and what runs where; printed, a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())


def _cuda() -> str:
    if (why := _missing_cuda()) is not None:
        return f"missing: {why}; {_BUILD_CUDA}"
    return "impl='cuda' on request; it has only been emulated on a CPU, never run on a GPU"


def _triton() -> str:
    if (why := triton_kernels.missing(torch.device("cuda"))) is not None:
        return f"missing: {why}"
    version = importlib.metadata.version("triton")
    return f"impl='triton' on request, Triton {version}; it has only run in Triton's interpreter, never on a GPU"


def info() -> Info:
    """What is built, what runs where, which instruction set, and the versions."""
    from fastvae import __version__

    composite = "composite (plain PyTorch in chunks)"
    if _missing is None:
        isa = torch.ops.fastvae.cpu_isa()
        cpu = f"cpu (compiled kernels, {isa}, {torch.get_num_threads()} threads)"
    else:
        cpu = f"{composite}; the compiled kernels are missing: {_missing}; {_BUILD}"
    return Info(
        {
            "fastvae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "extension": "built" if _missing is None else "missing",
            "on cpu": cpu,
            "on other devices": f"{composite}; never run on a GPU",
            "triton": _triton(),
            "cuda": _cuda(),
            "FASTVAE_CPU_ISA": os.environ.get("FASTVAE_CPU_ISA", "not set"),
        }
    )
