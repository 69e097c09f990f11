"""Sums over many dimensions of terms that are alike: log variances, t^2, and those of log q and the KL.

Equal terms, added up one by one, round by the same amount in the same direction as long as the sum stays between two
powers of 2: D of them are off by D / 4 roundings, where terms that differ are off by about sqrt(D).
"""

from __future__ import annotations

import math

import pytest
import torch
from budget import Case, allowance, assert_within, difference, run
from torch import Tensor

import fastvae

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
LOGVARS = (-13.8155, -5.3)


@pytest.fixture
def dimensions(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """D up to 4,096; less where a thread of a GPU is a fiber or a tile is an array of NumPy."""
    backend = request.node.callspec.params["impl"]
    of_backend = {"cuda-emulated": (511,), "cuda-emulated-tiled": (700,), "triton": (300,), "triton-small": (255,)}
    return of_backend.get(backend, (65, 257, 1100, 4096))


def assert_within_budget(case: Case, impl: str, what: str) -> None:
    """The value and all gradients; of emulated kernels, which take long, the value, whose exponents are the same."""
    want, allowed = allowance(case, dense_backward=True)
    if impl in ("composite", "cpu"):
        assert_within(run(case, impl, dense_backward=True), want, allowed, what)
        return
    log_prob = fastvae.mixture_log_prob(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
    error = difference(log_prob, want.log_prob) / allowed.log_prob
    assert float(error.max()) <= 1, f"{what} error / allowed: {error.tolist()}"


def alike(D: int, logvar: float, shared: bool, t: float | None, dtype: torch.dtype) -> Case:
    """Three rows and two components, all variances equal; with t, all (z - mu) / sigma of a row are equal too."""
    rng = torch.Generator().manual_seed(D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    sigma = math.exp(0.5 * logvar)
    mu = 0.3 * sigma * normal(2, D)
    z = mu[[0, 1, 0]] + sigma * normal(3, D)
    if t is not None:
        mu = torch.zeros(2, D, dtype=torch.float64)
        z = t * sigma * torch.tensor([1.0, 8 / 7, 9 / 7], dtype=torch.float64)[:, None].expand(3, D)
    of_all = torch.full((D,) if shared else (2, D), logvar, dtype=torch.float64)
    return Case(z, mu, of_all, None, normal(3)).to(dtype)


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_equal_variances(impl: str, dimensions: tuple[int, ...], shared: bool, dtype: torch.dtype) -> None:
    """At D = 4096 and logvar = -13.8155 a plain sum loses 1.3 nats in float32."""
    for D in dimensions:
        for logvar in LOGVARS:
            case = alike(D, logvar, shared, None, dtype)
            assert_within_budget(case, impl, f"D={D} logvar={logvar}")


@dtypes
def test_equal_distances(impl: str, dimensions: tuple[int, ...], dtype: torch.dtype) -> None:
    """As where images are black and white, and white is one sigma."""
    for D in dimensions:
        for t in (5.3, 8.33):
            case = alike(D, 2.7, False, t, dtype)
            assert_within_budget(case, impl, f"D={D} t={t}")


@dtypes
def test_equal_terms_of_log_q_and_kl(impl: str, dimensions: tuple[int, ...], dtype: torch.dtype) -> None:
    """The budgets of test_gaussian.py.  The noise keeps the terms of log q from being equal, those of the KL may be."""
    u = torch.finfo(dtype).eps / 2
    for D in dimensions:
        for value in (*LOGVARS, -20.3):
            logvar = torch.full((2, D), value, dtype=dtype)
            mu = torch.full((2, D), 22.28, dtype=dtype)
            kl = fastvae.gaussian_kl(mu, logvar, impl=impl)
            want = fastvae.gaussian_kl(mu.double(), logvar.double(), impl="reference")
            size = (mu.square() + torch.exp(logvar) + logvar.abs() + 1).double().sum(-1)
            assert bool(((kl - want).abs() <= u * size * (4 + math.sqrt(D))).all()), f"KL, D={D} logvar={value}"

            _, log_q = sample(mu, logvar, impl)
            z, want = sample(mu.double(), logvar.double(), "reference")
            eps = (z - mu.double()) * torch.exp(-0.5 * logvar.double())
            size = (eps.square() + logvar.double().abs() + 2).sum(-1)
            limit = 1e-6 * eps.abs().sum(-1) + u * size * (4 + math.sqrt(3 * D))
            assert bool(((log_q - want).abs() <= limit).all()), f"log q, D={D} logvar={value}"


def sample(mu: Tensor, logvar: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return fastvae.gaussian_rsample(mu, logvar, generator=torch.Generator().manual_seed(3), impl=impl)
