"""The gradients on CUDA by sums of products, where these are certified (csrc/cuda/certificate.cuh).

In the emulation, whose tensor cores lose more digits than any device's.  All take the same log p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from budget import Case, allowance, assert_within
from emulation import cuda
from support.internals import Operators
from torch import Tensor

from fastvae import reference
from fastvae.benchmarks.inputs import concentrated, diffuse

from .test_cuda_certificate import mostly_diffuse

Backward = Callable[..., list[Tensor]]
NAMES = ("dz", "dmu", "dlogvar", "dlog_weights")
TILES = (128, 64, 64, 64)  # rows, and components, that the difference form computes together
ROUNDOFF = 2.0**-24


@pytest.fixture
def backward(emulated_tiled: Operators, monkeypatch: pytest.MonkeyPatch) -> Backward:
    """backward(case, tried) -> the four gradients; those that are not wanted are empty."""

    def run(case: Case, tried: bool, dense: bool = False, wanted: str = " ".join(NAMES)) -> list[Tensor]:
        args = case.z, case.mu, case.logvar, case.log_weights, case.exclude
        monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
        log_prob = emulated_tiled.mixture_log_prob(*args)
        monkeypatch.setenv("FASTVAE_CERTIFICATE", str(int(tried)))
        needed = [name in wanted.split() for name in NAMES]
        return list(emulated_tiled.mixture_log_prob_backward(case.grad, log_prob, *args, dense, *needed))

    return run


def wide_case(M: int, K: int, D: int) -> Case:
    """Diffuse, with upstream gradients of one sign; sigma is such that a few items are enough for the certificate."""
    inputs = diffuse(M, K, D)
    grad = -0.5 - torch.rand(M, generator=torch.Generator().manual_seed(3))
    return Case(inputs.z, inputs.mu, inputs.logvar + 1.5, inputs.log_weights, grad)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)) for a, b in zip(one, other, strict=True))


def tiles_by_products(exact: list[Tensor], got: list[Tensor]) -> list[list[bool]]:
    """Of each gradient and each of its tiles, whether it is another than the difference form's."""
    return [
        [not torch.equal(one, other) for one, other in zip(a.split(size), b.split(size), strict=True)]
        for a, b, size in zip(exact, got, TILES, strict=True)
    ]


def assert_by_products(backward: Backward, case: Case, dense: bool = False) -> None:
    """All gradients, of every tile, and within the budget."""
    exact, got = backward(case, False, dense), backward(case, True, dense)
    assert all(all(tiles) for tiles in tiles_by_products(exact, got))
    assert_gradients_within(got, case, dense)


def assert_gradients_within(got: list[Tensor], case: Case, dense: bool = False) -> None:
    want, allowed = allowance(case, dense)
    gradients = {name: gradient for name, gradient in zip(NAMES, got, strict=True) if gradient.numel()}
    assert_within(want._replace(**gradients), want, allowed)


@pytest.mark.parametrize("M, K, D", [(130, 200, 40), (70, 300, 64), (300, 50, 33), (1030, 70, 48)])
def test_diffuse_inputs(M: int, K: int, D: int, backward: Backward) -> None:
    """Tiles that are not whole, splits of the rows, lines of features that are not whole."""
    case = wide_case(M, K, D)
    assert_by_products(backward, replace(case, exclude=torch.arange(M) % (K + 1) - 1))
    assert_by_products(backward, replace(case, grad=-case.grad), dense=True)


def test_what_benchmarks_call_diffuse(backward: Backward) -> None:
    """With more rows, or components, the tests allow sums more."""
    for M, K, wanted in ((1030, 70, "dmu dlogvar dlog_weights"), (70, 1100, "dz")):
        case = wide_case(M, K, 64)
        case = replace(case, logvar=case.logvar - 1.5)
        exact, got = backward(case, False, wanted=wanted), backward(case, True, wanted=wanted)
        assert all(all(tiles) for tiles in tiles_by_products(exact, got)[wanted != "dz" :][: len(wanted.split())])
        assert_gradients_within(got, case)


def test_every_dimension_in_units_of_its_own(backward: Backward) -> None:
    case, unit = wide_case(130, 200, 40), torch.logspace(-6, 6, 40)
    assert_by_products(backward, replace(case, z=case.z * unit, mu=case.mu * unit, logvar=case.logvar + 2 * unit.log()))


def test_shared_variance_and_equal_weights(backward: Backward) -> None:
    case = wide_case(130, 200, 40)
    shared = replace(case, logvar=torch.linspace(1, 2, 40)[None])
    exact, got = backward(shared, False), backward(shared, True)
    assert not any(torch.equal(a, b) for a, b in zip(exact, got, strict=True))
    assert_gradients_within(got, shared)
    plain = replace(case, log_weights=None)
    got = backward(plain, True, wanted="dz dmu dlogvar")
    exact = backward(plain, False, wanted="dz dmu dlogvar")
    assert not any(torch.equal(a, b) for a, b in zip(exact[:2], got[:2], strict=True))
    assert_gradients_within(got, plain)


@pytest.mark.parametrize("wanted", [*NAMES, "dz dmu dlog_weights"])
def test_any_gradients_alone(wanted: str, backward: Backward) -> None:
    for case in (wide_case(130, 100, 40), replace(wide_case(130, 100, 40), logvar=torch.full((1, 40), 1.5))):
        every = backward(case, True, wanted=" ".join(NAMES))
        got, exact = backward(case, True, wanted=wanted), backward(case, False, wanted=wanted)
        for name, a, b, c in zip(NAMES, got, every, exact, strict=True):
            if name in wanted.split():
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
                assert not torch.equal(a, c), name


def test_absent_components_and_rows_without_density(backward: Backward) -> None:
    case = wide_case(130, 200, 40)
    assert case.log_weights is not None
    mu, logvar, log_weights, z = case.mu.clone(), case.logvar.clone(), case.log_weights.clone(), case.z.clone()
    for k, value in ((0, math.nan), (50, math.inf), (199, -math.inf)):
        mu[k], logvar[k], log_weights[k] = value, value, -math.inf
    z[9, 5] = math.inf
    got = backward(replace(case, z=z, mu=mu, logvar=logvar, log_weights=log_weights), True)
    assert torch.equal(got[0][9], torch.zeros(40))
    plain = replace(case, mu=mu.nan_to_num(0, 0, 0), logvar=logvar.nan_to_num(0, 0, 0), log_weights=log_weights)
    kept = torch.arange(130) != 9
    plain = replace(plain, z=case.z[kept], grad=case.grad[kept])
    got[0] = got[0][kept]
    assert_gradients_within(got, plain)
    exact = backward(plain, False)
    assert not torch.equal(got[0], exact[0]) and not torch.equal(got[1], exact[1])


def one_gradient(case: Case) -> Case:
    return replace(case, grad=case.grad * (torch.arange(len(case.grad)) == 77))


def few_rows(case: Case) -> Case:
    """Nearly all weight of each component is that of a few rows, and the others are not 0."""
    return replace(case, grad=case.grad * torch.where(torch.arange(len(case.grad)) % 40 == 7, 1.0, 1e-4))


def mixed_signs(case: Case) -> Case:
    return replace(case, grad=case.grad * torch.where(torch.arange(len(case.grad)) == 77, -1e-3, 1.0))


def narrow(case: Case) -> Case:
    return replace(case, logvar=case.logvar - 6)


def not_a_number(case: Case) -> Case:
    z, grad = case.z.clone(), case.grad.clone()
    z[5, 3] = math.nan
    grad[5] = 0.0
    return replace(case, z=z, grad=grad)


def infinite_gradient(case: Case) -> Case:
    return replace(case, grad=case.grad.index_fill(0, torch.tensor(5), -math.inf))


def far_row(case: Case) -> Case:
    return replace(case, z=case.z.index_fill(0, torch.tensor(5), 20.0))


def few_components(case: Case) -> Case:
    """Nearly all density of each row is that of a few components."""
    return replace(case, log_weights=torch.where(torch.arange(len(case.mu)) % 40 == 7, 0.0, -9.0))


@pytest.mark.parametrize("change", [narrow, not_a_number, infinite_gradient, far_row], ids=lambda case: case.__name__)
def test_where_it_gives_up_the_difference_form_computes_all(
    change: Callable[[Case], Case], backward: Backward, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = change(wide_case(130, 200, 40))
    assert same_bits(backward(case, False), backward(case, True))
    monkeypatch.setenv("FASTVAE_SCREEN", "1")
    assert same_bits(backward(case, False), backward(case, True))
    if bool(case.z.isfinite().all() & case.grad.isfinite().all()):
        assert_gradients_within(backward(case, True), case)


@pytest.mark.parametrize(
    "change", [one_gradient, few_rows, mixed_signs, few_components], ids=lambda change: change.__name__
)
def test_where_one_side_gives_up_the_other_does_not(change: Callable[[Case], Case], backward: Backward) -> None:
    case = change(wide_case(130, 200, 40))
    exact, got = backward(case, False), backward(case, True)
    of_rows, of_components = (exact[:1], got[:1]), (exact[1:], got[1:])
    given_up, by_products = (of_rows, of_components) if change is few_components else (of_components, of_rows)
    assert same_bits(*given_up) and not same_bits(*by_products)
    assert_gradients_within(got, case)


def test_rows_too_large_for_features_are_left_to_the_difference_form(backward: Backward) -> None:
    """Five rows 2^98 times as far out as the others, all of a component that is as wide."""
    case = wide_case(130, 65, 20)
    far = torch.arange(130) % 32 == 5
    size = torch.where(far, 2.0**40, math.exp(-40))[:, None]
    z = torch.where(far[:, None], case.z.abs(), case.z) * size
    logvar = (case.logvar - 80).index_fill(0, torch.tensor(64), 80 * math.log(2))
    case = replace(case, z=z, mu=case.mu * math.exp(-40), logvar=logvar)
    for wanted in ("dmu", "dmu dlogvar dlog_weights"):
        assert_gradients_within(backward(case, True, wanted=wanted), case)


def test_what_cancels_is_computed_in_the_difference_form(backward: Backward) -> None:
    """With the others of its tile of 64 components or 128 rows, and no more."""
    case = wide_case(130, 300, 40)
    logvar, mu = case.logvar.clone(), case.mu.clone()
    logvar[70], mu[70] = -4.0, case.z[3]
    case = replace(case, logvar=logvar, mu=mu)
    exact, got = backward(case, False), backward(case, True)
    of_rows, *of_components = tiles_by_products(exact, got)
    assert of_components == [[tile != 1 for tile in range(5)]] * 3
    assert of_rows == [False, True]  # row 3 has nearly all of its density there, and z - mu is 0
    assert_gradients_within(got, case)


def test_single_weights_are_computed_in_the_difference_form(backward: Backward) -> None:
    """Of a few narrow components, or where few pairs count.  Sums of weights alone do not cancel."""
    case = mostly_diffuse()
    case = replace(case, grad=-case.grad.abs())
    wanted = "dlog_weights"
    exact, got = backward(case, False, wanted=wanted)[3], backward(case, True, wanted=wanted)[3]
    assert not torch.equal(exact, got)
    want, allowed = allowance(case)
    assert_within(want._replace(dlog_weights=got), want, allowed)
    args = case.z, case.mu, case.logvar, case.log_weights, case.exclude
    high = cuda.operators("cuda-high")
    of_products = high.mixture_log_prob_backward(case.grad, want.log_prob.float(), *args, False, *[False] * 3, True)[3]
    ratio = ((of_products - want.dlog_weights).abs() / allowed.dlog_weights).max()
    assert float(ratio) > 1  # else the case tests nothing
    case = narrow(wide_case(130, 200, 40))
    want, allowed = allowance(case)
    assert_within(want._replace(dlog_weights=backward(case, True, wanted=wanted)[3]), want, allowed)


def test_after_the_screen(backward: Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes first.  Where it gives up, products follow; else they have nothing to do."""
    inputs = concentrated(130, 300, 40)
    trained = Case(inputs.z, inputs.mu, inputs.logvar, inputs.log_weights, torch.ones(130))
    case, every = wide_case(130, 200, 40), " ".join(NAMES)
    products = backward(case, True)
    monkeypatch.setenv("FASTVAE_SCREEN", "1")
    assert same_bits(backward(trained, False, wanted=every), backward(trained, True, wanted=every))
    after, differences = backward(case, True, wanted=every), backward(case, False, wanted=every)
    assert same_bits(after, products) and not any(torch.equal(a, b) for a, b in zip(after, differences, strict=True))


@pytest.mark.parametrize("order", ["descending", "shuffled"])
def test_no_thread_depends_on_when_another_runs(
    order: str, backward: Backward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By products, with single pairs and a tile in the difference form, and given up."""
    some = wide_case(130, 200, 40)
    logvar, mu = some.logvar.clone(), some.mu.clone()
    logvar[70], mu[70] = -4.0, some.z[3]
    for case in (wide_case(300, 70, 40), replace(some, logvar=logvar, mu=mu), narrow(some), mixed_signs(some)):
        results = []
        for each in ("ascending", order):
            monkeypatch.setenv("FASTVAE_EMULATION_ORDER", each)
            results.append(backward(case, True))
        assert same_bits(*results)


@pytest.mark.parametrize("size", [1e-33, 1e30])
def test_gradients_of_any_size_keep_their_digits(size: float, backward: Backward) -> None:
    case = wide_case(130, 100, 40)
    plain, scaled = backward(case, True), backward(replace(case, grad=case.grad * size), True)
    for one, other in zip(plain[1:], scaled[1:], strict=True):
        torch.testing.assert_close(other.double() / size, one.double(), rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("mean", ["one number", "ties", "two numbers"])
def test_scores_lose_no_more_than_their_bounds(mean: str, backward: Backward) -> None:
    """Where all components are alike that count, the score is v (mu - z), whatever the responsibilities.

    The origin is 0, because there is a component without weight at -mu for each.
    """
    M, K, D, rng = 65, 1000, 40, torch.Generator().manual_seed(0)
    mu = 0.2 + torch.rand(1, D, generator=rng)
    if mean == "ties":
        mu = (1 + 2.0**-11 + 2.0**-20 + 2.0**-22) * torch.exp2(torch.randint(-2, 1, (1, D), generator=rng).float())
    means = torch.cat([mu, -mu]).repeat(K // 2, 1)
    if mean == "two numbers":
        means[2::4] *= 1 + 2.0**-12
    log_weights = torch.where(torch.arange(K) % 2 == 0, 0.0, -60.0) + torch.rand(K, generator=rng)
    z = (3 + torch.rand(M, D, generator=rng)) * torch.randn(M, D, generator=rng).sign()
    case = Case(z, means, torch.full((K, D), 2.5), log_weights, torch.ones(M))
    got, exact = backward(case, True)[0], backward(case, False)[0]
    assert not torch.equal(got, exact)

    v, logvar = math.exp(-2.5), case.logvar.double()
    r = torch.softmax(reference.component_log_prob(z.double(), means.double(), logvar, log_weights.double()), 1)
    m1, m2 = r @ means.double(), r @ means.double() ** 2
    each = 28 + math.sqrt(K / 32 + 1) + 1
    bound = v * (each * m2.sqrt() + 12 * m1.abs() + (each + 12) * z.abs()) * ROUNDOFF
    worst = float(((got - v * (m1 - z)).abs() / bound).max())
    assert 0.01 < worst <= 1, worst


@pytest.mark.parametrize("rows", ["one number", "ties", "two numbers"])
def test_sums_lose_no_more_than_their_bounds(rows: str, backward: Backward) -> None:
    """Where all rows are alike, S1 and S2 are z' and z'^2 times S0, whatever the weights; all features are off alike.

    The origin is 0: the first component is there, and the others come in pairs.
    """
    M, K, D, rng = 1000, 65, 40, torch.Generator().manual_seed(0)
    pairs = (2 + torch.rand(K // 2, D, generator=rng)) * torch.randn(K // 2, D, generator=rng).sign()
    mu = torch.cat([torch.zeros(1, D), torch.stack([pairs, -pairs], 1).flatten(0, 1)])
    row = 0.2 + torch.rand(1, D, generator=rng)
    if rows == "ties":
        row = (1 + 2.0**-11 + 2.0**-20 + 2.0**-22) * torch.exp2(torch.randint(-2, 1, (1, D), generator=rng).float())
    z = row.expand(M, D).clone()
    if rows == "two numbers":
        z[1::2] *= 1 + 2.0**-12
    grad = torch.rand(M, generator=rng) + 0.5
    case = Case(z, mu, torch.full((K, D), 2.5), torch.zeros(K), grad)
    got, exact = backward(case, True), backward(case, False)
    assert not any(torch.equal(a, b) for a, b in zip(got[1].split(64), exact[1].split(64), strict=True))

    # S0, from dlog_weights, is off by a weight's error, which all sums share where the rows are alike
    v, s0 = math.exp(-2.5), got[3].double()[:, None]
    weights = grad.double()[:, None] * torch.softmax(
        reference.component_log_prob(*(t.double() for t in (z, mu, case.logvar, case.log_weights))), 1
    )
    mean, square = (weights.T @ z.double() ** n / weights.sum(0)[:, None] for n in (1, 2))
    each = 28 + math.sqrt(M / 32 + 1) + 1
    e0, e1, e2 = 12.0, each * square.sqrt(), each * square
    off = (got[1].double() / v - (mean - mu) * s0).abs() / s0 / ROUNDOFF
    bound = e1 + mu.abs() * e0
    second = (2 * got[2].double() + s0) / v
    square_off = (second - (square - 2 * mu * mean + mu.double() ** 2) * s0).abs() / s0 / ROUNDOFF
    square_bound = e2 + 2 * mu.abs() * e1 + mu**2 * e0 + 12 / v
    worst = float((off / bound).max()), float((square_off / square_bound).max())
    assert 0.02 < worst[0] <= 1 and 0.02 < worst[1] <= 1, worst
