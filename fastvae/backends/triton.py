"""The Triton kernels of `kernels/`: where they are, whether they can run, and their operators at each precision.

The kernels are imported at the first call, so that `import fastvae` does not need Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastvae import _torch_compat
from fastvae.backends import from_parts
from fastvae.backends.backend import Backend
from fastvae.operators import SCHEMAS, Operators, define, library

MIN_CAPABILITY = 8, 0


def load(module: str) -> ModuleType:
    """A module of the kernels."""
    return importlib.import_module(f"fastvae.kernels.{module}")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@_torch_compat.constant_in_graphs
def missing(device: torch.device) -> str | None:
    """Why they cannot run on a device, and what would make them; or None."""
    if not _installed():
        return "Triton is not installed (`pip install triton`)"
    if device.type == "cpu" and not load("launch").INTERPRETED:
        return (
            "on the CPU they run only in Triton's interpreter, which is slow and for tests: set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    if device.type == "cuda":
        return _torch_compat.no_cuda_device() or _too_old(_torch_compat.index_of(device))
    return None


@cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= MIN_CAPABILITY:
        return None
    needed = ".".join(map(str, MIN_CAPABILITY))
    return f"they are made for GPUs of compute capability {needed} and newer, and cuda:{index} has {major}.{minor}"


def _launcher(module: str, name: str, *leading: Any) -> Callable[..., Any]:
    """A function of the kernels, imported at its first call, with its leading arguments."""

    def call(*arguments: Any) -> Any:
        return getattr(load(module), name)(*leading, *arguments)

    return call


def _implement(prefix: str, name: str, launcher: Callable[..., Any]) -> None:
    library.impl(prefix + name, launcher, "CompositeExplicitAutograd")


_GAUSSIAN = [schema for schema in SCHEMAS if schema.name.startswith("gaussian")]
_MIXTURE = [schema for schema in SCHEMAS if schema.name.startswith("mixture")]
_gaussian = {schema.name: handle for schema, handle in zip(_GAUSSIAN, define("triton_", _GAUSSIAN), strict=True)}
for _name in _gaussian:
    _implement("triton_", _name, _launcher("gaussian", _name))


def _backend(precision: str) -> Backend:
    """The backend at a precision; the sampler and the KL in closed form have one for all."""
    prefix = "triton_" if precision == "highest" else f"triton_{precision}_"
    mixture = {schema.name: handle for schema, handle in zip(_MIXTURE, define(prefix, _MIXTURE), strict=True)}
    operators = Operators(**_gaussian, **mixture)
    whole = from_parts.implementations(operators)
    for name in mixture:
        if name in whole:
            _implement(prefix, name, _launcher("mixture_kl", name, whole[name]))
        else:
            _implement(prefix, name, _launcher("mixture", name, precision))
    return Backend(
        impl="triton",
        devices=("cuda", "cpu"),
        missing=missing,
        operators=operators,
        precision=precision,
        default_on=("cuda",),
        measured_in=("gpu-h100", "gpu-h200"),
        score_in_forward=True,
        about="Triton kernels",
    )


TRITON = tuple(map(_backend, ("highest", "high", "medium")))
