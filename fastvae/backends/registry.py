"""Every backend there is, and which of them a call takes."""

from __future__ import annotations

import torch

from fastvae import _torch_compat
from fastvae.backends import composite, native, triton
from fastvae.backends.backend import Backend

# In the order in which impl=None looks through them.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (native.CPU, *native.CUDA, *triton.TRITON, composite.COMPOSITE)
}
IMPLS = ("reference", *dict.fromkeys(backend.impl for backend in BACKENDS.values()))
PRECISIONS = ("highest", "high", "medium")


@_torch_compat.constant_in_graphs
def _precision_of_torch() -> str:
    return torch.get_float32_matmul_precision()


def choose(
    impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32, precision: str | None = "highest"
) -> str:
    """As :func:`fastvae.backends.choose`, which also asks `use_backend`."""
    if impl == "reference":
        return impl
    if dtype != torch.float32:
        precision = "highest"
    if impl is None:
        impl = _default(device, precision or "highest")
    else:
        _check(impl, device)
    if precision == "highest":
        return impl
    named = f"{impl}-{precision or _precision_of_torch()}"
    return named if named in BACKENDS else impl


def _default(device: torch.device, precision: str) -> str:
    first = None
    for backend in BACKENDS.values():
        if not backend.is_default_on(device) or backend.missing(device) is not None:
            continue
        if backend.precision == precision:
            return backend.impl
        first = first or backend.impl
    assert first is not None, "composite runs on every device"
    return first


def check_name(argument: str, value: str | None, names: tuple[str, ...]) -> None:
    """ValueError for what is neither one of the names nor None."""
    if value is not None and value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))} or None, not {value!r}")


def _check(impl: str, device: torch.device) -> None:
    check_name("impl", impl, IMPLS)
    backend = BACKENDS[impl]
    if (why := backend.missing(device)) is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {why}; impl='composite' runs on {device}")
    if backend.devices is not None and device.type not in backend.devices:
        raise ValueError(
            f"impl={impl!r} takes tensors on {' or '.join(backend.devices)}, these are on {device}; move them, or use "
            "impl=None"
        )
