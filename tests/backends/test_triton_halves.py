"""Triton's lower precisions where fp16's range would end: in a row, a component, a dimension, a weight, a unit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from budget import Case, assert_within, difference, diffuse_case, hard_case, run
from pairs import MAKERS, Maker, equally_weighted
from product_budget import LOWER, design_case, exponent_band, floor_band, product_band, run_at
from support.backend import device_of
from support.internals import interpreted
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastvae import reference
from fastvae.backends import triton as kernels

pytestmark = pytest.mark.usefixtures("triton")
halves, product = kernels.load("halves"), kernels.load("product")
operands, tiles = kernels.load("mixture_operands"), kernels.load("tiles")


@triton.jit
def _product_kernel(a, b, out, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    r, i, c = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, COLUMNS)
    x = tl.load(a + r[:, None] * INNER + i[None, :])
    y = tl.load(b + c[:, None] * INNER + i[None, :])
    product = tl.dot(x, tl.trans(y), tl.zeros((ROWS, COLUMNS), tl.float32))
    tl.store(out + r[:, None] * COLUMNS + c[None, :], product)


@triton.jit
def _pair_kernel(x, high, low, scale, inverse, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    down, up = halves.scales(tl.max(tl.abs(value), 0))
    first, second = halves.to_pair(value * down)
    tl.store(high + at, first)
    tl.store(low + at, second)
    tl.store(scale, up)
    tl.store(inverse, halves.reciprocal(up))


def pair(x: Tensor) -> tuple[Tensor, float]:
    """What a pair stands for, as float64, and its power of two."""
    device, n = device_of("triton"), len(x)
    high, low = torch.empty(2, n, dtype=torch.float16, device=device)
    scale, inverse = torch.empty(2, device=device)
    _pair_kernel[(1,)](x.to(device), high, low, scale.view(1), inverse.view(1), SIZE=n)
    assert float(scale) * float(inverse) == 1.0 and math.frexp(float(scale))[0] == 0.5
    assert bool(high.isfinite().all() and low.isfinite().all())
    return (high.cpu().double() + low.cpu().double() / 2048) * float(scale), float(scale)


@triton.jit
def _exponents_kernel(
    x_high, x_low, x_scale, row_term, y_high, y_low, y_scale, c, out, F,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    a = product._exponents(x_high, x_low, y_high, y_low, rows, columns, F, WIDTH, PARTS)
    a = a * tl.load(y_scale + columns)[None, :] * tl.load(x_scale + rows)[:, None]
    a += tl.load(c + columns)[None, :] + tl.load(row_term + rows)[:, None]
    tl.store(out + rows[:, None] * COLUMNS + columns[None, :], a)


def exponents(case: Case, precision: str) -> Tensor:
    """Of all pairs [M, K], by the operands and the products of forward."""
    device, (M, K, D) = device_of("triton"), (len(case.z), *case.mu.shape)
    problem = operands.Problem(
        precision, *(t.to(device) for t in (case.z, case.mu, case.logvar, case.log_weights)), None
    )
    tile = tiles.Tile(M, K, min(tiles.MAX_DIMS, tiles.padded_dimensions(precision, D)), 4, 1)
    survey = operands.survey_components(problem)
    components = operands.pack_components(problem, survey, tile, squares=True, skipping=False)
    rows, out = operands.pack_rows(problem, survey, tile, squares=True), torch.empty(M, K, device=device)
    _exponents_kernel[(1,)](
        *rows.operand, rows.term, *components.operand, components.c, out, components.operand.width,
        PARTS=problem.parts, WIDTH=2 * tile.dims, ROWS=M, COLUMNS=K,
    )  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_the_bound_on_a_pairs_exponent_holds(maker: Maker) -> None:
    """All makers together, 10^5 pairs at each precision; and the bound of "high" is one that "medium" breaks."""
    for D in (1, 16, 40, 100):
        case = equally_weighted(maker, 128, 32, D)
        exact = case.to(torch.float64)
        a = reference.component_log_prob(exact.z, exact.mu, exact.logvar, exact.log_weights)
        errors = {precision: difference(exponents(case, precision), a) for precision in LOWER}
        for precision, error in errors.items():
            worst = float((error / (exponent_band(exact, precision) + floor_band(exact, precision))).max())
            assert worst <= 1, f"{precision} D={D}: {worst} times the bound"
        assert bool((errors["medium"] > exponent_band(exact, "high")).any())


def test_products_of_fp16_numbers_are_float32_sums() -> None:
    """Subnormal operands count, nothing is rounded to fp16 on the way, and a large sum does not overflow."""
    rng = torch.Generator().manual_seed(0)
    a = (torch.randn(16, 64, generator=rng) * 2.0 ** torch.randint(-24, 13, (16, 64), generator=rng)).half()
    b = (torch.randn(32, 64, generator=rng) * 2.0 ** torch.randint(-24, 13, (32, 64), generator=rng)).half()
    assert bool(((a != 0) & (a.abs() < 2.0**-14)).any())
    out = torch.empty(16, 32, device=device_of("triton"))
    _product_kernel[(1,)](a.to(out.device), b.to(out.device), out, ROWS=16, INNER=64, COLUMNS=32)
    terms = a.double()[:, None] * b.double()[None]
    # interpreted, 64 roundings of float32; a tensor core cuts off four or more sums at 2^-23
    allowed = 2.0**-24 * (64 if interpreted() else 16) * terms.abs().sum(-1)
    assert bool(((out.cpu().double() - terms.sum(-1)).abs() <= allowed).all())
    assert float(out.abs().max()) > 65504


@pytest.mark.parametrize("size", [2.0**-100, 1e-20, 1.0, 3e4, 1e30])
def test_a_pair_has_22_digits_and_a_range_of_50(size: float) -> None:
    """Numbers over 60 binades under the largest: 2^-23 of itself, or 2^-50 of the largest."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=rng) * 2.0 ** torch.randint(-60, 1, (1024,), generator=rng) * size
    got, scale = pair(x)
    largest = float(x.abs().max())
    assert 2.0**14 <= largest / scale < 2.0**15
    error, exact = (got - x.double()).abs(), x.double().abs()
    assert bool((error <= torch.maximum(2.0**-23 * exact, torch.tensor(2.0**-50 * largest))).all())
    assert bool((error > 2.0**-25 * exact).any())  # the bound is not idle


def test_a_pair_of_nothing_is_zero() -> None:
    got, _ = pair(torch.zeros(16))
    assert not got.any()


def check(case: Case, precision: str, what: str = "") -> None:
    """Value and all gradients within the band of the product form, which knows of no range."""
    exact = case.to(torch.float64)
    assert_within(run_at(case, precision), run(exact, "reference"), product_band(exact, precision), what)


def outlier_case(sigma: float, dims: slice) -> Case:
    """diffuse_case with one component, and a row in it, that is narrow in some dimensions."""
    case = diffuse_case(40, 70, 20)
    case.logvar[3, dims] = 2 * math.log(sigma)
    case.z[5] = case.mu[3] + torch.exp(0.5 * case.logvar[3]) * torch.randn(20)
    return replace(case, log_weights=torch.log_softmax(torch.randn(70), 0))


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("dims", [slice(None), slice(1), slice(10)], ids=["all", "one", "half"])
@pytest.mark.parametrize("sigma", [1e-3, 1e-6, 1e3])
def test_one_narrow_component_costs_the_others_nothing(precision: str, sigma: float, dims: slice) -> None:
    check(outlier_case(sigma, dims), precision)


@pytest.mark.parametrize("precision", LOWER)
def test_one_far_row_costs_the_others_nothing(precision: str) -> None:
    """Not a bit of their values; and the parameters' gradients, in which it is, stay within the budget."""
    case = outlier_case(0.5, slice(None))
    far = replace(case, z=case.z.clone())
    far.z[7] = 1e4
    others = torch.arange(40) != 7
    got, with_far = run_at(case, precision), run_at(far, precision)
    assert torch.equal(got.log_prob[others], with_far.log_prob[others])
    assert torch.equal(got.dz[others], with_far.dz[others])
    check(far, precision)


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("unit", [1e-4, 1e4, 1e-9, 1e9, "mixed"], ids=str)
def test_units_do_not_matter(precision: str, unit: float | str) -> None:
    """z, mu and sigma in another unit, or in one for each dimension: log p moves by a constant, and no error grows."""
    case = design_case(-2, 1, K=100)
    D = case.z.shape[1]
    units = 10.0 ** torch.linspace(-5, 5, D) if unit == "mixed" else torch.full((D,), float(unit))
    scaled = replace(case, z=case.z * units, mu=case.mu * units, logvar=case.logvar + 2 * units.log())
    check(scaled, precision)


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8])
def test_the_size_of_the_incoming_gradient_does_not_matter(precision: str, size: float) -> None:
    """Also not where it differs from row to row."""
    case = design_case(-2, 1, K=100)
    check(replace(case, grad=case.grad * size), precision)
    check(replace(case, grad=case.grad * torch.where(torch.arange(40) % 2 == 0, size, 1.0)), precision)


@pytest.mark.parametrize(
    ("precision", "shape"),
    [*(("high", shape) for shape in ((40, 60, 5), (40, 100, 20), (20, 40, 70))), ("medium", (40, 60, 5))],
    ids=str,
)
def test_hard_cases_are_within_the_budget(precision: str, shape: tuple[int, int, int]) -> None:
    """sigma from 1e-3 to 1e3 in every dimension and component, rows fifty sigmas away; present components alone.

    Features of one row then span 2^40 and more, which is beyond what "medium" has room for.
    """
    case = hard_case(*shape)
    assert case.log_weights is not None
    there = case.log_weights > -math.inf
    present = (case.mu[there], case.logvar[there], case.log_weights[there])
    check(replace(case, mu=present[0], logvar=present[1], log_weights=present[2]), precision)


@pytest.mark.parametrize("precision", LOWER)
def test_far_tails(precision: str) -> None:
    """Rows out to 1e4 standard deviations, where log p is -1e9."""
    case = outlier_case(0.5, slice(None))
    check(replace(case, z=case.z * 10.0 ** torch.linspace(0, 4, 40)[:, None]), precision)


@pytest.mark.parametrize("precision", LOWER)
def test_a_single_component_at_its_own_mean(precision: str) -> None:
    """All features of the components are then zero, or a rounding."""
    case = Case(torch.randn(5, 7), torch.randn(1, 7), torch.randn(1, 7), torch.zeros(1), torch.ones(5))
    check(case, precision)
    check(replace(case, mu=case.mu.expand(3, 7).clone(), logvar=case.logvar.expand(3, 7).clone(),
                  log_weights=torch.zeros(3)), precision)  # fmt: skip
