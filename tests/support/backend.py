"""Makes a backend, by its name here, the one that runs: see BACKENDS."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

import pytest
import torch
from emulation import avx512, cuda

import fastvae

from . import internals
from .on_gpu import call_on

ISAS = ("baseline", "avx2", "avx512")
# Those of GPUs twice: with their kernels for small problems, which the tests' are, and with tiles only.
BACKENDS = (
    "composite",
    *(f"cpu-{isa}" for isa in ISAS),
    *("triton", "triton-small", "cuda-emulated", "cuda-emulated-tiled"),
)


def require_cpu() -> None:
    """Skip without the compiled kernels, or fail where FASTVAE_TEST_REQUIRE_CPU=1 asks for them."""
    if fastvae.info()["extension"] != "built":
        reason = fastvae.info()["impl='cpu'"]
        if os.environ.get("FASTVAE_TEST_REQUIRE_CPU") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `name` (composite, cpu-avx2, cuda-emulated, ...) the one that runs; its `impl`."""
    impl, _, variant = name.partition("-")
    if impl == "cuda":
        require_cpu()  # who has no C++ compiler has no emulation either
        if internals.missing_cuda() is None:
            call_on(monkeypatch, "cuda", "cuda")
        else:
            for backend, operators in cuda.of_backends().items():
                internals.use_operators(monkeypatch, backend, operators)
                internals.take_any_device(monkeypatch, backend)
        monkeypatch.setenv("FASTVAE_TILES", "1" if variant.endswith("tiled") else "0")
    elif impl == "triton":
        _use_triton(monkeypatch, small=variant == "small")
    elif impl == "cpu":
        require_cpu()
        if variant:
            _use_isa(variant, monkeypatch)
    return impl


def device_of(impl: str) -> torch.device:
    """Where the operators of that `impl` take their tensors: for tests that call these and no public function."""
    if impl == "triton":
        on_gpu = importlib.util.find_spec("triton") is not None and not internals.interpreted()
    else:
        on_gpu = impl == "cuda" and internals.missing_cuda() is None
    return torch.device("cuda" if on_gpu else "cpu")


def interpreted(impl: str) -> bool:
    """Whether the kernels of that `impl` are interpreted: an operation takes some 50 us, whatever it is of."""
    return impl == "triton" and internals.interpreted()


def few_shapes(impl: str) -> bool:
    """Whether a test tries few shapes by that `impl`: to interpret Triton takes long, and to compile as well.

    Triton compiles a kernel anew for sizes of 1, sizes that 16 divides, and each power of two that D is rounded to.
    """
    return impl == "triton"


def emulated(name: str) -> bool:
    """Whether what runs under that name is an emulation."""
    return name.startswith("cuda-") or (name == "cpu-avx512" and not internals.has_isa("avx512"))


def _use_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not internals.has_isa(isa):
        if isa != "avx512" or platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip(f"this machine has no {isa}")
        internals.use_operators(monkeypatch, "cpu", *avx512.operators())
        return
    monkeypatch.setenv("FASTVAE_CPU_ISA", isa)
    assert torch.ops.fastvae.cpu_isa() == isa


def _use_triton(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    """Small tiles, so that small shapes straddle them; on the GPU if there is one, else interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("FASTVAE_TILES", "0" if small else "1")
    if not internals.interpreted():
        call_on(monkeypatch, "cuda", "triton")
        return
    # an interpreter likes large tiles
    monkeypatch.setattr(internals.triton_module("gaussian"), "ELEMENTS", 2**14)
    monkeypatch.setattr(internals.triton_module("small"), "MULTIPROCESSORS", 4)
    tiles = internals.triton_module("tiles")
    monkeypatch.setattr(tiles, "PROGRAMS", 4)
    real = tiles.tile_for
    sizes = {"forward": (16, 64), "score": (16, 64), "parameters": (64, 16)}

    def tile_for(kind: str, *about: Any):
        rows, columns = sizes[kind]
        return real(kind, *about)._replace(rows=rows, columns=columns)

    monkeypatch.setattr(tiles, "tile_for", tile_for)
