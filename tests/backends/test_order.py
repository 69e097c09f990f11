"""Components that lie apart: the compiled kernels take them, and the rows, in an order of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from budget import Case, allowance, assert_within, run

import fastvae

APART = 40.0  # nats between components in their first 8 dimensions, from which on they are ordered: csrc/cpu/prepared.h


def apart_case(M: int, K: int, D: int, dtype: torch.dtype, shared: bool = False) -> Case:
    """Components many sigmas apart, in no order; each row is near to one of them."""
    rng = torch.Generator().manual_seed(M + K + D)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mu, logvar = normal(K, D), -3 + (0.0 if shared else 0.3) * normal(1 if shared else K, D)
    log_weights = torch.log_softmax(normal(K), 0)
    log_weights[3::50] = -math.inf
    own = torch.randint(K, (M,), generator=rng)
    z = mu[own] + math.exp(-1.5) * normal(M, D)
    exclude = torch.where(torch.arange(M) % 2 == 0, own, -1)
    return Case(z, mu, logvar, log_weights, normal(M), exclude).to(dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_within_the_budget(cpu_impl: str, dtype: torch.dtype, shared: bool) -> None:
    for M, K, D in ((45, 2100, 12), (130, 1100, 9)):
        case = apart_case(M, K, D, dtype, shared)
        telling = (case.mu.var(0) / case.logvar.mean(0).exp()).sort(descending=True).values[:8].sum()
        assert telling > 1.3 * APART and M >= 32 and K >= 1024
        assert_within(run(case, cpu_impl), *allowance(case), f"M={M} K={K} D={D}")


def test_score(cpu_impl: str) -> None:
    case = apart_case(45, 2100, 12, torch.float32)
    case = replace(case, grad=torch.ones_like(case.grad))
    want, allowed = allowance(case, dense_backward=True)
    log_prob, score = fastvae.mixture_log_prob_and_score(
        case.z, case.mu, case.logvar, case.log_weights, exclude=case.exclude, impl=cpu_impl
    )
    assert_within(type(want)(log_prob, score, *want[2:]), want, allowed)


def test_no_bit_depends_on_the_threads(compiled: None) -> None:
    case = apart_case(1030, 2100, 12, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(case, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_row_may_be_nan(cpu_impl: str) -> None:
    """A row of NaN, whatever place it gets in the order, gives NaN to itself alone."""
    case = replace(apart_case(45, 2100, 12, torch.float32), exclude=None)
    clean = fastvae.mixture_log_prob(case.z, case.mu, case.logvar, case.log_weights, impl=cpu_impl)
    z = case.z.clone()
    z[7] = math.nan
    got = fastvae.mixture_log_prob(z, case.mu, case.logvar, case.log_weights, impl=cpu_impl)
    others = torch.arange(45) != 7
    assert got[7].isnan()
    torch.testing.assert_close(got[others], clean[others], rtol=1e-6, atol=1e-5)
