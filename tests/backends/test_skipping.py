"""What the compiled backward leaves out: nothing that matters, nothing when it is told not to."""

from __future__ import annotations

import math

import pytest
import torch
from budget import Case, allowance, assert_within, diffuse_case, run
from support.backend import interpreted
from torch import Tensor

import fastvae

U = 2.0**-24


def concentrated(M: int = 64, K: int = 1000, D: int = 20) -> Case:
    """Rows that each sit on one of many components, as a trained posterior does on the aggregate one."""
    rng = torch.Generator().manual_seed(0)
    mu = 1.5 * torch.randn(K, D, generator=rng)
    z = mu[:M] + 0.1 * torch.randn(M, D, generator=rng)
    weights = torch.log_softmax(torch.randn(K, generator=rng), 0)
    return Case(z, mu, torch.full((K, D), 2 * math.log(0.6)), weights, torch.randn(M, generator=rng))


def responsibilities(case: Case) -> Tensor:
    a = fastvae.reference.component_log_prob(case.z, case.mu, case.logvar, case.log_weights)
    return torch.softmax(a, -1)  # [M, K]


def concentrated_for(impl: str) -> Case:
    """Interpreted, with fewer rows and components: some tiles of them all the same."""
    return concentrated(40, 300, 10) if interpreted(impl) else concentrated()


def test_both_backwards_are_within_their_budget(impl: str) -> None:
    case = concentrated_for(impl)
    for dense in (False, True):
        assert_within(run(case, impl, dense), *allowance(case, dense), f"dense_backward={dense}")


def test_skipping_leaves_out_what_float32_cannot_see(impl: str) -> None:
    """Gradient filtering that is not exact by default: what is dropped weighs less than 2^-24 of a row."""
    case = concentrated_for(impl)
    skipped, dense = run(case, impl), run(case, impl, dense_backward=True)
    assert torch.equal(skipped.log_prob, dense.log_prob)
    weight = case.grad.abs()
    s = torch.exp(-0.5 * case.logvar)
    t = ((case.z[:, None] - case.mu) * s).abs()  # [M, K, D]
    # What may be missing: responsibilities of at most 2^-24 / K, which float32 knows to a few hundred
    # roundings of a; then a rounding of the sum of what is there.
    r = responsibilities(case.to(torch.float64))
    missing = (1 + 1e-4) * r.clamp(max=U / len(case.mu))[..., None]
    rounding = 8 * U * r[..., None]
    g = weight[:, None, None]
    for name, got, want, limit in (
        ("z", skipped.dz, dense.dz, (g * rounding * t * s).sum(1)),
        ("mu", skipped.dmu, dense.dmu, (g * (missing + rounding) * t * s).sum(0)),
        (
            "logvar",
            skipped.dlogvar,
            dense.dlogvar,
            0.5 * (g * (missing + rounding) * (t.square() + 1)).sum(0),
        ),
        ("log_weights", skipped.dlog_weights, dense.dlog_weights, (g * (missing + rounding))[..., 0].sum(0)),
    ):
        assert bool(((got - want).abs() <= limit).all()), name
    assert float((skipped.dlog_weights - dense.dlog_weights).abs().max()) <= U * float(weight.sum())


@pytest.mark.usefixtures("compiled")
def test_something_is_really_skipped() -> None:
    """Exact zeros for unused components by default, and none with dense_backward=True."""
    case = concentrated()
    # responsibilities that float32 holds without underflow, so that dense arithmetic has something to say
    used = responsibilities(case.to(torch.float64)).sum(0)
    faint = (used > 1e-30) & (used < 1e-14)
    assert int(faint.sum()) >= 10
    skipped, dense = run(case, "cpu"), run(case, "cpu", dense_backward=True)
    assert bool((dense.dlog_weights[faint] != 0).all())
    assert bool((skipped.dlog_weights[faint] == 0).all())  # not only where a whole tile is


@pytest.mark.usefixtures("compiled")
def test_nothing_is_skipped_where_everything_counts() -> None:
    case = diffuse_case(64, 1000, 20)
    assert float(responsibilities(case).min()) > U / 1000
    assert all(torch.equal(a, b) for a, b in zip(run(case, "cpu"), run(case, "cpu", True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_faint_component_may_be_a_steep_one(impl: str, dtype: torch.dtype) -> None:
    """The gradient of z to rounding, also where sigma differs from component to component.

    Half of the components have sigma 1e3, half 1e-3, and z lies eight or more of the latter away from theirs.
    Their responsibility is below what one may neglect in log p, but r t / sigma is not below what one may
    neglect in the score: it is up to half of it.  The two kinds take turns by 128 components, which fills a tile of
    any backend; and rows are so many that no backend splits the components.
    """
    K, M = 512, 64
    wide = torch.arange(K) // 128 % 2 == 0
    sigma = torch.where(wide, 1e3, 1e-3).to(dtype)
    mu = torch.where(wide, 0.0, 100.0).to(dtype)
    distances = torch.linspace(7.0, 9.5, 11) if dtype == torch.float32 else torch.linspace(10.5, 11.5, 11)
    for distance in distances[1::3].tolist() if interpreted(impl) else distances.tolist():
        z = torch.full((M, 1), 100 + 1e-3 * distance, dtype=dtype)
        ones = torch.ones(M, dtype=dtype)
        case = Case(z, mu[:, None], 2 * sigma.log()[:, None], (0 * mu) - math.log(K), ones)
        want, allowed = allowance(case, dense_backward=True)
        _, score = fastvae.mixture_log_prob_and_score(z, case.mu, case.logvar, case.log_weights, impl=impl)
        for dz in (run(case, impl).dz, run(case, impl, dense_backward=True).dz, score):
            assert bool(((dz - want.dz).abs() <= allowed.dz).all()), f"{distance} sigma: {dz[0]} for {want.dz[0]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_faint_component_may_be_a_far_one(impl: str, dtype: torch.dtype) -> None:
    """The gradient of z to rounding, also where a pair counts for much because its t is 100.

    z lies on one component.  384 others are far from it, with such weights that each responsibility is just below what
    one may neglect in log p.  The gradient is theirs alone, and is 7 roundings of 1 / sigma.  The rest of the first
    component's tile has no weight, so that no tile holds both kinds.
    """
    K, M, t = 512, 64, 100.0
    digits = 26 if dtype == torch.float32 else 55
    exponent = -math.log(K) - digits * math.log(2) - 1
    far = torch.arange(K) >= 128
    log_weights = torch.where(far, exponent + 0.5 * t**2, -math.inf).to(dtype)
    log_weights[0] = 0.0
    z, mu = torch.zeros(M, 1, dtype=dtype), t * far[:, None].to(dtype)
    case = Case(z, mu, torch.zeros_like(mu), log_weights, torch.ones(M, dtype=dtype))
    want, allowed = allowance(case, dense_backward=True)
    _, score = fastvae.mixture_log_prob_and_score(z, mu, case.logvar, log_weights, impl=impl)
    for dz in (run(case, impl).dz, run(case, impl, dense_backward=True).dz, score):
        assert bool(((dz - want.dz).abs() <= allowed.dz).all()), f"{dz[0]} for {want.dz[0]}"


def test_dense_backward_is_dense_beside_the_score(impl: str) -> None:
    """The score leaves out what does not matter to it; the gradient that `dense_backward` asks for does not.

    The nearer component's t is 0 in one dimension, where all of the gradient is the other component's: a part in 10^12.
    """
    z = torch.zeros(1, 4)
    mu = torch.tensor([[0.0, 0.5, 0.5, 0.5], [5.0, 3.0, 3.0, 3.0]])
    logvar = torch.zeros(2, 4)
    exact = z.double().requires_grad_()
    want = fastvae.mixture_log_prob(exact, mu.double(), logvar.double(), impl="reference")
    (want,) = torch.autograd.grad(want.sum(), exact)
    assert 0 < want[0, 0] < 1e-8
    for operation in (fastvae.mixture_log_prob, lambda *a, **k: fastvae.mixture_log_prob_and_score(*a, **k)[0]):
        for parameters in (False, True):
            leaf, own_mu = z.clone().requires_grad_(), mu.clone().requires_grad_(parameters)
            log_prob = operation(leaf, own_mu, logvar, dense_backward=True, impl=impl)
            (got,) = torch.autograd.grad(log_prob.sum(), leaf)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0.0)
