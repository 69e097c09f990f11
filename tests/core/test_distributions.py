"""MixtureOfDiagNormals beside PyTorch's MixtureSameFamily, whose documentation says what a distribution does."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Encoder, vamp_prior
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import AffineTransform

import fastvae
from fastvae.distributions import MixtureOfDiagNormals, density

Parameters = tuple[Tensor, Tensor, Tensor]

# (batch shapes of locs, coord_scale and component_logits, K, D, sample shape)
SHAPES = [
    ((), (), (), 7, 3, (20,)),
    ((), (), (), 1, 1, ()),
    ((3,), (3,), (3,), 4, 2, (5,)),
    ((2, 3), (2, 3), (2, 3), 4, 2, (5, 2)),
    ((), (), (6,), 5, 3, (4,)),  # weights by rows
    ((2, 1), (), (2, 3), 5, 2, ()),
    ((3,), (), (2, 1), 5, 2, (2,)),
    ((2, 1), (2, 1), (1,), 2, 4, (3,)),
]


def parameters(shapes: tuple[tuple[int, ...], ...], K: int, D: int, dtype: torch.dtype = torch.float64) -> Parameters:
    """Leaves, whose components overlap."""
    torch.manual_seed(0)
    locs, scale, logits = shapes
    made = torch.randn(*locs, K, D), 0.3 + torch.rand(*scale, K, D), torch.randn(*logits, K)
    return tuple(p.to(dtype).requires_grad_() for p in made)  # type: ignore[return-value]


def same_family(locs: Tensor, coord_scale: Tensor, component_logits: Tensor) -> MixtureSameFamily:
    shapes = locs.shape[:-2], coord_scale.shape[:-2], component_logits.shape[:-1]
    batch, own = torch.broadcast_shapes(*shapes), locs.shape[-2:]
    normal = Normal(locs.expand(*batch, *own), coord_scale.expand(*batch, *own))
    return MixtureSameFamily(Categorical(logits=component_logits.expand(*batch, own[0])), Independent(normal, 1))


def mixture() -> MixtureOfDiagNormals:
    return MixtureOfDiagNormals(*(p.detach() for p in parameters(((), (), ()), 5, 3)))


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_density_and_gradients(case: Any, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "NUMBERS_FOR_A_CALL", 2**40 if together else 0)
    *shapes, K, D, sample_shape = case
    given = parameters(tuple(shapes), K, D)
    ours, theirs = MixtureOfDiagNormals(*given), same_family(*given)
    assert ours.batch_shape == theirs.batch_shape and ours.event_shape == theirs.event_shape == (D,)
    z = (2 * theirs.sample(sample_shape)).requires_grad_()
    found, wanted = ours.log_prob(z), theirs.log_prob(z)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(found, (z, *given), upstream),
        torch.autograd.grad(wanted, (z, *given), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_moments(case: Any) -> None:
    *shapes, K, D, _ = case
    given = parameters(tuple(shapes), K, D)
    ours, theirs = MixtureOfDiagNormals(*given), same_family(*given)
    for name in ("mean", "variance", "stddev"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(wanted)
        gradients = (
            torch.autograd.grad(m, given, upstream, allow_unused=True, retain_graph=True) for m in (found, wanted)
        )
        for one, other in zip(*gradients, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_variance_of_means_far_from_the_origin() -> None:
    """The difference of squares, E z^2 - (E z)^2, would be 0 or worse in float32."""
    q = MixtureOfDiagNormals(torch.tensor([[1e4], [1e4 + 1]]), torch.full((2, 1), 0.1), torch.zeros(2))
    torch.testing.assert_close(q.variance, torch.tensor([0.25 + 0.01]))


def test_a_distribution_function_in_one_dimension_is_that_of_mixture_same_family() -> None:
    locs, scale, logits = (p.detach() for p in parameters(((3,), (3,), (3,)), 4, 1))
    z = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None, None].expand(9, 3, 1)
    theirs = MixtureSameFamily(Categorical(logits=logits), Normal(locs[..., 0], scale[..., 0]))
    torch.testing.assert_close(MixtureOfDiagNormals(locs, scale, logits).cdf(z), theirs.cdf(z[..., 0]))


def test_a_distribution_function_counts_samples() -> None:
    torch.manual_seed(0)
    q = mixture()
    z, at = q.sample((40_000,)), torch.tensor([[0.0, 0.5, -0.2], [1.0, 2.0, 3.0]], dtype=torch.float64)
    below = (z[:, None] <= at).all(-1).double().mean(0)
    wanted = q.cdf(at)
    assert bool(((below - wanted).abs() < 5 * (wanted * (1 - wanted) / 40_000).sqrt()).all())


def test_a_distribution_function_at_infinity_is_that_of_the_other_dimensions() -> None:
    given = parameters(((), (), ()), 5, 3)
    q, at = MixtureOfDiagNormals(*given), torch.tensor([0.3, math.inf, -0.2], dtype=torch.float64)
    found, wanted = q.cdf(at), q.marginal([0, 2]).cdf(at[[0, 2]])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, given), torch.autograd.grad(wanted, given))
    assert float(q.cdf(-at).detach()) == 0


def test_marginals() -> None:
    q = mixture().expand((2,))
    z = torch.randn(4, 2, 2, dtype=torch.float64)
    wanted = MixtureOfDiagNormals(q.locs[..., [2, 0]], q.coord_scale[..., [2, 0]], q.component_logits)
    found = q.marginal([2, 0])
    assert found.batch_shape == (2,) and found.event_shape == (2,)
    torch.testing.assert_close(found.log_prob(z), wanted.log_prob(z))
    one, huge = q.marginal(-1), torch.full((3,), 1e3, dtype=torch.float64)
    huge[2] = 0.7
    torch.testing.assert_close(one.cdf(huge[2:]), q.cdf(huge))
    torch.testing.assert_close(q.marginal(torch.tensor([2, 0])).log_prob(z), found.log_prob(z))
    for bad, error in ((3, ValueError), ([], ValueError), ("a", TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="dims must be"):
            q.marginal(bad)  # type: ignore[arg-type]


def test_logits_are_normalised_and_scales_are_standard_deviations() -> None:
    q = mixture()
    z = torch.randn(6, 3, dtype=torch.float64)
    moved = MixtureOfDiagNormals(q.locs, q.coord_scale, q.component_logits + 100)
    torch.testing.assert_close(moved.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(q.log_weights.exp().sum(), torch.ones((), dtype=torch.float64))
    one = MixtureOfDiagNormals(torch.zeros(1, 1), torch.full((1, 1), 3.0), torch.tensor([5.0]))
    torch.testing.assert_close(one.stddev, torch.tensor([3.0]))


@pytest.mark.parametrize("scale", [torch.tensor(0.7), torch.full((3,), 0.7), torch.full((5, 1), 0.7)], ids=str)
def test_scales_that_components_or_dimensions_share(scale: Tensor) -> None:
    q = mixture()
    z = torch.randn(6, 3, dtype=torch.float64)
    wanted = MixtureOfDiagNormals(q.locs, torch.full_like(q.coord_scale, 0.7), q.component_logits)
    shared = scale.double().requires_grad_()
    found = MixtureOfDiagNormals(q.locs, shared, q.component_logits)
    torch.testing.assert_close(found.log_prob(z), wanted.log_prob(z))
    torch.testing.assert_close(found.variance, wanted.variance)
    (gradient,) = torch.autograd.grad(found.rsample((4,)).sum(), shared)
    assert gradient.shape == shared.shape


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_samples_have_the_shape_and_the_moments(case: Any) -> None:
    *shapes, K, D, sample_shape = case
    q = MixtureOfDiagNormals(*(p.detach() for p in parameters(tuple(shapes), K, D)))
    assert q.sample(sample_shape).shape == q.rsample(sample_shape).shape == (*sample_shape, *q.batch_shape, D)
    z = q.sample((10_000,))
    assert z.shape == (10_000, *q.batch_shape, D) and not z.requires_grad
    assert bool(((z.mean(0) - q.mean).abs() < 5 * q.stddev / 100).all())
    spread = (z - q.mean).square()
    assert bool(((spread.mean(0) - q.variance).abs() < 5 * spread.std(0) / 100).all())


def test_each_mixture_of_a_batch_draws_by_its_own_weights() -> None:
    locs = torch.tensor([[0.0], [100.0], [200.0]])
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, 0.7]])
    z = MixtureOfDiagNormals(locs, torch.ones(()), fastvae.log_weights_of(probs)).sample((2000,))[..., 0]
    assert bool((z[:, 0] < 50).all()) and bool((z[:, 1] > 50).all())
    assert abs(float((z[:, 1] > 150).double().mean()) - 0.7) < 5 * math.sqrt(0.21 / 2000)


def test_mixtures_of_a_batch_draw_independently() -> None:
    locs = torch.tensor([[0.0], [100.0]])
    for logits in (torch.zeros(2), torch.tensor([[0.0, 0.0], [1e-3, 0.0]])):  # one mixture, and two
        z = MixtureOfDiagNormals(locs, torch.ones(()), logits).expand((2,)).sample((4000,))[..., 0]
        alike = ((z[:, 0] > 50) == (z[:, 1] > 50)).double().mean()
        assert abs(float(alike) - 0.5) < 5 * math.sqrt(0.25 / 4000)


def test_seeds_repeat_samples() -> None:
    def draw() -> Tensor:
        torch.manual_seed(3)
        return mixture().sample((5,))

    assert torch.equal(draw(), draw())


def test_expanded_mixtures_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that shares its parameters is one call of the operation, with all points."""
    calls: list[tuple[int, ...]] = []
    original = fastvae.functional.mixture_log_prob

    def counted(z: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(tuple(z.shape))
        return original(z, *args, **options)

    monkeypatch.setattr(density.F, "mixture_log_prob", counted)
    q = mixture()
    wide = q.expand((4, 2)).expand((3, 4, 2))
    assert wide.batch_shape == (3, 4, 2) and wide.locs.shape == (3, 4, 2, 5, 3)
    z = torch.randn(2, 3, 4, 2, 3, dtype=torch.float64)
    found = wide.log_prob(z)
    assert calls == [(48, 3)]
    torch.testing.assert_close(found, q.log_prob(z))
    by_hand = MixtureOfDiagNormals(wide.locs, wide.coord_scale, wide.component_logits)
    torch.testing.assert_close(by_hand.log_prob(z), found)
    assert calls == [(48, 3)] * 3  # q's too
    assert wide.mean.shape == wide.variance.shape == (3, 4, 2, 3)
    assert wide.log_prob(torch.zeros(3)).shape == (3, 4, 2)
    with pytest.raises(RuntimeError, match="expanded size"):
        MixtureOfDiagNormals(torch.zeros(2, 5, 3), torch.ones(()), torch.zeros(5)).expand((3,))


def test_an_expanded_leaf_has_a_gradient_for_each_mixture() -> None:
    """As PyTorch's mixtures have it: what `expand` shares is no longer shared once it is a leaf."""
    shared = (p.detach() for p in parameters(((), (), ()), 5, 3))
    given = [p.expand(4, *p.shape).requires_grad_() for p in shared]
    z = torch.randn(3, 4, 3, dtype=torch.float64)
    wanted = torch.autograd.grad(same_family(*given).log_prob(z).sum(), given)
    found = torch.autograd.grad(MixtureOfDiagNormals(*given).log_prob(z).sum(), given)
    torch.testing.assert_close(found, wanted)
    by_func = torch.func.grad(lambda locs: MixtureOfDiagNormals(locs, *given[1:]).log_prob(z).sum())
    torch.testing.assert_close(by_func(given[0].detach()), wanted[0])
    (of_samples,) = torch.autograd.grad(MixtureOfDiagNormals(*given).rsample((3,)).sum(), given[0])
    torch.testing.assert_close(of_samples.sum((1, 2)), torch.full((4,), 9.0, dtype=torch.float64))


def test_a_batch_of_one_takes_points_of_any_batch() -> None:
    q = mixture()
    z = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(q.expand((1,)).log_prob(z), q.log_prob(z))
    three = MixtureOfDiagNormals(*(p.detach() for p in parameters(((3, 1),) * 3, 5, 3)))
    z = torch.randn(3, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(
        three.log_prob(z), same_family(three.locs, three.coord_scale, three.component_logits).log_prob(z)
    )


def test_points_of_two_mixtures_keep_their_order() -> None:
    """Where the mixtures differ along the last dimension of the batch shape and not along the first."""
    q = MixtureOfDiagNormals(torch.tensor([[[0.0]], [[10.0]]]), torch.ones(()), torch.zeros(1)).expand((3, 2))
    z = q.sample((4,))
    assert z.shape == (4, 3, 2, 1) and bool((z[..., 0, 0] < 6).all()) and bool((z[..., 1, 0] > 4).all())
    wanted = Normal(torch.tensor([0.0, 10.0]), 1.0).log_prob(z[..., 0])
    torch.testing.assert_close(q.log_prob(z), wanted)


def test_what_pytorch_builds_of_distributions() -> None:
    q = mixture()
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(Independent(q.expand((4,)), 1).log_prob(z), q.log_prob(z).sum(-1))
    moved = TransformedDistribution(q, [AffineTransform(1.0, 2.0, event_dim=1)])
    torch.testing.assert_close(moved.log_prob(1 + 2 * z), q.log_prob(z) - 3 * math.log(2))
    assert "locs: torch.Size([5, 3])" in repr(q)
    assert MixtureOfDiagNormals.has_rsample
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.log_prob(z), q.log_prob(z))
    with pytest.raises(NotImplementedError):  # none is registered, because none is known in closed form
        kl_divergence(q, q)


def test_of_a_mixture_same_family() -> None:
    given = parameters(((2,), (2,), (2,)), 4, 3)
    theirs = same_family(*given)
    ours = MixtureOfDiagNormals.of(theirs, impl="composite")
    z = theirs.sample((5,))
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z), rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours.log_prob(z).sum(), given, retain_graph=True),
        torch.autograd.grad(theirs.log_prob(z).sum(), given, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert ours.backend_options["impl"] == "composite"
    back = MixtureSameFamily(ours.mixture_distribution, ours.component_distribution)
    torch.testing.assert_close(back.log_prob(z), theirs.log_prob(z))
    weights = MixtureSameFamily(Categorical(torch.tensor([1.0, 3.0])), Independent(Normal(torch.zeros(2, 1), 1.0), 1))
    torch.testing.assert_close(MixtureOfDiagNormals.of(weights).log_weights.exp(), torch.tensor([0.25, 0.75]))


OTHERS: list[Any] = [
    Normal(0.0, 1.0),
    MixtureSameFamily,
    MixtureSameFamily(Categorical(torch.ones(3)), Normal(torch.zeros(3), 1.0)),
    MixtureSameFamily(Categorical(torch.ones(3)), Independent(Laplace(torch.zeros(3, 2), 1.0), 1)),
    MixtureSameFamily(Categorical(torch.ones(3)), Independent(Normal(torch.zeros(3, 2, 2), 1.0), 2)),
    MixtureSameFamily(Categorical(torch.ones(3)), MultivariateNormal(torch.zeros(3, 2), torch.eye(2))),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: str(other)[:40])
def test_of_another_distribution(other: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a MixtureSameFamily\(Categorical, Independent\(Normal, 1\)\)"):
        MixtureOfDiagNormals.of(other)


ONES = torch.ones(4, 3)
BAD: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([[0.0]], ONES, ONES[:, 0], TypeError, "locs must be a tensor, not list"),
    (ONES.long(), ONES, ONES[:, 0], TypeError, "locs must be a floating tensor"),
    (ONES[0], ONES, ONES[:, 0], ValueError, r"locs must be \[..., K, D\] .*not \[3\]"),
    (ONES[:0], ONES, ONES[:0, 0], ValueError, r"K >= 1 and D >= 1, not \[0, 3\]"),
    (ONES, ONES[:3], ONES[:, 0], ValueError, r"coord_scale must be broadcastable to \[..., 4, 3\]"),
    (ONES, ONES[:, 0], ONES[:, 0], ValueError, r"coord_scale\[:, None\]"),
    (ONES, ONES, ONES[0], ValueError, r"component_logits must be \[..., 4\]"),
    (ONES, ONES, torch.tensor(0.0), ValueError, r"component_logits must be \[..., 4\]"),
    (ONES.expand(2, 4, 3), ONES.expand(5, 4, 3), ONES[:, 0], ValueError, r"batch shapes .* \[2\], \[5\] and \[\]"),
    (ONES, ONES, ONES[:, 0].to("meta"), ValueError, "component_logits is on meta, but locs is on cpu"),
    (ONES * math.nan, ONES, ONES[:, 0], ValueError, "parameter locs"),
    (ONES, 0 * ONES, ONES[:, 0], ValueError, "parameter coord_scale"),
    (ONES, ONES, ONES[:, 0] * math.nan, ValueError, "parameter component_logits"),
    (ONES, ONES, ONES[:, 0] * math.inf, ValueError, "component_logits must have a finite"),
    (ONES, ONES, ONES[:, 0] * -math.inf, ValueError, "component_logits must have a finite"),
]


@pytest.mark.parametrize(("locs", "scale", "logits", "error", "message"), BAD)
def test_bad_parameters(locs: Any, scale: Any, logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixtureOfDiagNormals(locs, scale, logits, validate_args=True)


def test_bad_points() -> None:
    # Said in full, because PyTorch's default is False in a process that has compiled a distribution.
    q = MixtureOfDiagNormals(*(p.detach() for p in parameters(((), (), ()), 5, 3)), validate_args=True)
    for bad, error, message in (
        ([0.0, 0.0, 0.0], TypeError, "value must be a tensor"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "value must be a floating tensor"),
        (torch.zeros(4), ValueError, "event_shape"),
        (torch.full((3,), math.nan), ValueError, "within the support"),
    ):
        for method in (q.log_prob, q.cdf):
            with pytest.raises(error, match=message):
                method(bad)


def test_without_validation_values_are_free_and_shapes_are_not() -> None:
    q = MixtureOfDiagNormals(torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(4), validate_args=False)
    z = torch.zeros(2, 3)
    z[0, 0] = math.nan
    found = q.log_prob(z)
    assert bool(found[0].isnan()) and bool(found[1].isfinite())
    for bad in (torch.zeros(4), torch.zeros(2, 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"value must be \[..., 3\]"):
            q.log_prob(bad)
    assert bool(MixtureOfDiagNormals(ONES, -ONES, ONES[:, 0], validate_args=False).log_prob(ONES).isnan().all())


def test_validation_follows_the_default_of_pytorch() -> None:
    Distribution.set_default_validate_args(False)
    try:
        MixtureOfDiagNormals(ONES, -ONES, ONES[:, 0])
    finally:
        Distribution.set_default_validate_args(__debug__)
    assert mixture().expand((2,))._validate_args == mixture()._validate_args


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA cannot run")
def test_a_backend_that_cannot_run_is_an_error_for_small_mixtures_too() -> None:
    for shapes in (((), (), ()), ((2,), (2,), (2,))):
        q = MixtureOfDiagNormals(*parameters(shapes, 5, 3), impl="cuda")
        for work in (lambda q=q: q.log_prob(torch.zeros(3)), q.rsample):
            with pytest.raises(RuntimeError, match="impl='cuda' cannot run"):
                work()


def test_options() -> None:
    q = mixture()
    z = torch.zeros(2, 3, dtype=torch.float64)
    chosen = MixtureOfDiagNormals(q.locs, q.coord_scale, q.component_logits, impl="reference")
    torch.testing.assert_close(chosen.expand((1,)).marginal([0, 1, 2]).log_prob(z), q.log_prob(z))
    assert chosen.expand((1,)).marginal(0).backend_options["impl"] == "reference"
    with pytest.raises(ValueError, match="impl must be one of"):
        MixtureOfDiagNormals(ONES, ONES, ONES[:, 0], impl="gpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'imp'"):
        MixtureOfDiagNormals(ONES, ONES, ONES[:, 0], imp="cpu")  # type: ignore[call-arg]


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_an_absent_component_reaches_nothing(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its parameters are; in a batch it is absent from both mixtures, which differ in their weights."""
    monkeypatch.setattr(density, "NUMBERS_FOR_A_CALL", 2**40 if together else 0)
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.5, -math.inf, -1.0]], requires_grad=True)
    locs = torch.tensor([[0.0], [math.inf], [1.0]], requires_grad=True)
    scale = torch.tensor([[1.0], [math.inf], [0.5]], requires_grad=True)
    q = MixtureOfDiagNormals(locs, scale, logits)
    rest = MixtureOfDiagNormals(locs[[0, 2]], scale[[0, 2]], logits[:, [0, 2]])
    z = q.rsample((50,))
    for name in ("mean", "variance"):
        torch.testing.assert_close(getattr(q, name), getattr(rest, name))
    torch.testing.assert_close(q.log_prob(z), rest.log_prob(z))
    torch.testing.assert_close(q.cdf(z), rest.cdf(z))
    total = z.square().sum() + q.log_prob(z).sum() + q.cdf(z).sum() + q.mean.sum() + q.variance.sum()
    of_locs, of_scale, of_logits = torch.autograd.grad(total, (locs, scale, logits))
    assert all(bool(gradient.isfinite().all()) for gradient in (of_locs, of_scale, of_logits))
    assert float(of_locs[1].abs()) == float(of_scale[1].abs()) == float(of_logits[:, 1].abs().sum()) == 0


def test_nothing() -> None:
    """Empty batches of points, of samples and of mixtures."""
    q = mixture()
    assert q.log_prob(torch.zeros(0, 3)).shape == q.cdf(torch.zeros(0, 3)).shape == (0,)
    assert q.sample((0,)).shape == (0, 3)
    none = MixtureOfDiagNormals(torch.zeros(0, 5, 3), torch.ones(5, 3), torch.zeros(5))
    assert none.sample((2,)).shape == (2, 0, 3) and none.mean.shape == none.variance.shape == (0, 3)
    assert none.log_prob(torch.zeros(2, 0, 3)).shape == (2, 0) and none.cdf(torch.zeros(3)).shape == (0,)
    for batch_shape, sample_shape in (((), (0,)), ((0,), (2,))):
        locs = torch.zeros(*batch_shape, 5, 3, requires_grad=True)
        scale = torch.ones(5, 3, requires_grad=True)
        q = MixtureOfDiagNormals(locs, scale, torch.zeros(5))
        (q.rsample(sample_shape).sum() + q.log_prob(q.sample(sample_shape)).sum()).backward()
        for parameter in (locs, scale):
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) == 0


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_a_point_of_density_zero(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So far away that its squares are infinite: -inf, and no gradient, of that row or of the others' sums."""
    monkeypatch.setattr(density, "NUMBERS_FOR_A_CALL", 2**40 if together else 0)
    given = tuple(p.detach().float().requires_grad_() for p in parameters(((2,), (2,), (2,)), 4, 3))
    z = torch.zeros(2, 2, 3)
    z[0, 0] = 1e25
    found = MixtureOfDiagNormals(*given).log_prob(z)
    assert float(found[0, 0].detach()) == -math.inf and bool(found[1].isfinite().all())
    near = MixtureOfDiagNormals(*given).log_prob(z)
    wanted = torch.autograd.grad(near[0, 1] + near[1].sum(), given)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), given), wanted)


def test_dtypes() -> None:
    half = MixtureOfDiagNormals(*(p.detach().half() for p in parameters(((), (), ()), 5, 3)))
    assert half.sample((2,)).dtype == half.mean.dtype == half.variance.dtype == torch.float16
    assert half.log_prob(torch.zeros(3).half()).dtype == torch.float32
    assert half.log_prob(torch.zeros(3).double()).dtype == torch.float64
    assert mixture().log_prob(torch.zeros(3)).dtype == torch.float64


def test_autocast_rounds_nothing() -> None:
    given = tuple(p.detach().float().requires_grad_() for p in parameters(((), (), ()), 5, 3))
    q, z = MixtureOfDiagNormals(*given), torch.randn(4, 3)

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        samples = q.rsample((4,))
        return [q.mean, q.variance, q.log_prob(z), q.cdf(z), *torch.autograd.grad(samples.square().sum(), given)]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


def test_shapes_on_the_meta_device() -> None:
    q = MixtureOfDiagNormals(*(p.detach().to("meta") for p in parameters(((), (), ()), 5, 3)), validate_args=False)
    assert q.sample((2,)).shape == (2, 3) and q.log_prob(torch.zeros(2, 3, device="meta")).shape == (2,)
    assert q.mean.shape == q.variance.shape == (3,)


@pytest.mark.parametrize("shapes", [((), (), ()), ((2,), (2,), (2,))], ids=str)
def test_estimated_entropy(shapes: Any) -> None:
    """Of one component, and of two that are far apart: 1/2 log(2 pi e sigma^2), and the entropy of the weights more."""
    torch.manual_seed(0)
    scale = torch.full((*shapes[0], 2, 1), 0.5, requires_grad=True)
    q = MixtureOfDiagNormals(torch.tensor([[0.0], [100.0]]).expand_as(scale), scale, torch.tensor([0.0, math.log(3)]))
    found = q.entropy_estimate(4000)
    wanted = 0.5 * math.log(2 * math.pi * math.e * 0.25) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found.value.shape == found.standard_error.shape == shapes[0] and not found.standard_error.requires_grad
    assert bool(((found.value - wanted).abs() < 5 * found.standard_error).all())
    assert bool((found.standard_error < 0.05).all())
    (gradient,) = torch.autograd.grad(found.value.sum(), scale)  # w_k / sigma
    torch.testing.assert_close(gradient[..., 0], torch.tensor([0.5, 1.5]).expand(*shapes[0], 2), atol=0.15, rtol=0)
    with pytest.raises(ValueError, match="at least 2"):
        q.entropy_estimate(1)
    with pytest.raises(TypeError, match="num_samples must be an integer"):
        q.entropy_estimate(2.5)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="entropy_estimate"):
        q.entropy()


def test_priors_give_theirs() -> None:
    z = torch.randn(4, 2)
    learned = fastvae.MixturePrior(torch.randn(5, 2), torch.randn(5, 2), probs=torch.rand(5), impl="composite")
    q = learned.distribution()
    torch.testing.assert_close(q.log_prob(z), learned.log_prob(z))
    assert q.backend_options["impl"] == "composite"
    (q.log_prob(z).sum() + q.rsample((3,)).square().sum()).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in learned.parameters())

    vamp = vamp_prior()
    q = vamp.distribution()
    torch.testing.assert_close(q.log_prob(torch.zeros(3)), vamp.log_prob(torch.zeros(3)))
    q.rsample((3,)).sum().backward()
    assert vamp.pseudo_inputs.grad is not None and float(vamp.pseudo_inputs.grad.abs().sum()) > 0
    of_data = fastvae.AggregatedPosterior.of(Encoder(), torch.rand(7, 6)).distribution()
    assert of_data.locs.shape == (7, 3) and of_data.sample((2,)).shape == (2, 3)


@pytest.mark.parametrize("work", ["log_prob", "rsample"])
def test_compiled_whole(work: str) -> None:
    q = mixture()

    def log_prob(locs: Tensor, z: Tensor) -> Tensor:
        return MixtureOfDiagNormals(locs, q.coord_scale, q.component_logits, validate_args=False).log_prob(z)

    def rsample(locs: Tensor, z: Tensor) -> Tensor:
        return MixtureOfDiagNormals(locs, q.coord_scale, q.component_logits, validate_args=False).rsample((4,)) * z

    function: Callable[[Tensor, Tensor], Tensor] = {"log_prob": log_prob, "rsample": rsample}[work]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    z = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for run in (function, compiled):
        torch.manual_seed(5)
        locs = q.locs.clone().requires_grad_()
        results.append(torch.autograd.grad(run(locs, z).sum(), locs)[0])
    torch.testing.assert_close(*results)


def test_blocks_within_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in blocks has no checkpoints there, and the same gradients."""
    monkeypatch.setattr("fastvae.distributions.batches.chunk_on", lambda *_: 40)
    locs, scale, logits = (p.detach() for p in parameters(((3,), (3,), (3,)), 5, 2))
    z = torch.randn(4, 3, 2, dtype=torch.float64)

    def total(locs: Tensor) -> Tensor:
        q = MixtureOfDiagNormals(locs, scale, logits, validate_args=False)
        return q.cdf(z).sum() + q.log_prob(z).sum() + q.mean.sum() + q.variance.sum()

    leaf = locs.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(locs), wanted)
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(locs[None])[0], wanted)


def test_transforms_of_torch_func() -> None:
    q = mixture()
    z = torch.randn(4, 3, dtype=torch.float64)

    def log_prob(locs: Tensor, z: Tensor) -> Tensor:
        return MixtureOfDiagNormals(locs, q.coord_scale, q.component_logits, validate_args=False).log_prob(z)

    torch.testing.assert_close(torch.vmap(log_prob, (None, 0))(q.locs, z), q.log_prob(z))
    locs = q.locs.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(log_prob(locs, z).sum(), locs)
    torch.testing.assert_close(torch.func.grad(lambda locs: log_prob(locs, z).sum())(q.locs), wanted)

    def rsample(locs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return MixtureOfDiagNormals(locs, q.coord_scale, q.component_logits, validate_args=False).rsample((4,)).sum()

    (wanted,) = torch.autograd.grad(rsample(locs), locs)
    torch.testing.assert_close(torch.func.grad(rsample)(q.locs), wanted)
    each = torch.vmap(torch.func.grad(rsample), randomness="different")(q.locs.expand(2, 5, 3))
    torch.testing.assert_close(each.sum(1), torch.full((2, 3), 4.0, dtype=torch.float64))  # a share of 1 each
