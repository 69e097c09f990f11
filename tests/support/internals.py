"""What the tests need of the library's inside.  All of it is here, so that a change there is a change of this file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.probe import has_isa  # noqa: F401  as PyTorch, not the code under test, sees the machine
from fastvae import autograd, backends, composite, ops, triton_kernels
from fastvae.ops import Keeping, Operators

# The operators: their schemas by name, and those of each backend by its name.

SCHEMAS = ops._SCHEMAS  # that every backend has
SCHEMAS_OF_CPU = ops._SCHEMAS_OF_CPU  # that keep exponents from forward to backward
operators: dict[str, Operators] = ops.operators
native: Operators = ops.native  # without those that keep exponents
keeping: Keeping = ops.on_cpu.keeping


def make_operators(functions: Iterable[Callable[..., Any]], of_cpu: bool = False) -> Operators:
    """In the order of SCHEMAS and, of the CPU, of SCHEMAS_OF_CPU after them."""
    functions = list(functions)
    common = len(SCHEMAS)
    return Operators(*functions[:common], keeping=Keeping(*functions[common:]) if of_cpu else None)


def functions_of(these: Operators) -> list[Callable[..., Any]]:
    """Those of SCHEMAS, in that order."""
    return [getattr(these, name) for name in SCHEMAS]


def fake(name: str) -> Callable[..., Any]:
    """What gives an operator's results their shapes."""
    return getattr(ops, f"_{name}")


def use_operators(monkeypatch: pytest.MonkeyPatch, backend: str, these: Operators) -> None:
    monkeypatch.setitem(ops.operators, backend, these)


# The choice of a backend.

choose = backends.choose
at_precision = backends.at_precision


def missing_cuda() -> str | None:
    """Why there are no CUDA kernels, or None."""
    return backends._missing_cuda()


def pretend(monkeypatch: pytest.MonkeyPatch, backend: str, missing: str | None) -> None:
    """Let a backend ("cpu", "cuda" or "triton") be missing for that reason, or be there."""
    if backend == "cpu":
        monkeypatch.setattr(backends, "_missing", missing)
    elif backend == "cuda":
        monkeypatch.setattr(backends, "_missing_cuda", lambda: missing)
    else:
        monkeypatch.setattr(triton_kernels, "missing", lambda device: missing)


def let_cuda_take_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.choose

    def choose(impl: str | None, device: torch.device) -> str:
        return "cuda" if impl == "cuda" else real(impl, device)

    monkeypatch.setattr(backends, "choose", choose)


# What backends keep and cut.


def limit_kept(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """At most so many bytes of exponents are kept from forward to backward."""
    monkeypatch.setattr(autograd, "_MOST_KEPT", nbytes)


def keeps_exponents(M: int, mu: torch.Tensor) -> bool:
    """Whether the compiled backend keeps the exponents of M rows."""
    return autograd._keeping("cpu", M, mu)


kept_numbers = ops.kept_numbers  # of a row, for K components
COMPOSITE_CHUNK = composite.CHUNK  # numbers that the composite backend holds at a time


def set_composite_chunk(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(composite, "CHUNK", numbers)


def autograd_functions() -> list[type[torch.autograd.Function]]:
    found = vars(autograd).values()
    return [f for f in found if isinstance(f, type) and issubclass(f, torch.autograd.Function)]


# Triton.


def triton_module(name: str) -> ModuleType:
    """A module of the Triton kernels."""
    return triton_kernels.load(name)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return triton_kernels.load("launch").INTERPRETED
