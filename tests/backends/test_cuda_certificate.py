"""Precision "highest" on CUDA by products of tensor cores, where these are certified (csrc/cuda/certificate.cuh).

In the emulation, whose tensor cores lose more digits than any device's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from budget import Case, allowance, assert_within, hard_case, run
from pairs import MAKERS, Maker
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.benchmarks.inputs import MixtureInputs, concentrated, diffuse
from tools.experiments import certificate


def benchmark_case(M: int, K: int, D: int) -> Case:
    """What benchmarks call diffuse: all components are near all rows."""
    inputs = diffuse(M, K, D)
    grad = torch.randn(M, generator=torch.Generator().manual_seed(3))
    return Case(inputs.z, inputs.mu, inputs.logvar, inputs.log_weights, grad)


def log_prob(case: Case, tried: bool, monkeypatch: pytest.MonkeyPatch, precision: str = "highest") -> Tensor:
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1" if tried else "0")
    args = case.z, case.mu, case.logvar, case.log_weights
    return fastvae.mixture_log_prob(*args, exclude=case.exclude, impl="cuda", precision=precision)


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("M, K, D", [(130, 200, 40), (64, 130, 64), (40, 70, 70), (40, 70, 100)])
def test_diffuse_inputs_are_certified_and_exact(M: int, K: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 128 features of rows stay in shared memory, and more do not."""
    case = benchmark_case(M, K, D)
    case = replace(case, exclude=torch.arange(M) % (K + 1) - 1)
    assert not torch.equal(log_prob(case, True, monkeypatch), log_prob(case, False, monkeypatch))
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    assert_within(run(case, "cuda"), *allowance(case))


@pytest.mark.usefixtures("emulated_tiled")
def test_shared_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark_case(100, 200, 40)
    case = replace(case, logvar=case.logvar[:1].clone())
    assert not torch.equal(log_prob(case, True, monkeypatch), log_prob(case, False, monkeypatch))
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    assert_within(run(case, "cuda"), *allowance(case))


@pytest.mark.usefixtures("emulated_tiled")
def test_where_few_are_certified_the_difference_form_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (hard_case(130, 300, 13), replace(benchmark_case(64, 300, 16), logvar=torch.full((300, 16), -2.0))):
        results = []
        for tried in ("0", "1"):
            monkeypatch.setenv("FASTVAE_CERTIFICATE", tried)
            results.append(run(case, "cuda"))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("emulated_tiled")
def test_a_trained_mixture_is_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair that counts is certified, and few count: these are computed in the difference form."""
    inputs = concentrated(130, 700, 40)
    case = Case(inputs.z, inputs.mu, inputs.logvar, inputs.log_weights, torch.ones(130))
    case = replace(case, exclude=torch.arange(130) * 5 - 1)
    assert not torch.equal(log_prob(case, True, monkeypatch), log_prob(case, False, monkeypatch))
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    assert_within(run(case, "cuda"), *allowance(case))


def mostly_diffuse() -> Case:
    """A few components are so narrow that products lose digits that count, for the rows that are near them."""
    case = benchmark_case(128, 500, 40)
    mu, logvar = case.mu.clone(), case.logvar.clone()
    for k, m in ((5, 3), (210, 100), (499, 64)):
        logvar[k] = -10.0
        mu[k] = case.z[m] + math.exp(-5) * torch.linspace(-1, 1, 40)
    return replace(case, mu=mu, logvar=logvar)


@pytest.mark.usefixtures("emulated_tiled")
def test_single_pairs_are_computed_in_the_difference_form(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mostly_diffuse()
    want, allowed = allowance(case)
    products = log_prob(case, False, monkeypatch, "high")
    assert float(((products - want.log_prob).abs() / allowed.log_prob).max()) > 1  # else the case tests nothing
    exact, certified = log_prob(case, False, monkeypatch), log_prob(case, True, monkeypatch)
    assert not torch.equal(exact, certified)
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    assert_within(run(case, "cuda"), want, allowed)
    near = want.log_prob[[3, 64, 100]]
    assert float((certified[[3, 64, 100]] - near).abs().max()) < 1e-4


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("apart", [3.0, 100.0, 3e3, 1e5])
@pytest.mark.parametrize("D", [1, 8, 33])
def test_components_far_apart(D: int, apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sigmas: R is large, and so is what a - R is rounded by where single pairs are computed as differences."""
    rng = torch.Generator().manual_seed(1)
    mu, logvar = apart * torch.randn(200, D, generator=rng), 0.2 * torch.randn(200, D, generator=rng)
    z = mu[torch.arange(130)] + torch.randn(130, D, generator=rng)
    case = Case(z, mu, logvar, torch.randn(200, generator=rng), torch.randn(130, generator=rng))
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    assert_within(run(case, "cuda"), *allowance(case))


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("width, D", [("narrow", 40), ("wide", 1)])
def test_a_component_beyond_the_range_of_float32(width: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two narrow ones c' is -inf, and of wide ones 1 / sigma^2 is 0.  A row is at one of them."""
    case = benchmark_case(64, 200, D)
    mu, logvar, z = case.mu.clone(), case.logvar.clone(), case.z.clone()
    if width == "narrow":
        mu[7, 0], mu[8, 0], logvar[7:9, 0] = 10.0, -10.0, -86.0
    else:
        mu[:, 0], logvar[:, 0] = 0.0, 105.0
    z[3] = mu[7]
    z[3, 0] += 2 * torch.exp(0.5 * logvar[7, 0])
    case = replace(case, z=z, mu=mu, logvar=logvar)
    want, allowed = allowance(case)
    error = (log_prob(case, True, monkeypatch).double() - want.log_prob).abs()
    assert bool((error <= allowed.log_prob).all()), float((error / allowed.log_prob).max())


@pytest.mark.usefixtures("emulated_tiled")
def test_a_row_that_is_not_finite_is_its_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark_case(130, 200, 40)
    spoiled = case.z.clone()
    spoiled[7, 2], spoiled[9, 5] = math.nan, math.inf
    clean, got = log_prob(case, True, monkeypatch), log_prob(replace(case, z=spoiled), True, monkeypatch)
    assert got[7].isnan() and got[9] == -math.inf
    others = [m for m in range(130) if m not in (7, 9)]
    assert torch.equal(got[others], clean[others])
    assert not torch.equal(clean, log_prob(case, False, monkeypatch))


@pytest.mark.usefixtures("emulated_tiled")
def test_absent_components_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they hold: also the first one, from which the survey takes its reference."""
    case = benchmark_case(64, 200, 40)
    assert case.log_weights is not None
    mu, logvar, log_weights = case.mu.clone(), case.logvar.clone(), case.log_weights.clone()
    for k, value in ((0, math.nan), (50, math.inf), (199, -math.inf)):
        mu[k], logvar[k], log_weights[k] = value, value, -math.inf
    case = replace(case, mu=mu, logvar=logvar, log_weights=log_weights)
    assert not torch.equal(log_prob(case, True, monkeypatch), log_prob(case, False, monkeypatch))
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    plain = replace(case, mu=mu.nan_to_num(0, 0, 0), logvar=logvar.nan_to_num(0, 0, 0))
    got, (want, allowed) = run(case, "cuda"), allowance(plain)
    assert_within(got, want, allowed)


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("order", ["descending", "shuffled"])
def test_no_thread_depends_on_when_another_runs(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certified, given up, with single pairs in the difference form, and with no others."""
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    inputs = concentrated(130, 300, 40)
    trained = Case(inputs.z, inputs.mu, inputs.logvar, inputs.log_weights, torch.ones(130))
    for case in (benchmark_case(130, 200, 40), hard_case(130, 200, 13), mostly_diffuse(), trained):
        results = []
        for each in ("ascending", order):
            monkeypatch.setenv("FASTVAE_EMULATION_ORDER", each)
            results.append(run(case, "cuda"))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("D", [40, 70])
def test_a_row_beyond_all_norms(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms overflow, and 0 times infinity must not bring up padding, absent components, or what it excludes."""
    case = benchmark_case(64, 200, D)
    assert case.log_weights is not None
    z, mu, log_weights = case.z.clone(), case.mu.clone(), case.log_weights.clone()
    z[3, 1], mu[9], log_weights[9] = 1e10, math.nan, -math.inf
    case = replace(case, z=z, mu=mu, log_weights=log_weights, exclude=torch.arange(64))
    got, want = log_prob(case, True, monkeypatch), log_prob(case, False, monkeypatch)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-5)


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("D", [40, 70])
def test_responsibilities_of_an_outlier_sum_to_one(D: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward may be of products and backward of differences."""
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    case = benchmark_case(130, 200, D)
    for distance in (1.0, 100.0, 1000.0, 10_000.0):
        z = case.z.clone()
        z[77] *= distance / float(z[77].norm())
        args = z, case.mu, case.logvar, case.log_weights.clone().requires_grad_()
        density = fastvae.mixture_log_prob(*args, impl="cuda", precision=precision)
        (given,) = torch.autograd.grad(density[77], args[3])
        assert abs(float(given.sum()) - 1) < 1e-3, distance


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_the_errors_of_exponents_are_what_their_bounds_say(maker: Maker) -> None:
    """Of the certificate and of the screen, beside what any form loses: v, c' and a are rounded; 10^5 pairs of each."""
    M, K, rng, u = 512, 24, torch.Generator().manual_seed(1), certificate.ROUNDOFF
    for D in (3, 16, 40, 64, 100):
        z, mu, sigma = (t.float() for t in maker(rng, M, K, D))
        inputs = MixtureInputs(z, mu, 2 * torch.log(sigma), torch.zeros(K))
        exact = [t.double() for t in (z, mu, inputs.logvar, inputs.log_weights)]
        a = reference.component_log_prob(*exact)
        rows, components = certificate.norms(inputs)
        products = rows.linear[:, None] * components.linear + rows.square[:, None] * components.square
        origin = (exact[1] * (-0.5 * exact[2]).exp()).sum(0) / (-0.5 * exact[2]).exp().sum(0)
        R = 0.5 * ((exact[0] - origin) ** 2 * (-exact[2]).exp().amin(0)).sum(1, keepdim=True)
        rounded = 6 * u * (a.abs() + R)
        bounds = {"high": certificate.ERROR * u * products + rounded, "medium": certificate.SCREEN * products + rounded}
        for k in range(0, K, 5):
            alone = torch.full((K,), -1e30).index_fill(0, torch.tensor(k), 0.0)
            for precision, bound in bounds.items():
                got = fastvae.mixture_log_prob(z, mu, inputs.logvar, alone, impl="cuda", precision=precision)
                worst = float(((got.double() - a[:, k]).abs() / bound[:, k]).max())
                assert worst <= 1, f"{precision} D={D} k={k}: {worst} times the bound"


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("size", [1e-33, 1e30])
def test_gradients_of_any_size_keep_their_digits(size: float) -> None:
    """Of the sums of weights, a power of two is split off, which by itself may leave the range of float32."""
    case = benchmark_case(130, 200, 40)
    leaves = [v.clone().requires_grad_() for v in (case.mu, case.logvar)]
    density = fastvae.mixture_log_prob(case.z, *leaves, case.log_weights, impl="cuda", precision="high")
    plain = torch.autograd.grad(density, leaves, case.grad, retain_graph=True)
    scaled = torch.autograd.grad(density, leaves, case.grad * size)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other.double() / size, one.double(), rtol=1e-5, atol=1e-5 * float(one.abs().max()))
