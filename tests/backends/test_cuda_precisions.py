"""Precision "high" and "medium" of the CUDA kernels: their error bounds, and what the contract asks of them too.

tests/products.py derives the bounds.  On a CPU the kernels are emulated, with tensor cores that cut sums off more than
any device does.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from budget import Case, Result, allowance, assert_within, difference, diffuse_case, hard_case, run
from core.test_operators import inputs
from emulation import cuda
from pairs import MAKERS, Maker, equally_weighted
from products import exponent_band, product_band
from support import internals
from support.internals import Operators
from torch import Tensor, nn

import fastvae
from fastvae import reference

from .test_cuda import everything, kl_and_gradients
from .test_mixture_edges import with_nan

LOWER = ("high", "medium")
tiled = pytest.mark.usefixtures("emulated_tiled")
each_precision = pytest.mark.parametrize("precision", LOWER)


def run_at(case: Case, precision: str, dense: bool = False) -> Result:
    with fastvae.use_backend(precision=precision):
        return run(case, "cuda", dense)


def log_prob_at(case: Case, precision: str) -> Tensor:
    """Where nothing wants a gradient."""
    arguments = case.z, case.mu, case.logvar, case.log_weights
    return fastvae.mixture_log_prob(*arguments, exclude=case.exclude, precision=precision, impl="cuda")


def assert_within_products(case: Case, precision: str, dense: bool = False, what: str = "") -> None:
    exact = case.to(torch.float64)
    want, allowed = run(exact, "reference"), product_band(exact, precision)
    assert_within(run_at(case, precision, dense), want, allowed, what)
    assert bool((difference(log_prob_at(case, precision), want.log_prob) <= allowed.log_prob).all()), what


@tiled
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_the_bound_on_a_pairs_exponent_holds(maker: Maker) -> None:
    """All makers together, 10^5 pairs at each precision; and the bound of "high" is one that "medium" breaks.

    A row's density is the exponent of one component, where all others have a weight of exp(-1e30).
    """
    M, K, broken = 512, 24, 0
    for D in (1, 7, 16, 40, 64, 100):
        case = equally_weighted(maker, M, K, D)
        exact = case.to(torch.float64)
        a = reference.component_log_prob(exact.z, exact.mu, exact.logvar, exact.log_weights)
        bands = {precision: exponent_band(exact, precision) for precision in LOWER}
        for k in range(0, K, 5):
            alone = replace(case, log_weights=torch.full((K,), -1e30).index_fill(0, torch.tensor(k), 0.0))
            errors = {precision: difference(log_prob_at(alone, precision), a[:, k]) for precision in LOWER}
            for precision, error in errors.items():
                worst = float((error / bands[precision][:, k]).max())
                assert worst <= 1, f"{precision} D={D} k={k}: {worst} times the bound"
            broken += int((errors["medium"] > bands["high"][:, k]).sum())
    assert broken > M


# Values and gradients.


@tiled
@pytest.mark.parametrize("D", [1, 8, 9, 40, 64])
def test_high_is_as_exact_as_highest_on_diffuse_inputs(D: int) -> None:
    """The budget of the difference form, for the value alone and with all gradients; it is one that "medium" breaks."""
    case = diffuse_case(60, 150, D)
    want, allowed = allowance(case)
    assert_within(run_at(case, "high"), want, allowed)
    assert bool((difference(log_prob_at(case, "high"), want.log_prob) <= allowed.log_prob).all())
    assert bool((difference(log_prob_at(case, "medium"), want.log_prob) > 10 * allowed.log_prob).any())


def clustered_case(M: int, K: int, D: int) -> Case:
    """Responsibilities that are neither flat nor one-hot, sigmas and weights of all sizes; no far rows."""
    case = hard_case(M, K, D, seed=1)
    rng = torch.Generator().manual_seed(M + K + D)
    own = torch.randint(K, (M,), generator=rng)
    z = case.mu[own] + torch.exp(0.5 * case.logvar[own]) * torch.randn(M, D, generator=rng)
    return replace(case, z=z, log_weights=torch.log_softmax(torch.randn(K, generator=rng), 0))


@tiled
@each_precision
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_shapes_around_the_edges_of_tiles(precision: str, shared: bool) -> None:
    """M of 128 rows, K of 64, 96 and 128 components, D of 8 and 16 dimensions and of lines; a component left out."""
    shapes = (
        *((1, 1, 1), (127, 63, 8), (128, 64, 9), (129, 65, 16), (3, 95, 17), (2, 96, 31), (5, 97, 32), (4, 127, 33)),
        *((7, 128, 40), (6, 129, 47), (9, 193, 63), (8, 257, 64), (300, 5, 3)),
    )
    for turn, (M, K, D) in enumerate(shapes):
        case = clustered_case(M, K, D) if turn % 2 else diffuse_case(M, K, D)
        if K > 1:
            case = replace(case, exclude=torch.arange(M) % (K + 1) - 1)
        if shared:
            case = replace(case, logvar=case.logvar[0].clone())
        assert_within_products(case, precision, dense=turn % 3 == 0, what=f"M={M} K={K} D={D}")


@tiled
@each_precision
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_many_dimensions(precision: str, shared: bool) -> None:
    """Above 64 the sums are made in slices, above 128 in several.  Own lines stay where they fit, or come along."""
    shapes = ((20, 130, 65), (140, 30, 72), (5, 100, 128), (130, 65, 129), (9, 97, 200), (3, 70, 257), (3, 60, 513))
    for turn, (M, K, D) in enumerate(shapes):
        case = clustered_case(M, K, D) if turn % 2 else diffuse_case(M, K, D)
        case = replace(case, exclude=torch.arange(M) % (K + 1) - 1)
        if shared:
            case = replace(case, logvar=case.logvar[0].clone())
        assert_within_products(case, precision, dense=turn % 3 == 0, what=f"M={M} K={K} D={D}")


@tiled
@each_precision
def test_gradients_of_many_dimensions_are_products(precision: str) -> None:
    """They are not those of the difference form, to the bit."""
    case = diffuse_case(3, 60, 513)
    for got, exact in zip(run_at(case, precision)[1:4], run(case, "cuda")[1:4], strict=True):
        assert not torch.equal(got, exact)


@tiled
@each_precision
def test_splits_are_merged(precision: str) -> None:
    """Of the components where rows are few, of the rows the other way."""
    for M, K, D in ((3, 3000, 9), (2500, 3, 9), (3, 300, 130)):
        assert_within_products(clustered_case(M, K, D), precision, what=f"M={M} K={K} D={D}")


# The edges of the contract.


@tiled
@each_precision
@pytest.mark.parametrize("D", [5, 70])
def test_what_is_not_there_changes_nothing(precision: str, D: int) -> None:
    """Absent components that hold NaN, the first among them, which the survey of the components begins with."""
    whole = diffuse_case(40, 140, D)
    there = torch.arange(140) % 7 != 0
    log_weights = torch.log_softmax(torch.randn(140), 0)
    case = with_nan(replace(whole, log_weights=log_weights.masked_fill(~there, -math.inf)))
    fewer = replace(whole, mu=whole.mu[there], logvar=whole.logvar[there], log_weights=log_weights[there])
    exact = fewer.to(torch.float64)
    got = run_at(case, precision)
    for gradient in got[2:]:
        assert not gradient[~there].any()  # NaN counts as true
    kept = Result(got.log_prob, got.dz, *(gradient[there] for gradient in got[2:]))
    assert_within(kept, run(exact, "reference"), product_band(exact, precision))


@tiled
@each_precision
def test_rows_without_a_component(precision: str) -> None:
    """-inf, and gradients of zero; an empty batch gives an empty result."""
    case = replace(diffuse_case(30, 100, 9), log_weights=torch.full((100,), -math.inf))
    got = run_at(case, precision)
    assert got.log_prob.tolist() == [-math.inf] * 30 and not any(gradient.any() for gradient in got[1:])
    alone = run_at(replace(diffuse_case(9, 1, 9), exclude=torch.arange(9) % 2 - 1), precision)
    assert (alone.log_prob == -math.inf).tolist() == [m % 2 == 1 for m in range(9)] and not alone.dz[1::2].any()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in alone[1:])
    empty = run_at(diffuse_case(0, 100, 9), precision)
    assert empty.log_prob.shape == (0,) and empty.dz.shape == (0, 9) and not empty.dmu.any()


@tiled
@each_precision
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_alone(precision: str, bad: float) -> None:
    """As at the highest precision: NaN makes NaN and infinity -inf, and other rows keep their bits."""
    case = diffuse_case(40, 100, 9)
    z = case.z.clone()
    z[17, 4] = bad
    others = torch.arange(40) != 17
    for got, exact, plain in zip(
        *(
            fastvae.mixture_log_prob_and_score(rows, case.mu, case.logvar, precision=name, impl="cuda")
            for rows, name in ((z, precision), (z, "highest"), (case.z, precision))
        ),
        strict=True,
    ):
        assert torch.equal(got[others], plain[others])
        assert torch.equal(got[17].isnan(), exact[17].isnan()) and torch.equal(got[17].isinf(), exact[17].isinf())
    got = log_prob_at(replace(case, z=z), precision)
    assert torch.equal(got[others], log_prob_at(case, precision)[others])
    assert bool(got[17].isnan()) if math.isnan(bad) else float(got[17]) == -math.inf


@tiled
@each_precision
@pytest.mark.parametrize("D", [40, 72])
@pytest.mark.parametrize("factor", [30, 1e3, 1e4])
def test_an_outlier_has_no_weight_above_one(precision: str, factor: float, D: int) -> None:
    """A row so far out that its exponents are rounded to many nats: the others keep what they have."""
    case = replace(diffuse_case(20, 50, D), log_weights=torch.full((50,), -math.log(50)), grad=torch.ones(20))
    z = case.z.clone()
    z[3] *= factor
    assert_within_products(replace(case, z=z), precision)


@tiled
@each_precision
@pytest.mark.parametrize("D", [2, 72])
def test_no_weight_of_a_far_row_is_beyond_fp16(precision: str, D: int) -> None:
    """Exponents from -2^28 down are multiples of 32 or more, so that the largest weight may come out above 2^16.

    It does where components have a scale of 2^-16, and where they are narrow beside others, which here have no weight.
    """
    z = torch.logspace(4, 6, 64)[:, None] * torch.ones(D).index_fill(0, torch.tensor(0), 1.5)
    logvar = torch.zeros(25, D)
    logvar[0, 0] = logvar[1, 1] = -0.1
    log_weights = torch.full((25,), -1e30).index_fill(0, torch.tensor([0, 1]), -math.log(2))
    for narrow in (0.0, 27.0):
        of_two = logvar - narrow * (torch.arange(25) < 2)[:, None]
        case = Case(z * math.exp(-0.5 * narrow), torch.zeros(25, D), of_two, log_weights, torch.ones(64))
        want = run(case.to(torch.float64), "reference")
        got = run_at(case, precision)
        assert all(bool(torch.isfinite(result).all()) for result in got)
        torch.testing.assert_close(got.dz, want.dz.float(), rtol=2e-3, atol=0)
        torch.testing.assert_close(got.dlog_weights, want.dlog_weights.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["cuda-high", "cuda-medium", "cuda"])
@pytest.mark.parametrize("D", [8, 64, 72])
def test_responsibilities_sum_to_one(
    emulated_tiled: Operators, backend: str, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far from all components a row lies: its gradients in the weights are they.

    At the highest precision log p may be made of certified products, and gradients are of the difference form.
    """
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")
    case, operators = diffuse_case(11, 50, D), cuda.operators(backend)
    z = case.z * torch.logspace(0, 5, 11)[:, None]
    arguments = z, case.mu, case.logvar, torch.zeros(50), None
    log_prob = operators.mixture_log_prob(*arguments)
    for m in range(11):
        grad = torch.zeros(11).index_fill(0, torch.tensor(m), 1.0)
        *_, responsibilities = operators.mixture_log_prob_backward(
            grad, log_prob, *arguments, False, False, False, False, True
        )
        assert abs(float(responsibilities.sum()) - 1) <= 2.0**-12, f"a row of {float(z[m].norm()):.0f} sigmas"


@tiled
@each_precision
def test_a_narrow_component_costs_the_others_nothing(precision: str) -> None:
    """Of logvar -27: its features are 1e11 times those of the others."""
    case = diffuse_case(40, 100, 12)
    logvar = case.logvar.clone()
    logvar[7] = -27.0
    case = replace(case, logvar=logvar)
    assert_within_products(case, precision)
    if precision == "high":
        assert_within(run_at(case, "high"), *allowance(case))


@tiled
@each_precision
@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_units_do_not_matter(precision: str, unit: float) -> None:
    """Of all dimensions, or of one: as exact as in units of sigma."""
    case = diffuse_case(40, 100, 9)
    for units in (torch.full((9,), unit), torch.where(torch.arange(9) == 4, unit, 1.0)):
        other = replace(case, z=case.z * units, mu=case.mu * units, logvar=case.logvar + 2 * units.log())
        assert_within_products(other, precision)
        if precision == "high":
            assert_within(run_at(other, "high"), *allowance(other))


# Bits.


@each_precision
def test_no_thread_depends_on_when_another_runs(
    emulated_tiled: Operators, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of shared memory without a barrier after its write would give other bits in another order.

    Nor does a bit depend on how much shared memory there is: above 64 dimensions own lines stay there if they fit.
    """
    for M, K, D in ((130, 300, 37), (20, 200, 70)):
        results = []
        for order, shared in (("ascending", "99"), ("descending", "227"), ("shuffled", "227")):
            monkeypatch.setenv("FASTVAE_EMULATION_ORDER", order)
            monkeypatch.setenv("FASTVAE_EMULATION_SHARED", shared)
            results.append(everything(cuda.operators(f"cuda-{precision}"), M, K, D, torch.float32))
        for got in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True)), (M, K, D)


@each_precision
def test_matrices_are_read_without_conflicts_and_fit(emulated_tiled: Operators, precision: str) -> None:
    """Of banks; and no block takes more than the 99 KiB of shared memory that every device since sm_80 has."""
    before = cuda.matrix_bank_conflicts()
    cuda.largest_shared()
    for D in (1, 16, 40, 64, 70, 200):
        case = diffuse_case(130, 200, D)
        assert all(bool(torch.isfinite(result).all()) for result in run_at(case, precision))
        assert 0 < cuda.largest_shared() <= 99 * 1024, D
    assert cuda.matrix_bank_conflicts() == before


@pytest.mark.usefixtures("emulated_small")
@each_precision
def test_small_problems_are_exact(precision: str) -> None:
    case = diffuse_case(40, 90, 10)
    assert all(torch.equal(a, b) for a, b in zip(run_at(case, precision), run(case, "cuda"), strict=True))


@tiled
@each_precision
def test_float64_is_exact(precision: str) -> None:
    case = diffuse_case(40, 90, 10, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(run_at(case, precision), run(case, "cuda"), strict=True))


@tiled
def test_the_setting_of_torch_is_followed() -> None:
    case = diffuse_case(40, 90, 10)
    named = {precision: log_prob_at(case, precision) for precision in ("highest", *LOWER)}
    assert not torch.equal(named["highest"], named["high"]) and not torch.equal(named["high"], named["medium"])
    before = torch.get_float32_matmul_precision()
    try:
        for precision, want in named.items():
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(fastvae.mixture_log_prob(case.z, case.mu, case.logvar, impl="cuda"), want)
    finally:
        torch.set_float32_matmul_precision(before)


# mixture_kl, operators, models.


@tiled
@each_precision
def test_mixture_kl_is_its_composition(precision: str) -> None:
    """z, kl and all gradients, to the bit."""
    for B, S, K, D in ((60, 3, 140, 7), (7, 2, 100, 70)):
        q = torch.stack([diffuse_case(B, 1, D, seed).z for seed in (0, 1)])
        exclude = torch.arange(S * B).reshape(S, B) % (K + 1) - 1
        prior = replace(diffuse_case(1, K, D), log_weights=torch.log_softmax(torch.randn(K), 0))
        with fastvae.use_backend(precision=precision):
            results = kl_and_gradients(q, prior, S, exclude)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (B, S, K, D)


@each_precision
@pytest.mark.parametrize("name", [name for name in internals.NAMES if name.startswith("mixture")])
def test_opcheck(emulated_tiled: Operators, precision: str, name: str) -> None:
    operator = getattr(cuda.operators(f"cuda-{precision}"), name)
    assert precision in str(operator)
    for args in inputs(name):
        torch.library.opcheck(operator, args)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x)


@tiled
@each_precision
@pytest.mark.parametrize("prior", ["mixture", "vamp", "exemplar"])
def test_a_model_trains(precision: str, prior: str) -> None:
    """A step of each kind of prior: the loss and the gradients of the highest precision, but for its errors."""
    x = torch.rand(30, 12)
    losses, gradients = [], []
    for of_prior in (precision, "highest"):
        torch.manual_seed(0)
        encoder = Encoder()
        made = {
            "mixture": lambda encoder=encoder, **own: fastvae.MixturePrior(torch.randn(70, 6), **own),
            "vamp": lambda encoder=encoder, **own: fastvae.VampPrior(encoder, torch.rand(70, 12), **own),
            "exemplar": lambda encoder=encoder, **own: fastvae.ExemplarPrior(encoder, x, **own),
        }[prior](impl="cuda", precision=of_prior)
        vae = fastvae.VAE(encoder, nn.Linear(6, 12), made)
        optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
        loss = vae(x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
        assert all(bool(torch.isfinite(p).all()) for p in vae.parameters())
    limit = {"high": 1e-5, "medium": 1e-2}[precision]
    assert any(not torch.equal(*pair) for pair in zip(*gradients, strict=True))  # it is another form
    torch.testing.assert_close(*losses, rtol=limit, atol=0)
    for got, want in zip(*gradients, strict=True):
        assert float((got - want).abs().max()) <= limit * float(want.abs().max() + 1e-3)
