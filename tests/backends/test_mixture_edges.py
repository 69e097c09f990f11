"""What is not there, not finite, or not to be computed: exclude, -inf weights, NaN, skipping, determinism."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from budget import Case, allowance, assert_within, band, diffuse_case, hard_case, run
from support.backend import interpreted

import fastvae

BAD = (math.nan, math.inf, -math.inf)


def with_nan(case: Case) -> Case:
    """NaN in the means of components that are absent, which must make no difference."""
    assert case.log_weights is not None
    return replace(case, mu=case.mu.masked_fill((case.log_weights == -math.inf)[:, None], math.nan))


def test_exclude_within_the_budget(impl: str) -> None:
    """Rows that leave out their own component, another, none."""
    for M, K, D in ((9, 33, 5), (17, 65, 8), (5, 2, 1)):
        case = hard_case(M, K, D)
        case = replace(case, exclude=torch.arange(M) % (K + 1) - 1)
        assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True))


def test_exclude_is_deletion(impl: str) -> None:
    """Leaving out k gives what the mixture without k gives, and -1 gives the whole, to the bit."""
    case = hard_case(9, 17, 5)
    assert case.log_weights is not None
    want, allowed = allowance(case)
    nothing = run(replace(case, exclude=torch.full((9,), -1)), impl)
    assert all(torch.equal(g, w) for g, w in zip(nothing, run(case, impl), strict=True))
    for k in (0, 3, 16):
        keep = torch.arange(17) != k
        got = run(replace(case, exclude=torch.full((9,), k)), impl, dense_backward=True)
        fewer = Case(case.z, case.mu[keep], case.logvar[keep], case.log_weights[keep], case.grad)
        want, allowed = allowance(fewer, dense_backward=True)
        kept = type(want)(got.log_prob, got.dz, got.dmu[keep], got.dlogvar[keep], got.dlog_weights[keep])
        assert_within(kept, want, allowed, f"without {k}")
        assert not got.dmu[k].any() and not got.dlogvar[k].any() and got.dlog_weights[k] == 0


def test_excluding_the_only_component(impl: str) -> None:
    """K = 1: no density is left where it is excluded, and no gradient; the other rows keep theirs."""
    case = hard_case(4, 1, 3)
    got = run(replace(case, exclude=torch.tensor([0, -1, 0, 0])), impl)
    alone = run(replace(case, z=case.z[1:2], grad=case.grad[1:2]), impl)
    assert got.log_prob[[0, 2, 3]].tolist() == [-math.inf] * 3
    assert torch.equal(got.log_prob[1:2], alone.log_prob)
    assert not got.dz[[0, 2, 3]].any()
    assert all(torch.equal(g, w) for g, w in zip(got[2:], alone[2:], strict=True))
    _, score = fastvae.mixture_log_prob_and_score(
        case.z, case.mu, case.logvar, case.log_weights, exclude=torch.zeros(4, dtype=torch.int64), impl=impl
    )
    assert not score.any()


def test_all_weights_zero(impl: str) -> None:
    for K in (1, 8, 33):
        case = hard_case(5, K, 3)
        case = replace(case, log_weights=torch.full((K,), -math.inf))
        got = run(case, impl)
        assert got.log_prob.tolist() == [-math.inf] * 5
        assert not any(g.any() for g in got[1:])  # NaN counts as true
        log_prob, score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
        assert log_prob.tolist() == [-math.inf] * 5 and not score.any()


@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
@pytest.mark.parametrize("bad", BAD)
def test_an_absent_component_may_hold_anything(impl: str, bad: float, shared: bool) -> None:
    """Weight zero: NaN and infinities in its mean and variance reach neither value nor gradient."""
    case = hard_case(9, 33, 5)
    assert case.log_weights is not None
    logvar = torch.zeros(5) if shared else case.logvar
    case = replace(case, logvar=logvar, exclude=torch.arange(9) - 1)
    absent = case.log_weights == -math.inf
    absent[8:16] = True  # a whole panel of components
    clean = replace(case, log_weights=case.log_weights.masked_fill(absent, -math.inf))
    dirty = replace(
        clean,
        mu=clean.mu.masked_fill(absent[:, None], bad),
        logvar=logvar if shared else logvar.masked_fill(absent[:, None], bad),
    )
    got = run(dirty, impl)
    assert_within(got, *allowance(clean))
    assert not got.dmu[absent].any() and not got.dlog_weights[absent].any()
    _, score = fastvae.mixture_log_prob_and_score(
        dirty.z, dirty.mu, dirty.logvar, dirty.log_weights, exclude=dirty.exclude, impl=impl
    )
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("row", [0, 4, 8])
def test_nan_poisons_its_own_row(impl: str, row: int) -> None:
    """Value, score and gradient of z: NaN in that row, the others to the bit as without it."""
    case = diffuse_case(9, 33, 5)
    args = (case.mu, case.logvar, case.log_weights)
    z = case.z.clone()
    z[row, 2] = math.nan
    others = torch.arange(9) != row
    for got, want in zip(
        fastvae.mixture_log_prob_and_score(z, *args, impl=impl),
        fastvae.mixture_log_prob_and_score(case.z, *args, impl=impl),
        strict=True,
    ):
        assert got[row].isnan().all() and torch.equal(got[others], want[others])
    got, want = run(replace(case, z=z), impl), run(case, impl)
    assert got.log_prob[row].isnan() and got.dz[row].isnan().all()
    assert torch.equal(got.log_prob[others], want.log_prob[others])
    assert torch.equal(got.dz[others], want.dz[others])


@pytest.mark.parametrize("field", ["mu", "logvar", "log_weights"])
def test_nan_in_a_component_reaches_every_row(impl: str, field: str) -> None:
    """A NaN that is there must not be lost in a maximum, whichever component holds it."""
    case = hard_case(9, 33, 5)
    for k in (0, 5, 32):
        value = getattr(case, field).clone()
        value[k] = math.nan
        got = fastvae.mixture_log_prob_and_score(
            *(value if field == name else getattr(case, name) for name in ("z", "mu", "logvar", "log_weights")),
            impl=impl,
        )
        assert got[0].isnan().all() and got[1].isnan().all(), k


def test_weights_are_used_as_given(impl: str) -> None:
    """Adding log 3 to every weight adds log 3 to the density: nothing renormalises."""
    case = hard_case(9, 17, 5, dtype=torch.float64)
    assert case.log_weights is not None
    base = run(case, impl).log_prob
    tripled = run(replace(case, log_weights=case.log_weights + math.log(3)), impl).log_prob
    # two evaluations, each wrong by a few roundings of numbers of the size of the density
    assert torch.allclose(tripled - base, torch.full_like(base, math.log(3)), atol=1e-14 * float(base.abs().max()))


def test_no_weights_means_equal_weights(impl: str) -> None:
    """-log K each: two evaluations, each within its band; the weights given are rounded once more."""
    case = diffuse_case(9, 17, 5)
    equal = replace(case, log_weights=torch.full((17,), -math.log(17)))
    limit = 2 * band(case.to(torch.float64), torch.float32).log_prob + 2**-24 * math.log(17)
    assert bool(((run(case, impl).log_prob - run(equal, impl).log_prob).abs() <= limit).all())


def test_the_same_bits_run_to_run_and_for_any_number_of_threads(impl: str) -> None:
    threads = torch.get_num_threads()
    cases = [
        hard_case(67, 300, 9),
        diffuse_case(130, 700, 20),
        diffuse_case(300, 1500, 20),
        diffuse_case(900, 90, 30),
    ]
    if interpreted(impl):  # which has no threads, and takes minutes for the large ones
        del cases[1:]
    try:
        for case in cases:
            results = []
            for n in (1, 1, 2, 3, 5) if impl == "cpu" else (threads, threads):
                torch.set_num_threads(n)
                score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
                results.append((*run(case, impl), *score))
            for other in results[1:]:
                assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that is allocated without a value holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(impl: str) -> None:
    assert torch.empty(3).isnan().all()
    many = diffuse_case(70, 130, 6) if interpreted(impl) else diffuse_case(600, 130, 20)
    for case in (hard_case(17, 65, 8), hard_case(1, 1, 1), many):
        got = run(case, impl)
        score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
        assert all(bool(torch.isfinite(g).all()) for g in (*got, *score))
        if case is not many:
            assert_within(got, *allowance(case))


@pytest.mark.parametrize("logvar", [-80.0, 80.0])
def test_variances_at_the_ends_of_float32(impl: str, logvar: float) -> None:
    """sigma = exp(+-40): its square is still a number, and so must everything be that is made of it."""
    case = diffuse_case(9, 17, 3)
    sigma = math.exp(0.5 * logvar)
    case = Case(sigma * case.z, sigma * case.mu, torch.full((17, 3), logvar), None, case.grad)
    assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True))


@pytest.mark.parametrize("logvar", [-100.0, 100.0])
def test_variances_beyond_float32(impl: str, logvar: float) -> None:
    """exp(100) is no float32, but sigma is and log p is: finite input does not make NaN."""
    mu = torch.randn(17, 3)
    want = -1.5 * (math.log(2 * math.pi) + logvar) - math.log(17)
    if logvar > 0:  # as good as flat
        want += math.log(17)
    log_prob, score = fastvae.mixture_log_prob_and_score(mu[:4], mu, torch.tensor(logvar), impl=impl)
    assert torch.allclose(log_prob, torch.full((4,), want), rtol=1e-5, atol=0)
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("gap", [3.0, 82.5, 200.0])
def test_the_largest_terms_come_last(impl: str, gap: float) -> None:
    """The first 256 components lie `gap` nats below the others: exp(gap), which may be no float32, is not summed."""
    K = 520 if interpreted(impl) else 4096
    mu = torch.zeros(K, 2)
    mu[:256, 0] = math.sqrt(2 * gap)
    case = Case(torch.full((9, 2), 0.01), mu, torch.zeros(K, 2), None, torch.ones(9))
    assert_within(run(case, impl), *allowance(case))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_more_rows_than_are_worked_on_at_a_time(dtype: torch.dtype) -> None:
    """So many, and so wide, that the kernels cut them into slabs.

    Every row is given twice, in the first half and in the second, so the two halves' results are the same,
    and the parameters' gradients are those of one half under the sum of both gradients; all of it but for
    rounding.
    """
    half = diffuse_case(150, 1024, 1000, dtype=dtype)
    twice = replace(half, z=half.z.repeat(2, 1), grad=torch.cat([half.grad, half.grad.flip(0)]))
    got, want = run(twice, "cpu"), run(replace(half, grad=half.grad + half.grad.flip(0)), "cpu")
    # sums over at most 1024 components or 300 rows of terms of at most 10 times the size of what is compared
    rounding = 10 * 1024**0.5 * torch.finfo(dtype).eps
    for part in (slice(0, 150), slice(150, 300)):
        assert torch.allclose(got.log_prob[part], want.log_prob, rtol=rounding, atol=0)
    for name in ("dmu", "dlogvar", "dlog_weights")[: 2 if half.log_weights is None else 3]:
        expected = getattr(want, name)
        assert torch.allclose(getattr(got, name), expected, rtol=rounding, atol=rounding * float(expected.abs().max()))
    alone = run(half, "cpu").dz
    assert torch.allclose(got.dz[:150], alone, rtol=rounding, atol=rounding * float(alone.abs().max()))
