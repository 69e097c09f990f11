"""Values and gradients of the mixture density against float64, within the error budget of budget.py."""

from __future__ import annotations

import math
import random

import pytest
import torch
from budget import (
    Case,
    allowance,
    assert_within,
    band,
    difference,
    diffuse_case,
    hard_allowance,
    hard_case,
    run,
    worst,
)
from support.backend import few_shapes, interpreted
from torch import Tensor

import fastvae

ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 17)
COMPONENTS = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 2000)
DIMENSIONS = (1, 2, 3, 8, 40, 64, 65, 257)
SHAPES = {
    "rows x components": [(M, K, 5) for M in ROWS for K in COMPONENTS],
    "components x dimensions": [(9, K, D) for K in COMPONENTS[:-1] for D in DIMENSIONS],
    "rows x dimensions": [(M, 33, D) for M in ROWS for D in DIMENSIONS],
}
# Where shapes are to be few: around each edge of interpreted tiles of 16 x 64, of four dimensions and of 64, and one of
# everything; parts that are merged, of components and of rows.
FEW_SHAPES = {
    "rows x components": [
        (0, 7, 5),
        (1, 1, 5),
        (3, 63, 5),
        (15, 64, 5),
        (16, 65, 5),
        (17, 2, 5),
        (2, 300, 5),
        (70, 3, 5),
    ],
    "components x dimensions": [(9, 1, 1), (9, 15, 3), (9, 31, 4), (9, 65, 8), (9, 7, 65)],
    "rows x dimensions": [(1, 33, 2), (17, 33, 40), (5, 33, 64), (0, 33, 3), (1, 2, 257)],
}


def shapes(axes: str, impl: str) -> list[tuple[int, int, int]]:
    return (FEW_SHAPES if few_shapes(impl) else SHAPES)[axes]


def between(rng: random.Random, edges: tuple[int, ...], most: int) -> int:
    """A number up to `most` that is none of the edges."""
    return rng.choice([n for n in range(min(edges) + 1, most + 1) if n not in edges])


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@dtypes
@pytest.mark.parametrize("axes", SHAPES)
def test_hard_inputs_around_every_tile_edge(impl: str, axes: str, dtype: torch.dtype) -> None:
    for M, K, D in shapes(axes, impl):
        case, want, allowed = hard_allowance(M, K, D, dtype, dense_backward=True)
        assert_within(run(case, impl, dense_backward=True), want, allowed, f"M={M} K={K} D={D}")


@dtypes
def test_random_shapes_with_the_default_backward(impl: str, dtype: torch.dtype) -> None:
    """Shapes that the test above leaves out, up to several batches of panels; what may be skipped is."""
    rng = random.Random(1)
    count, most_components, widest = (4, 150, 25) if few_shapes(impl) else (25, 400, 90)
    for _ in range(count):
        M, K = between(rng, ROWS, 40), between(rng, COMPONENTS, most_components)
        D = between(rng, DIMENSIONS, widest)
        case, want, allowed = hard_allowance(M, K, D, dtype, dense_backward=False)
        assert_within(run(case, impl), want, allowed, f"M={M} K={K} D={D}")


@dtypes
def test_diffuse_inputs(impl: str, dtype: torch.dtype) -> None:
    """Uniform weights, where every component counts and nothing may be left out."""
    for M, K, D in ((17, 130, 12) if interpreted(impl) else (33, 500, 40), (9, 33, 2)):
        case = diffuse_case(M, K, D, dtype=dtype)
        assert_within(run(case, impl), *allowance(case), f"M={M} K={K} D={D}")


@dtypes
def test_score(impl: str, dtype: torch.dtype) -> None:
    """mixture_log_prob_and_score computes the score on the way forward, by another route than backward."""
    many, wide = (200, 65) if few_shapes(impl) else (2000, 257)
    for M, K, D in ((1, 1, 1), (9, 33, 8), (17, 65, 40), (8, many, 5), (3, 31, wide), (0, 7, 3)):
        case = hard_case(M, K, D, dtype=dtype)
        case = Case(case.z, case.mu, case.logvar, case.log_weights, torch.ones_like(case.grad))
        want, allowed = allowance(case, dense_backward=True)
        log_prob, score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
        assert not score.requires_grad
        rest = want[2:]
        assert_within(type(want)(log_prob, score, *rest), want, allowed, f"M={M} K={K} D={D}")


@dtypes
def test_gradient_of_z_alone(impl: str, dtype: torch.dtype) -> None:
    """Where z alone needs a gradient it is the score that forward computed."""
    for M, K, D in ((9, 33, 8), (17, 200 if interpreted(impl) else 2000, 5)):
        case, want, allowed = hard_allowance(M, K, D, dtype, dense_backward=True)
        z = case.z.clone().requires_grad_()
        log_prob = fastvae.mixture_log_prob(z, case.mu, case.logvar, case.log_weights, impl=impl)
        (dz,) = torch.autograd.grad(log_prob, z, case.grad)
        assert_within(type(want)(log_prob.detach(), dz, *want[2:]), want, allowed, f"M={M} K={K} D={D}")


def test_log_prob_and_score_has_the_gradients_of_log_prob(impl: str) -> None:
    case, want, allowed = hard_allowance(9, 33, 8, torch.float32, dense_backward=True)
    leaves = [v.clone().requires_grad_() for v in (case.z, case.mu, case.logvar, case.log_weights)]
    log_prob, _ = fastvae.mixture_log_prob_and_score(*leaves, dense_backward=True, impl=impl)
    grads = torch.autograd.grad(log_prob, leaves, case.grad)
    assert_within(type(want)(log_prob.detach(), *grads), want, allowed)


@dtypes
def test_a_narrow_component_far_from_zero(impl: str, dtype: torch.dtype) -> None:
    """K = 1 and D = 1: |mu| s = 1e5, so one rounding of mu s is all that the band has to give."""
    z = torch.tensor([[100.0], [100.001], [100.05], [-100.0], [0.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    case = Case(z, 100 * one, 2 * math.log(1e-3) * one, None, torch.ones(5, dtype=dtype))
    assert_within(run(case, impl), *allowance(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    """The density of the upcast inputs, to the bit; gradients come back in the inputs' own dtype."""
    case = diffuse_case(9, 33, 8, dtype=dtype)
    got, upcast = run(case, impl), run(case.to(torch.float32), impl)
    assert got.log_prob.dtype == torch.float32
    assert torch.equal(got.log_prob, upcast.log_prob)
    for g, w in zip(got[1:4], upcast[1:4], strict=True):
        assert g.dtype == dtype and torch.equal(g, w.to(dtype))


def test_one_float64_argument_makes_it_float64(impl: str) -> None:
    case = diffuse_case(5, 7, 3)
    got = fastvae.mixture_log_prob(case.z, case.mu.double(), case.logvar, impl=impl)
    want = fastvae.mixture_log_prob(case.z.double(), case.mu.double(), case.logvar.double(), impl=impl)
    assert got.dtype == torch.float64 and torch.equal(got, want)


def expansion(case: Case) -> Tensor:
    """log p(z) from z^2 s^2 - 2 z mu s^2 + mu^2 s^2: two matrix products, what one would write for speed."""
    assert case.log_weights is not None
    precision = torch.exp(-case.logvar)
    square = case.z.square() @ precision.T - 2 * case.z @ (case.mu * precision).T
    square = square + (case.mu.square() * precision).sum(-1)
    constant = case.log_weights - 0.5 * (case.logvar.sum(-1) + case.z.shape[1] * math.log(2 * math.pi))
    return torch.logsumexp(constant - 0.5 * square, -1)


@pytest.mark.parametrize("logvar", [-6.0, -4.0])
def test_the_expansion_fails_the_budget(logvar: float) -> None:
    """The budget is of use only if the cheaper, unstable formula is outside it on ordinary inputs."""
    rng = torch.Generator().manual_seed(0)
    mu = torch.randn(500, 40, generator=rng)
    z = mu[:200] + math.exp(0.5 * logvar) * torch.randn(200, 40, generator=rng)
    weights = torch.full((500,), -math.log(500))
    case = Case(z, mu, torch.full((500, 40), logvar), weights, torch.ones(200))
    want, allowed = allowance(case)
    assert float((difference(expansion(case), want.log_prob) / allowed.log_prob).max()) > 1.5
    assert_within(run(case, "composite"), want, allowed)


def test_the_budget_notices_a_part_in_a_hundred_thousand() -> None:
    """The band is tight: a variance, a mean or a weight off by 1e-5 of itself is outside it."""
    case = diffuse_case(17, 33, 8)
    case = Case(case.z, case.mu, case.logvar, torch.full((33,), -math.log(33)), case.grad)
    want, allowed = allowance(case)
    for field, factor in (("mu", 1e-5), ("logvar", 1e-5), ("log_weights", 1e-5)):
        wrong = {**case.__dict__, field: getattr(case, field) * (1 + factor)}
        if field == "logvar":
            wrong[field] = case.logvar + factor
        assert max(worst(run(Case(**wrong), "composite"), want, allowed).values()) > 1, field


def test_the_band_is_a_few_roundings() -> None:
    """On ordinary inputs no row's band exceeds 1e-4 nats, at D = 40 where log p is about -60."""
    case = diffuse_case(17, 100, 40)
    assert float(band(case.to(torch.float64), torch.float32).log_prob.max()) < 1e-4
