"""Which backends the tests run on, and a fixed seed for every test."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when it decorates the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from emulation import avx512, cuda
from fast_interpreter import patch_once
from on_gpu import through_gpu

import fastvae
from fastvae import backends, ops, triton_kernels
from fastvae.benchmarks.probe import has_isa

ISAS = ("baseline", "avx2", "avx512")
_GPU_BACKENDS = ("triton", "triton-small", "cuda-emulated", "cuda-emulated-tiled")  # each by tiles, or in one launch
BACKENDS = ("composite", *(f"cpu-{isa}" for isa in ISAS), *_GPU_BACKENDS)


def require_cpu() -> None:
    """Skip without the compiled kernels, or fail where FASTVAE_TEST_REQUIRE_CPU=1 asks for them."""
    if fastvae.info()["extension"] != "built":
        reason = fastvae.info()["on cpu"]
        if os.environ.get("FASTVAE_TEST_REQUIRE_CPU") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def cuda_on_the_cpu(choose: Callable[..., str]) -> Callable[..., str]:
    return lambda impl, device: "cuda" if impl == "cuda" else choose(impl, device)


def use_triton(monkeypatch: pytest.MonkeyPatch, small: bool = False) -> None:
    """Small tiles, so that small shapes straddle them; on the GPU if there is one, else interpreted.

    small: leave small problems to the kernels made for them; otherwise these have the tiles of large ones.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("FASTVAE_TILES", "0" if small else "1")
    if not triton_kernels.load("launch").INTERPRETED:
        for name in ("triton", "triton-high", "triton-medium"):
            monkeypatch.setitem(ops.operators, name, through_gpu(ops.operators[name]))
        monkeypatch.setattr(triton_kernels, "missing", lambda device: None)
        return
    patch_once(monkeypatch)
    monkeypatch.setattr(triton_kernels.load("gaussian"), "ELEMENTS", 2**14)  # an interpreter likes large tiles
    monkeypatch.setattr(triton_kernels.load("small"), "MULTIPROCESSORS", 4)
    tiles = triton_kernels.load("tiles")
    monkeypatch.setattr(tiles, "PROGRAMS", 4)
    real = tiles.tile_for
    sizes = {"forward": (16, 64), "score": (16, 64), "parameters": (64, 16)}

    def tile_for(kind: str, *about: Any):
        rows, columns = sizes[kind]
        return real(kind, *about)._replace(rows=rows, columns=columns)

    monkeypatch.setattr(tiles, "tile_for", tile_for)


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `name` (composite, cpu-avx2, cuda-emulated, ...) the one that runs; its `impl`."""
    impl, _, isa = name.partition("-")
    if impl == "cuda":
        require_cpu()  # who has no C++ compiler has no emulation either
        real = torch.cuda.is_available() and backends._missing_cuda() is None
        monkeypatch.setitem(ops.operators, "cuda", through_gpu(ops.native) if real else cuda.operators())
        monkeypatch.setattr(backends, "choose", cuda_on_the_cpu(backends.choose))
        # the kernels for small problems, which the tests' are, or those that large ones take
        monkeypatch.setenv("FASTVAE_TILES", "1" if name.endswith("tiled") else "0")
    if impl == "triton":
        use_triton(monkeypatch, small=isa == "small")
    if impl == "cpu":
        require_cpu()
        if not has_isa(isa):  # as PyTorch, not the code under test, sees the machine
            if isa == "avx512" and platform.machine() in ("x86_64", "AMD64"):
                monkeypatch.setitem(ops.operators, "cpu", avx512.operators())
                return impl
            pytest.skip(f"this machine has no {isa}")
        monkeypatch.setenv("FASTVAE_CPU_ISA", isa)
        assert torch.ops.fastvae.cpu_isa() == isa
    return impl


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
    if request.param == "cpu":
        require_cpu()
    impl, _, small = request.param.partition("-")
    if impl == "triton":
        use_triton(monkeypatch, bool(small))
    return impl


@pytest.fixture
def compiled() -> None:
    """The compiled kernels, or the test does not apply."""
    require_cpu()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
