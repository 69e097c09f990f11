"""What the tests need of the library's inside.  All of it is here, so that a change there is a change of this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from fastvae import _noise, autograd, functional
from fastvae.backends import BACKENDS, choose, composite, native, registry, triton  # noqa: F401
from fastvae.benchmarks.probe import has_isa  # noqa: F401  as PyTorch, not the code under test, sees the machine
from fastvae.operators import (  # noqa: F401
    EXPONENT_SCHEMAS,
    SCHEMAS,
    ExponentOperators,
    Operators,
    define,
    exponents_per_row,
)

NAMES = [schema.name for schema in SCHEMAS]  # of the operators that every backend has
EXPONENT_NAMES = [schema.name for schema in EXPONENT_SCHEMAS]  # of those that keep exponents from forward to backward


def operators_of(backend: str) -> Operators:
    """Those that run behind a name in the registry."""
    return BACKENDS[backend].operators


def exponent_operators() -> ExponentOperators:
    """Those of the compiled kernels on the CPU."""
    operators = native.CPU.exponents
    assert operators is not None
    return operators


def use_operators(
    monkeypatch: pytest.MonkeyPatch, backend: str, operators: Operators, exponents: ExponentOperators | None = None
) -> None:
    """Put these behind a name in the registry."""
    monkeypatch.setitem(BACKENDS, backend, replace(BACKENDS[backend], operators=operators, exponents=exponents))


# The choice of a backend.


def missing_cuda() -> str | None:
    """Why there are no CUDA kernels, or None."""
    return native.missing_on_cuda(torch.device("cuda"))


def pretend(monkeypatch: pytest.MonkeyPatch, impl: str, missing: str | None) -> None:
    """Let a backend be missing for that reason, or be there, at every precision."""
    for name, backend in BACKENDS.items():
        if backend.impl == impl:
            monkeypatch.setitem(BACKENDS, name, replace(backend, missing=lambda device: missing))


def pretend_no_extension(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Let the compiled kernels be missing for that reason."""
    monkeypatch.setattr(native, "extension_missing", reason)


def take_any_device(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let a backend, by its name in the registry, take tensors on whatever device they are."""
    there = replace(BACKENDS[backend], devices=None, missing=lambda device: None)
    monkeypatch.setitem(BACKENDS, backend, there)


def note_backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every backend run on any device, as composite does, and note its name in this list whenever it runs."""
    names: list[str] = []

    def noting(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            names.append(name)
            return operator(*arguments)

        return call

    plain = BACKENDS["composite"].operators
    for name, backend in list(BACKENDS.items()):
        noted = Operators(*(noting(name, operator) for operator in plain))
        fake = replace(backend, operators=noted, exponents=None, devices=None, missing=lambda device: None)
        monkeypatch.setitem(BACKENDS, name, fake)
    return names


def cuda_not_built() -> str | None:
    """Why no CUDA kernels were compiled, or None."""
    return native.cuda_not_built()


def draw_seeds_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the seed of a call come from the CPU's generator, on whatever device its tensors are."""

    def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
        return _noise.draw_seed(torch.device("cpu"), generator).to(device)

    monkeypatch.setattr(functional, "draw_seed", draw_seed)


# What backends keep and cut.


def limit_exponents(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """At most so many bytes of exponents are kept from forward to backward."""
    monkeypatch.setattr(autograd, "MAX_EXPONENT_BYTES", nbytes)


def keeps_exponents(M: int, mu: torch.Tensor) -> bool:
    """Whether the compiled backend keeps the exponents of M rows."""
    return autograd._exponents("cpu", M, mu) is not None


COMPOSITE_CHUNK = composite.CHUNK  # numbers that the composite backend holds at a time


def composite_chunk_on(device: torch.device, itemsize: int) -> int:
    return composite.chunk_on(device, itemsize)


def set_composite_chunk(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(composite, "CHUNK", numbers)


def autograd_functions() -> list[type[torch.autograd.Function]]:
    found = vars(autograd).values()
    return [f for f in found if isinstance(f, type) and issubclass(f, torch.autograd.Function)]


# Triton.


def triton_module(name: str) -> ModuleType:
    """A module of the Triton kernels."""
    return triton.load(name)


def forget_capabilities() -> None:
    """Ask every device anew what it can do."""
    triton._too_old.cache_clear()


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return triton_module("launch").INTERPRETED
