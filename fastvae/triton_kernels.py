"""Where the Triton kernels are, and whether they can run; they are imported only when they are to."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# fastvae.kernels where fastvae is installed; in a checkout that only stands on the path, kernels.
_PACKAGE = "fastvae.kernels" if importlib.util.find_spec("fastvae.kernels") else "kernels"


def load(module: str) -> ModuleType:
    """A module of the kernels."""
    return importlib.import_module(f"{_PACKAGE}.{module}")


def launcher(module: str, name: str, *leading: Any) -> Callable[..., Any]:
    """A function of the kernels, imported at its first call, with its leading arguments."""

    def call(*arguments: Any) -> Any:
        return getattr(load(module), name)(*leading, *arguments)

    return call


def missing(device: torch.device) -> str | None:
    """Why they cannot run on a device, and what would make them; or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"they do not run on {device}, but on CUDA devices"
    if load("launch").INTERPRETED:
        return None
    return (
        "on the CPU they run only in Triton's interpreter, which is slow and for tests: set TRITON_INTERPRET=1 before "
        "Python starts"
    )
