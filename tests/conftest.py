"""Fixtures of the backends, a fixed seed for every test, and the tiers: see support/."""

from __future__ import annotations

import inspect
import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when it decorates the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from emulation import cuda
from support.backend import BACKENDS, require_cpu, use_backend
from support.internals import Operators, missing_cuda
from support.interpreter import hasten
from support.tiers import MARKS, marks_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the marked tests: see tests/support/tiers.py")
    parser.addoption("--slow", action="store_true", help="leave out all but the marked tests")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = {item: marks_of(item) for item in items}
    for item in items:
        for mark in marks[item]:
            item.add_marker(mark)
    for option, wanted in (("--fast", False), ("--slow", True)):
        if config.getoption(option):
            config.hook.pytest_deselected(items=[item for item in items if bool(marks[item]) != wanted])
            items[:] = [item for item in items if bool(marks[item]) == wanted]


@pytest.fixture(params=BACKENDS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that can run here; the compiled one once for each instruction set."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture(params=[name for name in BACKENDS if name.startswith("cpu")])
def cpu_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled backend, once for each instruction set."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture(params=["composite", "cpu", "triton", "triton-small"])
def each_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend once, the compiled one with the instruction set it chooses by itself."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """impl="triton" by tiles."""
    return use_backend("triton", monkeypatch)


@pytest.fixture
def small_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """impl="triton" in one launch, where a problem is small."""
    return use_backend("triton-small", monkeypatch)


@pytest.fixture(params=["cuda-emulated", "cuda-emulated-tiled"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Operators | None:
    """The CUDA kernels on the CPU, also behind impl="cuda": those for small problems where one is small, or never."""
    return _emulated(request, request.param, monkeypatch)


@pytest.fixture
def emulated_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Operators | None:
    return _emulated(request, "cuda-emulated", monkeypatch)


@pytest.fixture
def emulated_tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Operators | None:
    return _emulated(request, "cuda-emulated-tiled", monkeypatch)


def _emulated(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> Operators | None:
    """The emulated operators; None where a GPU runs the real ones and the test takes no operators by name.

    A test that does is about the emulation, which other machines run: there is no need to build it beside a GPU.
    """
    use_backend(name, monkeypatch)
    if missing_cuda() is not None:
        return cuda.operators()
    if request.fixturename in inspect.signature(request.function).parameters:
        pytest.skip("about the emulation; here is a GPU")
    return None


@pytest.fixture
def compiled() -> None:
    """The compiled kernels, or the test does not apply."""
    require_cpu()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fast_interpreter(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("triton"):
        hasten()
