"""What only a GPU can show: streams, graphs, devices, memory, sizes.

The shared tests run on a GPU as well, where there is one: see support/on_gpu.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from budget import diffuse_case
from support.internals import missing_cuda, operators_of, triton_module
from torch import Tensor

import fastvae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PRECISIONS = ("highest", "high", "medium")
CUDA = pytest.mark.skipif((why := missing_cuda()) is not None, reason=f"no CUDA kernels: {why}")
IMPLS = ("triton", pytest.param("cuda", marks=CUDA))
KERNELS = pytest.mark.parametrize(
    ("impl", "precision"), [*(("triton", name) for name in PRECISIONS), pytest.param("cuda", "highest", marks=CUDA)]
)
Run = Callable[[], tuple[Tensor, ...]]


def arguments(M: int = 100, K: int = 500, D: int = 40, device: str = "cuda") -> list[Tensor]:
    case = diffuse_case(M, K, D)
    return [t.to(device).requires_grad_() for t in (case.z, case.mu, case.logvar, torch.full((K,), -math.log(K)))]


def step(given: list[Tensor], precision: str, impl: str = "triton") -> tuple[Tensor, ...]:
    """The density and its gradients, with leaves of its own, so that nothing of autograd outlives it.

    A leaf's AccumulateGrad node belongs to the stream of the step that made it, and lives as long as that step's graph:
    a capture on another stream would have to wait for it, which CUDA refuses.
    """
    leaves = [t.detach().requires_grad_() for t in given]
    log_prob = fastvae.mixture_log_prob(*leaves, precision=precision, impl=impl)
    return log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaves)


def warm_up(run: Run) -> None:
    """What PyTorch asks for before a capture: run on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def captured(run: Run) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of `run`, which is warm, and where its replays put their results."""
    graph = torch.cuda.CUDAGraph()
    # the current stream is named because a capture that fails would not bring it back
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = run()
    return graph, results


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    same = [torch.equal(g, w) for g, w in zip(got, want, strict=True)]
    assert all(same), f"which are the same, the density first: {same}"


def assert_replays(run: Run, want: tuple[Tensor, ...]) -> None:
    """That a graph of `run` puts those bits where it says."""
    graph, got = captured(run)
    for t in got:
        t.zero_()
    graph.replay()
    assert_same_bits(got, want)


@KERNELS
def test_gpu_graph_replays_the_same_bits(impl: str, precision: str) -> None:
    given = arguments()
    want = step(given, precision, impl)
    warm_up(lambda: step(given, precision, impl))
    assert_replays(lambda: step(given, precision, impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_gpu_graph_replays_fresh_noise(impl: str) -> None:
    mu = torch.zeros(64, 40, device="cuda")

    def sample() -> tuple[Tensor, Tensor]:
        return fastvae.gaussian_rsample(mu, mu, impl=impl)

    warm_up(sample)
    graph, (z, _) = captured(sample)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z) and abs(float(z.mean())) < 0.1


@KERNELS
def test_gpu_other_streams(impl: str, precision: str) -> None:
    given = arguments()
    want = step(given, precision, impl)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step(given, precision, impl)
    stream.synchronize()
    assert_same_bits(got, want)


@KERNELS
@pytest.mark.parametrize("how", ["sliced", "transposed", "expanded"])
def test_gpu_strides(impl: str, precision: str, how: str) -> None:
    """Tensors on the device that are not contiguous: those that the shared tests move there are."""
    given = arguments(7, 9, 8)
    strided = {
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "transposed": lambda t: t.mT.contiguous().mT if t.ndim == 2 else t,
        "expanded": lambda t: t[:1].expand_as(t),
    }[how]
    changed = [strided(t.detach()) for t in given]
    assert_same_bits(step(changed, precision, impl), step([t.contiguous() for t in changed], precision, impl))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_tiles_are_chosen_by_time_once(precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not while a graph is captured, which has the table's; then once, and every later call has those bits.

    So has a later capture, which reads the choice from the file.
    """
    autotune = triton_module("autotune")
    monkeypatch.setenv("FASTVAE_TILES", "1")
    given = arguments()
    table = step(given, precision)
    monkeypatch.setenv("FASTVAE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    assert_replays(lambda: step(given, precision), table)
    assert not list(tmp_path.iterdir())
    chosen = step(given, precision)
    entries = json.loads((tmp_path / "tiles.json").read_text())["tiles"]
    assert len(entries) == 2  # the score's and the parameters'
    assert all(timed[0]["milliseconds"] > 0 and len(timed) >= 3 for timed in entries.values())
    monkeypatch.setattr(autotune, "_known", {})
    timed_again: list[object] = []
    monkeypatch.setattr(autotune, "milliseconds", lambda run: timed_again.append(run) or 1.0)
    assert_replays(lambda: step(given, precision), chosen)
    assert_same_bits(step(given, precision), chosen)
    assert not timed_again


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
