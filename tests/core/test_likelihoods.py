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


@pytest.mark.parametrize("logscale", [-6.0, -4.5, -3.5])
def test_discretized_logistic_sums_to_one(logscale: float) -> None:
    """Over the 256 levels, where the logistic's tails outside [0, 1) weigh less than exp(-0.4 / scale)."""
    mean = torch.tensor([[0.45], [0.5], [0.55]], dtype=torch.float64)
    log_prob = DiscretizedLogisticLikelihood().log_prob((mean, torch.full_like(mean, logscale)), LEVELS)
    outside = 2 * math.exp(-0.45 / math.exp(logscale))
    assert bool(((log_prob.exp().sum(1) - 1).abs() <= outside + 1e-13).all())


def test_discretized_logistic_is_the_published_formula() -> None:
    """log(cdf(b) - cdf(a) + 1e-7), from jmtomczak/vae_vampprior, where the 1e-7 is nothing."""
    mean = torch.rand(400, 1, dtype=torch.float64)
    logscale = torch.rand(400, 1, dtype=torch.float64) * 3 - 4.5
    x = torch.rand(400, 20, dtype=torch.float64)
    lower = (torch.floor(x / (1 / 256)) / 256 - mean) / logscale.exp()
    mass = torch.sigmoid(lower + 1 / 256 / logscale.exp()) - torch.sigmoid(lower)
    theirs = torch.log(mass + 1e-7)
    ours = DiscretizedLogisticLikelihood().log_prob((mean, logscale), x)
    sure = mass > 1e-5
    assert int(sure.sum()) > 4000
    # 1e-7 adds at most 1e-7 / mass to the logarithm, and the difference of two sigmoids loses 1e-16 / mass
    assert bool((theirs - ours <= 1.001e-7 / mass + 1e-11)[sure].all())
    assert bool((ours - theirs <= 1e-11)[sure].all())


def test_every_x_of_a_level_is_the_same() -> None:
    """x is quantised, and i / 256 itself belongs to level i."""
    output = (torch.full((1,), 0.4), torch.full((1,), -3.0))
    edges = torch.arange(256) / 256
    likelihood = DiscretizedLogisticLikelihood()
    assert torch.equal(likelihood.log_prob(output, edges), likelihood.log_prob(output, edges + 0.9 / 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_discretized_logistic_is_finite_in_extremes(dtype: torch.dtype) -> None:
    """Values and gradients, as far out as logscale -7 and a mean at the other end of the range."""
    mean = torch.tensor([0.0, 1 / 512, 0.5, 1.0], dtype=dtype).repeat_interleave(5).requires_grad_()
    logscale = torch.tensor([-7.0, -4.5, -1.0, 0.0, 5.0], dtype=dtype).repeat(4).requires_grad_()
    x = torch.tensor([0.0, 0.5, 255 / 256, 1.0], dtype=dtype)
    log_prob = DiscretizedLogisticLikelihood().log_prob((mean[:, None], logscale[:, None]), x)
    assert bool(torch.isfinite(log_prob).all()) and bool((log_prob < 0).all())
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
    x = torch.tensor([0.3, 0.1, 0.95], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *o: DiscretizedLogisticLikelihood().log_prob(o, x), (mean, logscale))


def frequencies(samples: Tensor) -> Tensor:
    return (samples * 256).floor().long().bincount(minlength=256).double() / len(samples)


def test_samples_follow_the_probabilities() -> None:
    """Each level's frequency within six standard errors; the other likelihoods' moments within five."""
    torch.manual_seed(0)
    n = 100_000
    mean, logscale = torch.full((n,), 0.43), torch.full((n,), -4.0)
    samples = DiscretizedLogisticLikelihood().sample((mean, logscale))
    assert samples.min() >= 0 and samples.max() < 1
    p = DiscretizedLogisticLikelihood().log_prob((mean[:1].double(), logscale[:1].double()), LEVELS).exp()
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
