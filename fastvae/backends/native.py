"""The compiled kernels of `csrc/`, for the CPU and for CUDA devices: one extension, one set of operators.

The dispatcher of PyTorch takes the kernel by the device of the tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastvae import _torch_compat
from fastvae.backends import from_parts
from fastvae.backends.backend import Backend
from fastvae.operators import EXPONENT_SCHEMAS, SCHEMAS, ExponentOperators, Operators, define, library

_EXTENSION = Path(__file__).parent.parent / "_C.abi3.so"
_BUILD = (
    "build it with `pip install --no-build-isolation .` on a machine with a C++17 compiler, ninja and torch >= 2.10"
)
_BUILD_CUDA = "build fastvae again with nvcc on the PATH or CUDA_HOME set; FASTVAE_CUDA=1 fails where there is none"

operators = Operators(*define("", SCHEMAS))
from_parts.register(library, "", operators)


def _on_tensor_cores(precision: str) -> Operators:
    """Those of the CUDA kernels at a lower precision; the sampler and the KL in closed form have one for all."""
    prefix, mixture = f"cuda_{precision}_", [schema for schema in SCHEMAS if schema.name.startswith("mixture")]
    handles = {schema.name: handle for schema, handle in zip(mixture, define(prefix, mixture), strict=True)}
    of_precision = operators._replace(**handles)
    from_parts.register(library, prefix, of_precision)
    return of_precision


_on_cuda = {"highest": operators} | {precision: _on_tensor_cores(precision) for precision in ("high", "medium")}


def _load_extension() -> str | None:
    """Load the compiled kernels; the reason why not, or None."""
    if not _EXTENSION.exists():
        return "the extension was not built"
    try:
        torch.ops.load_library(_EXTENSION)
    except OSError as error:  # built for another machine, or against a torch that this one cannot serve
        return f"the extension does not load: {error}"
    return None


extension_missing = _load_extension()


@_torch_compat.constant_in_graphs
def missing_on_cpu(device: torch.device) -> str | None:
    """Why the CPU kernels cannot run, and what would make them; or None."""
    return None if extension_missing is None else f"{extension_missing}; {_BUILD}"


@_torch_compat.constant_in_graphs
def missing_on_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a device, and what would make them; or None."""
    if _torch_compat.forked_from_cuda():
        return "this process was forked from one that had used CUDA; start it by the 'spawn' method instead"
    return cuda_not_built() or _torch_compat.no_cuda_device() or _unusable_on(_torch_compat.index_of(device))


def cuda_not_built() -> str | None:
    """Why there are no CUDA kernels, and what would make them; or None."""
    if extension_missing is not None:
        return f"{extension_missing}; {_BUILD_CUDA}"
    if not _torch_compat.has_kernel("fastvae::mixture_log_prob", "CUDA"):
        return f"the extension was built without CUDA; {_BUILD_CUDA}"
    return None


_usable: set[int] = set()  # devices; of others it is asked at every call, since a reason may pass, such as no memory


def _unusable_on(index: int) -> str | None:
    """Why the kernels that were built do not run on a CUDA device: its driver or the device may be too old; or None."""
    if index in _usable:
        return None
    if why := torch.ops.fastvae.cuda_unusable(index):
        return f"they do not run on cuda:{index} ({why}); {_BUILD_CUDA}"
    _usable.add(index)
    return None


CPU = Backend(
    impl="cpu",
    devices=("cpu",),
    missing=missing_on_cpu,
    operators=operators,
    default_on=("cpu",),
    measured_in=("cpu.json", "avx2/cpu.json"),
    exponents=ExponentOperators(*define("", EXPONENT_SCHEMAS)),
    about="compiled kernels",
)
CUDA = tuple(
    Backend(
        impl="cuda",
        devices=("cuda",),
        missing=missing_on_cuda,
        operators=of_precision,
        precision=precision,
        default_on=("cuda",),
        measured_in=("gpu-h100", "gpu-h200") if precision == "highest" else (),
        score_in_forward=True,
        about="compiled CUDA kernels",
    )
    for precision, of_precision in _on_cuda.items()
)
