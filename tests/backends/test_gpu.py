"""What only a GPU can show of the Triton kernels: streams, graphs, devices, memory, sizes.  Never run so far.

The shared tests run on a GPU as well, where there is one: see conftest.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from budget import diffuse_case
from support.internals import operators_of, triton_module
from torch import Tensor

import fastvae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PRECISIONS = ("highest", "high", "medium")


def arguments(M: int = 100, K: int = 500, D: int = 40, device: str = "cuda") -> list[Tensor]:
    case = diffuse_case(M, K, D)
    return [t.to(device).requires_grad_() for t in (case.z, case.mu, case.logvar, torch.full((K,), -math.log(K)))]


def step(given: list[Tensor], precision: str) -> tuple[Tensor, ...]:
    log_prob = fastvae.mixture_log_prob(*given, precision=precision, impl="triton")
    return log_prob, *torch.autograd.grad(log_prob.sum(), given)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_graph_replays_the_same_bits(precision: str) -> None:
    given = arguments()
    want = [t.clone() for t in step(given, precision)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(given, precision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(given, precision)
    for t in got:
        t.detach().zero_()
    graph.replay()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gpu_graph_replays_fresh_noise() -> None:
    mu = torch.zeros(64, 40, device="cuda")
    fastvae.gaussian_rsample(mu, mu, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = fastvae.gaussian_rsample(mu, mu, impl="triton")
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z) and abs(float(z.mean())) < 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_other_streams(precision: str) -> None:
    given = arguments()
    want = step(given, precision)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step(given, precision)
    stream.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_tiles_are_chosen_by_time_once(precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not while a graph is captured, which has the table's; then once, and every later call has those bits."""
    autotune = triton_module("autotune")
    monkeypatch.setenv("FASTVAE_TILES", "1")
    given = arguments()
    table = [t.clone() for t in step(given, precision)]
    monkeypatch.setenv("FASTVAE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, precision)
    graph.replay()
    assert all(torch.equal(g, w) for g, w in zip(captured, table, strict=True)) and not list(tmp_path.iterdir())
    chosen = [t.clone() for t in step(given, precision)]
    entries = json.loads((tmp_path / "tiles.json").read_text())["tiles"]
    assert len(entries) == 2  # the score's and the parameters'
    assert all(timed[0]["milliseconds"] > 0 and len(timed) >= 3 for timed in entries.values())
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "milliseconds", None)  # not to be called again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, precision)
    graph.replay()
    for got in (captured, step(given, precision)):
        assert all(torch.equal(g, w) for g, w in zip(got, chosen, strict=True))


def test_gpu_other_devices() -> None:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    want, got = step(arguments(), "highest"), step(arguments(device="cuda:1"), "highest")
    assert got[0].device.index == 1
    assert all(torch.equal(g.cpu(), w.cpu()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["triton", "triton-high", "triton-medium"])
def test_gpu_opcheck(backend: str) -> None:
    given = [t.detach() for t in arguments(5, 9, 3)]
    torch.library.opcheck(operators_of(backend).mixture_log_prob_and_score, (*given, None))
    torch.library.opcheck(operators_of(backend).mixture_log_prob, (*given, torch.arange(5, device="cuda") - 1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_compiles_whole(precision: str) -> None:
    given = arguments()
    want = step(given, precision)
    compiled = torch.compile(
        lambda *args: fastvae.mixture_log_prob(*args, precision=precision, impl="triton"), fullgraph=True
    )
    log_prob = compiled(*given)
    grads = torch.autograd.grad(log_prob.sum(), given)
    assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip((log_prob, *grads), want, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_offsets_beyond_32_bits(precision: str) -> None:
    """Ten million components of 256 dimensions: the last one alone counts, and has all the gradient."""
    K, D = 10_000_000, 256
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of memory")
    mu = torch.zeros(K, D, device="cuda")
    mu[-1] = torch.randn(D, device="cuda")
    weights = torch.full((K,), -torch.inf, device="cuda")
    weights[-1] = 0.0
    z = torch.randn(8, D, device="cuda", requires_grad=True)
    logvar = torch.zeros((), device="cuda")
    log_prob = fastvae.mixture_log_prob(z, mu, logvar, weights, precision=precision, impl="triton")
    (score,) = torch.autograd.grad(log_prob.sum(), z)
    exact = z.detach().double() - mu[-1].double()
    want = -0.5 * exact.square().sum(-1) - 0.5 * D * math.log(2 * math.pi)
    off = {"highest": 1e-2, "high": 1e-2, "medium": 5.0}[precision]  # of a few hundred nats
    assert float((log_prob.detach().double() - want).abs().max()) < off
    assert float((score.double() + exact).abs().max()) < off


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_memory(precision: str) -> None:
    """No array of M x K numbers, 1.6 GB here: the components packed, each way, in two parts, are a tenth of it."""
    given = arguments(4096, 100_000, 64)
    step(given, precision)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(given, precision)
    assert torch.cuda.max_memory_allocated() - before < 600e6
