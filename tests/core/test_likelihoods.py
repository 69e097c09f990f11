"""p(x | z): against torch's losses, the VampPrior's code, and probability's axioms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, gaussian_nll_loss

from fastvae.likelihoods import BernoulliLikelihood, DiscretizedLogisticLikelihood, GaussianLikelihood

LEVELS = (torch.arange(256, dtype=torch.float64) + 0.5) / 256


def test_bernoulli_is_the_cross_entropy() -> None:
    """Binary and grey targets, and logits beyond the range of sigmoid."""
    logits = torch.randn(5, 7, dtype=torch.float64) * 30
    for x in (torch.rand(5, 7).double().round(), torch.rand(5, 7).double()):
        want = -binary_cross_entropy_with_logits(logits, x, reduction="none")
        assert torch.allclose(BernoulliLikelihood().log_prob(logits, x), want, rtol=1e-12, atol=1e-15)
    assert torch.equal(BernoulliLikelihood().mean(logits), torch.sigmoid(logits))


def test_gaussian_is_the_nll() -> None:
    """With its constant; a decoder that returns a mean alone has variance one."""
    mean, logvar, x = torch.randn(3, 5, 7, dtype=torch.float64)
    want = -gaussian_nll_loss(mean, x, logvar.exp(), full=True, reduction="none")
    assert torch.allclose(GaussianLikelihood().log_prob((mean, logvar), x), want, rtol=1e-12, atol=0)
    want = -gaussian_nll_loss(mean, x, torch.ones_like(x), full=True, reduction="none")
    assert torch.allclose(GaussianLikelihood().log_prob(mean, x), want, rtol=1e-12, atol=0)
    assert torch.equal(GaussianLikelihood().mean((mean, logvar)), mean)


def on_every_level(mean: Tensor, logscale: Tensor) -> Tensor:
    """The discretised logistic's log probabilities [n, 256] for mean and logscale [n]."""
    parts = tuple(v[:, None].expand(-1, 256) for v in (mean, logscale))
    return DiscretizedLogisticLikelihood().log_prob(parts, LEVELS.to(mean.dtype).expand(len(mean), 256))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 256 * 2**-20)], ids=["float64", "float32"]
)
def test_discretized_logistic_sums_to_one(dtype: torch.dtype, tolerance: float) -> None:
    """Over the 256 levels, wherever the mean is and however wide the logistic: the edges have the tails."""
    mean = torch.tensor([-1.0, 0.0, 1 / 512, 0.3, 0.5, 0.77, 1.0, 2.0], dtype=dtype)
    logscale = torch.tensor([-7.0, -6.0, -4.5, -3.5, -2.0, -0.5, 0.0, 1.0, 5.0], dtype=dtype)
    mean, logscale = mean.repeat_interleave(9), logscale.repeat(8)
    total = on_every_level(mean, logscale).exp().sum(1)
    assert bool(((total - 1).abs() <= tolerance).all())


def test_discretized_logistic_has_the_tails_on_its_edges() -> None:
    """The first level has the mass below 1/256, the last one that above 255/256; the others that between their ends."""
    mean, logscale = torch.tensor([0.5, 0.1]).double(), torch.tensor([-2.0, -1.0]).double()
    ends = torch.sigmoid((torch.arange(1, 256) / 256 - mean[:, None]) / logscale.exp()[:, None])  # [2, 255]
    got = on_every_level(mean, logscale).exp()
    assert torch.allclose(got[:, 0], ends[:, 0], rtol=1e-12, atol=0)
    assert torch.allclose(got[:, 255], 1 - ends[:, 254], rtol=1e-12, atol=0)
    assert torch.allclose(got[:, 1:255], ends.diff(dim=1), rtol=1e-10, atol=0)


def test_discretized_logistic_mean_and_samples() -> None:
    """E[x | z] is the sum over the levels, and what samples average to: no further from it than five errors."""
    torch.manual_seed(0)
    mean, logscale = torch.tensor([0.5, 0.02, 0.9, 1.2]).double(), torch.tensor([-2.0, -1.0, -6.5, 0.3]).double()
    probabilities = on_every_level(mean, logscale).exp()
    want = probabilities @ LEVELS
    likelihood = DiscretizedLogisticLikelihood()
    assert torch.allclose(likelihood.mean((mean, logscale)), want, rtol=1e-12, atol=0)
    assert bool(((want - mean).abs() > 0.05)[[1, 3]].all())  # the logistic's own mean is another number
    samples = likelihood.sample((mean.expand(100_000, 4), logscale.expand(100_000, 4)))
    error = (probabilities @ LEVELS.square() - want.square()).sqrt() / math.sqrt(100_000)
    assert bool(((samples.mean(0) - want).abs() < 5 * error).all())


def published(mean: Tensor, logscale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(log(cdf(b) - cdf(a) + 1e-7) of jmtomczak/vae_vampprior, cdf(b) - cdf(a))."""
    lower = (torch.floor(x / (1 / 256)) / 256 - mean) / logscale.exp()
    mass = torch.sigmoid(lower + 1 / 256 / logscale.exp()) - torch.sigmoid(lower)
    return torch.log(mass + 1e-7), mass


def test_discretized_logistic_is_the_published_formula() -> None:
    """Between the edges, where the 1e-7 is nothing."""
    mean = torch.rand(400, 1, dtype=torch.float64).expand(400, 20)
    logscale = (torch.rand(400, 1, dtype=torch.float64) * 3 - 4.5).expand(400, 20)
    x = (1 + 254 * torch.rand(400, 20, dtype=torch.float64)) / 256
    theirs, mass = published(mean, logscale, x)
    ours = DiscretizedLogisticLikelihood().log_prob((mean, logscale), x)
    sure = mass > 1e-5
    assert int(sure.sum()) > 4000
    # 1e-7 adds at most 1e-7 / mass to the logarithm, and the difference of two sigmoids loses 1e-16 / mass
    assert bool((theirs - ours <= 1.001e-7 / mass + 1e-11)[sure].all())
    assert bool((ours - theirs <= 1e-11)[sure].all())


def test_how_the_published_formula_differs() -> None:
    """As the docstring says: it sums to 0.95 without the tails, and pays an overconfident model up to 16.1 a pixel."""
    half = torch.full((256,), 0.5, dtype=torch.float64)
    assert float(published(half, torch.full_like(half, -2.0), LEVELS)[0].exp().sum()) == pytest.approx(0.951, abs=1e-3)
    confident = torch.full_like(half, -7.0)
    theirs, _ = published(half, confident, LEVELS)
    ours = DiscretizedLogisticLikelihood().log_prob((half, confident), LEVELS)
    assert float(theirs.min()) == pytest.approx(-16.1, abs=0.02)
    assert float((theirs - ours)[[1, 254]].min()) > 100


def test_every_x_of_a_level_is_the_same() -> None:
    """x is quantised, i / 256 itself belongs to level i, and 1 to the last one."""
    output = (torch.full((256,), 0.4), torch.full((256,), -3.0))
    edges = torch.arange(256) / 256
    likelihood = DiscretizedLogisticLikelihood()
    assert torch.equal(likelihood.log_prob(output, edges), likelihood.log_prob(output, edges + 0.9 / 256))
    one = torch.ones(256)
    assert torch.equal(likelihood.log_prob(output, one), likelihood.log_prob(output, one - 1 / 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_discretized_logistic_is_finite_in_extremes(dtype: torch.dtype) -> None:
    """Values and gradients, as far out as logscale -7 and a mean at the other end of the range, on the edges too."""
    mean = torch.tensor([0.0, 1 / 512, 0.5, 1.0], dtype=dtype).repeat_interleave(5).requires_grad_()
    logscale = torch.tensor([-7.0, -4.5, -1.0, 0.0, 5.0], dtype=dtype).repeat(4).requires_grad_()
    x = torch.tensor([0.0, 0.5, 255 / 256, 1.0], dtype=dtype)
    parts = tuple(v[:, None].expand(20, 4) for v in (mean, logscale))
    log_prob = DiscretizedLogisticLikelihood().log_prob(parts, x.expand(20, 4))
    assert bool(torch.isfinite(log_prob).all()) and bool((log_prob <= 0).all())
    # -(|x - mean| - 1 / 256) / scale + log(1 - exp(-1 / 256 / scale)) is the lower bound of a log mass
    scale = logscale.detach().exp()[:, None]
    floor = torch.floor(x * 256) / 256
    least = -((floor - mean.detach()[:, None]).abs() + 1 / 256) / scale
    least = least + torch.log(-torch.expm1(-1 / 256 / scale)) - 2 * math.log(2)
    assert bool((log_prob >= least - 1e-3).all())
    grads = torch.autograd.grad(log_prob.sum(), (mean, logscale))
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_discretized_logistic_gradient() -> None:
    mean = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    logscale = torch.tensor([-4.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    for values in ([0.3, 0.1, 0.95], [0.0, 1.0, 0.0]):
        x = torch.tensor(values, dtype=torch.float64)
        log_prob = lambda *output, x=x: DiscretizedLogisticLikelihood().log_prob(output, x)  # noqa: E731
        assert torch.autograd.gradcheck(log_prob, (mean, logscale))


def frequencies(samples: Tensor) -> Tensor:
    return (samples * 256).floor().long().bincount(minlength=256).double() / len(samples)


def test_samples_follow_the_probabilities() -> None:
    """Each level's frequency within six standard errors; the other likelihoods' moments within five."""
    torch.manual_seed(0)
    n = 100_000
    mean, logscale = torch.full((n,), 0.43), torch.full((n,), -4.0)
    samples = DiscretizedLogisticLikelihood().sample((mean, logscale))
    assert samples.min() >= 0 and samples.max() < 1
    p = on_every_level(mean[:1].double(), logscale[:1].double())[0].exp()
    seen = frequencies(samples)
    common = p * n > 20
    assert bool(((seen - p).abs() < 6 * (p / n).sqrt())[common].all()) and int(common.sum()) > 20
    normal = GaussianLikelihood().sample((mean, logscale))
    assert abs(float(normal.mean()) - 0.43) < 5 * math.exp(-2) / math.sqrt(n)
    assert abs(float(normal.var()) - math.exp(-4)) < 5 * math.exp(-4) * math.sqrt(2 / n)
    coin = BernoulliLikelihood().sample(torch.full((n,), 1.2))
    rate = 1 / (1 + math.exp(-1.2))
    assert set(coin.unique().tolist()) == {0.0, 1.0}
    assert abs(float(coin.mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
