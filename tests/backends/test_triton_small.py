"""What is the small-problem kernels' alone: how many launches, what is small, and sizes around their tiles.

The shared tests run on them as "triton-small".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from budget import allowance, assert_within, diffuse_case, hard_case, run
from support.internals import interpreted, triton_module
from torch import Tensor

import fastvae

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("small_triton")


def arguments(M: int = 5, K: int = 9, D: int = 3) -> list[Tensor]:
    """mu, logvar of q; mu, logvar, log_weights of the mixture."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(M, D, generator=rng), torch.randn(M, D, generator=rng) - 1
    prior = torch.randn(K, D, generator=rng), 0.3 * torch.randn(K, D, generator=rng)
    return [v.requires_grad_() for v in (*q, *prior, torch.log_softmax(torch.randn(K, generator=rng), 0))]


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels that are launched within."""
    names: list[str] = []

    def recording(launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *positional: Any, **named: Any) -> Any:
            names.append(self.fn.__name__)
            return launch(self, *positional, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        if interpreted():
            from triton.runtime.interpreter import GridExecutor

            patch.setattr(GridExecutor, "__call__", recording(GridExecutor.__call__))
        else:
            from triton.runtime.jit import JITFunction

            patch.setattr(JITFunction, "run", recording(JITFunction.run))
        yield names


FORWARD, BACKWARD = ["forward_kernel"], ["backward_kernel"]


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (0, 1), (2, 3, 4), (4,)], ids=str)
def test_mixture_kl_is_one_launch_each_way(num_samples: int | None, wanted: tuple[int, ...]) -> None:
    leaves = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(arguments())]
    with recorded() as launched:
        z, kl = fastvae.mixture_kl(*leaves, num_samples, impl="triton")
    assert launched == FORWARD
    loss = kl.sum() + (z.square().sum() if 0 in wanted else 0.0)
    with recorded() as launched:
        torch.autograd.grad(loss, [leaves[i] for i in wanted])
    assert launched == BACKWARD


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_density_is_one_launch_each_way(precision: str) -> None:
    q, _, *prior = arguments()
    for call in (fastvae.mixture_log_prob, fastvae.mixture_log_prob_and_score):
        with recorded() as launched:
            call(q.detach(), *prior, precision=precision, impl="triton")
        assert launched == FORWARD
    log_prob = fastvae.mixture_log_prob(q, *prior, precision=precision, impl="triton")
    with recorded() as launched:
        torch.autograd.grad(log_prob.sum(), (q, *prior))
    assert launched == BACKWARD


def test_launches_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/developers/triton-kernels.md."""
    small, counts = triton_module("small"), []
    for max_work in (small.MAX_WORK, -1):
        monkeypatch.setattr(small, "MAX_WORK", max_work)
        leaves = arguments()
        z, _, *prior = leaves
        found = []
        for call in (fastvae.mixture_log_prob, fastvae.mixture_log_prob_and_score):
            with recorded() as launched:
                call(z.detach(), *prior, impl="triton")
            found.append(len(launched))
        log_prob = fastvae.mixture_log_prob(z, *prior, impl="triton")
        with recorded() as launched:
            torch.autograd.grad(log_prob.sum(), (z, *prior))
        found.append(len(launched))
        with recorded() as launched:
            _, kl = fastvae.mixture_kl(*leaves, impl="triton")
        found.append(len(launched))
        with recorded() as launched:
            torch.autograd.grad(kl.sum(), leaves)
        counts.append([*found, len(launched)])
    assert counts == [[1, 1, 1, 1, 1], [4, 6, 4, 7, 5]]


def test_every_precision_has_the_same_bits() -> None:
    """The difference form serves them all."""
    results = []
    for precision in ("highest", "high", "medium"):
        leaves = arguments()
        torch.manual_seed(1)
        _, kl = fastvae.mixture_kl(*leaves, precision=precision, impl="triton")
        results.append((kl, *torch.autograd.grad(kl.sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_what_is_small() -> None:
    """By M K D, by what one program reads, by D; one more of anything is not."""
    is_small = triton_module("small").is_small
    assert is_small(100, 500, 40) and is_small(0, 1, 1)
    for M, K, D in ((256, 256, 256), (256, 2**16, 1), (2**24, 1, 1)):
        assert is_small(M, K, D) and not is_small(M + 1, K, D) and not is_small(1, 2**16 // D + 1, D)
    assert is_small(1, 1, 256) and not is_small(1, 1, 257)


def test_what_is_not_small_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from its parts, by tiles: as close as float32 is, and other launches."""
    results = []
    for max_work in (2**24, 5 * 9 * 3 - 1):
        monkeypatch.setattr(triton_module("small"), "MAX_WORK", max_work)
        leaves = arguments()
        torch.manual_seed(1)
        with recorded() as launched:
            _, kl = fastvae.mixture_kl(*leaves, impl="triton")
            grads = torch.autograd.grad(kl.sum(), leaves)
        assert ("sample_kernel" in launched and len(launched) > 2) == (max_work < 2**24)
        results.append((kl, *grads))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("D", [1, 7, 40, 130])
def test_sizes_around_tiles(monkeypatch: pytest.MonkeyPatch, D: int, dtype: torch.dtype) -> None:
    """The tiles that users get: rows shared by one program or not, a component more or less than a tile has."""
    small = triton_module("small")
    monkeypatch.setattr(small, "MULTIPROCESSORS", 3)
    for M, K in ((1, 1), (3, small._sizes(3, D, True).COLUMNS), (13, small._sizes(13, D, True).COLUMNS + 1)):
        for case in (hard_case(M, K, D, dtype=dtype), diffuse_case(M, K, D, dtype=dtype)):
            exclude = torch.arange(M) % (K + 1) - 1
            for given in (case, replace(case, exclude=exclude, logvar=case.logvar[:1])):
                assert_within(run(given, "triton"), *allowance(given), f"M={M} K={K} D={D}")


@pytest.mark.parametrize("D", [1, 7, 40, 130])
def test_the_bits_of_the_parts_at_every_width(D: int) -> None:
    """z and log q as `gaussian_rsample` draws them, log p and every gradient as the density alone has them."""
    results = []
    for together in (True, False):
        leaves = arguments(5, 33, D)
        torch.manual_seed(2)
        if together:
            z, kl = fastvae.mixture_kl(*leaves, 2, impl="triton")
        else:
            z, log_q = fastvae.gaussian_rsample(*leaves[:2], 2, impl="triton")
            kl = log_q - fastvae.mixture_log_prob(z, *leaves[2:], impl="triton")
        results.append((z, kl, *torch.autograd.grad(kl.square().sum() + z.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_nan_stays_in_its_row() -> None:
    leaves = arguments()
    with torch.no_grad():
        leaves[0][2, 1] = torch.nan
    torch.manual_seed(2)
    _, kl = fastvae.mixture_kl(*leaves, 3, impl="triton")
    dmu, _ = torch.autograd.grad(kl.sum(), leaves[:2])
    for values in (kl.T, dmu):
        lost = values.isnan().any(1)
        assert lost.tolist() == [False, False, True, False, False]
