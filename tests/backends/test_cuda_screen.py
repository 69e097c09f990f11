"""Backward on CUDA where few pairs count (csrc/cuda/screen.h), in the emulation: none that counts is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from budget import Case, Result, allowance, assert_within, diffuse_case, hard_case, run

from fastvae.benchmarks.inputs import concentrated

pytestmark = pytest.mark.usefixtures("emulated_tiled")


def trained_case(M: int, K: int, D: int) -> Case:
    inputs = concentrated(M, K, D)
    grad = torch.randn(M, generator=torch.Generator().manual_seed(3))
    return Case(inputs.z, inputs.mu, inputs.logvar, inputs.log_weights, grad)


def run_both(case: Case, monkeypatch: pytest.MonkeyPatch, dense: bool = False) -> tuple[Result, Result]:
    """Without the screen, and with it."""
    results = []
    for screened in ("0", "1"):
        monkeypatch.setenv("FASTVAE_SCREEN", screened)
        results.append(run(case, "cuda", dense))
    return results[0], results[1]


def same_bits(one: Result, other: Result) -> bool:
    return all(torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("M, K, D", [(130, 300, 40), (300, 70, 64), (64, 500, 33), (70, 130, 7), (40, 260, 1)])
def test_trained_mixtures(M: int, K: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are not whole, one line of features and two, and lanes without dimensions."""
    case = trained_case(M, K, D)
    case = replace(case, exclude=torch.arange(M) * 3 % (K + 1) - 1)
    plain, screened = run_both(case, monkeypatch)
    assert torch.equal(plain.log_prob, screened.log_prob)
    assert not same_bits(plain, screened) or D < 8  # few dimensions: most pairs count
    assert_within(screened, *allowance(case))


@pytest.mark.parametrize("D", [13, 40])
def test_components_of_all_sizes(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigma from 1e-3 to 1e3, absent components, rows without a gradient."""
    case = hard_case(130, 300, D)
    near = torch.arange(130) % 3 != 2  # the others are beyond what is screened
    case = Case(case.z[near], case.mu, case.logvar, case.log_weights, case.grad[near])
    plain, screened = run_both(case, monkeypatch)
    assert not same_bits(plain, screened)
    assert_within(screened, *allowance(case))


def test_features_below_the_range_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with so large a square that little is left of their other features, which say where the rows belong."""
    rng = torch.Generator().manual_seed(1)
    mu, logvar = 30 * torch.randn(130, 20, generator=rng), torch.zeros(130, 20)
    z = mu[:64] + torch.randn(64, 20, generator=rng)
    wide = slice(8, 16)
    mu[wide, 0] = 2.0**31 * torch.linspace(1.03, 1.9, 4).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(4)
    logvar[wide, 1] = 2 * math.log(1e11)
    z[wide] = mu[wide]
    z[wide, 1] = 1e11
    case = Case(z, mu, logvar, torch.zeros(130), torch.ones(64))
    assert_within(run_both(case, monkeypatch)[1], *allowance(case))


def test_shared_variance_and_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = trained_case(130, 200, 20)
    case = replace(case, logvar=torch.linspace(-3, -1, 20)[None], log_weights=None)
    plain, screened = run_both(case, monkeypatch)
    assert not same_bits(plain, screened)
    assert_within(screened, *allowance(case))


def test_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows and many components, and the reverse: the sums of both sides are split."""
    for M, K in ((32, 1000), (1000, 32)):
        case = trained_case(M, K, 24)
        plain, screened = run_both(case, monkeypatch)
        assert not same_bits(plain, screened)
        assert_within(screened, *allowance(case))


def test_where_most_pairs_count_all_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the rounding of l has to be that of the exponents, or l is no number."""
    far, spoiled, infinite = (trained_case(130, 200, 40) for _ in range(3))
    far.z[77] += 40.0
    spoiled.z[3, 2] = math.nan
    infinite.mu[5, 1] = math.nan
    for case in (diffuse_case(130, 200, 40), far, spoiled, infinite):
        plain, screened = run_both(case, monkeypatch)
        assert same_bits(plain, screened)
    assert float(run_both(far, monkeypatch)[0].log_prob.min()) < -2048


def test_dense_backward_is_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_bits(*run_both(replace(trained_case(130, 200, 40), exclude=None), monkeypatch, dense=True)[:2])


def test_rows_of_density_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite coordinate has no gradient and spoils no other row's.  Nor do absent components."""
    case = trained_case(130, 200, 40)
    clean = run_both(case, monkeypatch)[1]
    z, mu, log_weights = case.z.clone(), case.mu.clone(), case.log_weights
    assert log_weights is not None
    z[9, 5] = math.inf
    got = run_both(replace(case, z=z), monkeypatch)[1]
    assert got.log_prob[9] == -math.inf and bool((got.dz[9] == 0).all())
    others = torch.arange(130) != 9
    assert torch.equal(got.dz[others], clean.dz[others])
    mu[7], log_weights = math.nan, log_weights.index_fill(0, torch.tensor(7), -math.inf)
    got = run_both(replace(case, mu=mu, log_weights=log_weights), monkeypatch)[1]
    assert all(bool(part.isfinite().all()) for part in got[1:])


@pytest.mark.parametrize("order", ["descending", "shuffled"])
def test_no_thread_depends_on_when_another_runs(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Screened, and given up."""
    monkeypatch.setenv("FASTVAE_SCREEN", "1")
    for case in (trained_case(130, 200, 40), diffuse_case(130, 200, 20)):
        results = []
        for each in ("ascending", order):
            monkeypatch.setenv("FASTVAE_EMULATION_ORDER", each)
            results.append(run(case, "cuda"))
        assert same_bits(*results)
