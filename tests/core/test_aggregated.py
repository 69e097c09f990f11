"""The aggregated posterior: against Gaussians whose q(z), mutual information and divergences are known."""

from __future__ import annotations

import math

import pytest
import torch
from models import Decoder, Encoder, LinearGaussian
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, MultivariateNormal, Normal

from fastvae import VAE, AggregatedPosterior, MixturePrior, StandardNormalPrior
from fastvae.priors import Estimate

N = 20_000


def near(estimate: Estimate, want: Tensor | float) -> None:
    """Within five of its own standard errors, which must be small enough to tell, and a rest for N being finite."""
    assert float(estimate.standard_error.max()) < 0.03
    assert bool(((estimate.value - torch.as_tensor(want)).abs() < 5 * estimate.standard_error + 0.01).all())


class Correlated:
    """q(z | x_n) = N(m_n, diag s2) of m_n ~ N(c, C): for large N, q(z) = N(c, C + diag s2)."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.centre = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)
        factor = torch.tensor([[0.9, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.4]], dtype=torch.float64)
        self.s2 = torch.tensor([0.4, 0.2, 0.5], dtype=torch.float64)
        mu = self.centre + torch.randn(N, 3, dtype=torch.float64) @ factor.T
        self.posterior = AggregatedPosterior(mu, self.s2.log())
        self.covariance = factor @ factor.T + torch.diag(self.s2)
        self.q = MultivariateNormal(self.centre, self.covariance)


def test_mutual_information() -> None:
    """1/2 log det(C + S) / det S."""
    known = Correlated()
    want = 0.5 * (torch.logdet(known.covariance) - known.s2.log().sum())
    near(known.posterior.mutual_information(), want)
    assert 0.5 < float(want) < math.log(N)


def test_marginal_kl() -> None:
    known = Correlated()
    standard = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    want = torch.distributions.kl_divergence(known.q, standard)
    near(known.posterior.marginal_kl(StandardNormalPrior(3).double()), want)
    itself = known.posterior.marginal_kl(known.posterior)
    assert float(itself.value) == 0 == float(itself.standard_error)


def test_total_correlation_and_dimensions() -> None:
    """TC = 1/2 (sum log diag - log det); each dimension's KL that of a normal; and they add up to the marginal KL."""
    known = Correlated()
    variance = known.covariance.diagonal()
    correlation = 0.5 * (variance.log().sum() - torch.logdet(known.covariance))
    near(known.posterior.total_correlation(), correlation)
    each = 0.5 * (variance + known.centre.square() - 1 - variance.log())
    prior = StandardNormalPrior(3).double()
    near(known.posterior.dimension_wise_kl(prior), each)
    near(known.posterior.marginal_kl(prior), correlation + each.sum())
    as_mixture = MixturePrior(torch.zeros(1, 3).double(), torch.zeros(1, 3).double())
    near(known.posterior.dimension_wise_kl(as_mixture), each)


def test_linear_gaussian_vae() -> None:
    """The exact posterior of data from the model: q(z) is the prior, and I(x; z) = 1/2 sum log(1 + w_d^2 / v)."""
    linear = LinearGaussian()
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    torch.manual_seed(1)
    x = linear.marginal(zero, one).sample((N,)).detach()
    model = linear.vae(StandardNormalPrior(3))
    posterior = AggregatedPosterior.of(model.encoder, x, chunk_size=999)
    information = 0.5 * torch.log1p(linear.W.detach().square().sum(0) / linear.variance).sum()
    near(posterior.mutual_information(), information)
    near(posterior.marginal_kl(model.prior), 0.0)
    near(posterior.total_correlation(), 0.0)
    z = torch.randn(2000, 3, dtype=torch.float64)
    off = (posterior.log_prob(z) - model.prior.log_prob(z)).detach()
    assert abs(float(off.mean())) < 0.05 and float(off.std()) < 0.2  # N points, not all
    # E KL(q(z|x) || p) = I + KL(q(z) || p)
    mu, logvar = (v.detach() for v in linear.encode(x))
    kl = torch.distributions.kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1)
    parts = [posterior.mutual_information(), posterior.marginal_kl(model.prior)]
    error = math.hypot(*(float(part.standard_error) for part in parts))
    assert abs(float(kl.mean() - parts[0].value - parts[1].value)) < 5 * error + 0.01


def test_information_has_its_bounds() -> None:
    """log N where no two posteriors meet, nothing where all are one; and never more than log N in any draw."""
    apart = AggregatedPosterior(100.0 * torch.arange(50.0)[:, None].expand(50, 2), torch.zeros(()))
    estimate = apart.mutual_information(500)
    assert float(estimate.value) == pytest.approx(math.log(50), abs=1e-5) and float(estimate.standard_error) < 1e-5
    alike = AggregatedPosterior(torch.zeros(50, 2), torch.zeros(2)).mutual_information(500)
    assert abs(float(alike.value)) < 1e-5


def test_density_and_samples() -> None:
    """The density is that of torch's mixture; draws have its moments, and come from points at random."""
    mu, logvar = torch.randn(30, 2).double(), torch.randn(30, 2).double()
    posterior = AggregatedPosterior(mu, logvar)
    q = MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.zeros(30).double()),
        Independent(Normal(mu, (0.5 * logvar).exp()), 1),
    )
    z = posterior.sample(20_000)
    assert torch.allclose(posterior.log_prob(z), q.log_prob(z), rtol=1e-12)
    assert bool(((z.mean(0) - q.mean).abs() < 5 * (q.variance / 20_000).sqrt()).all())
    marginal = posterior.marginal_log_prob(z[:7])
    for d in range(2):
        one = MixtureSameFamily(q.mixture_distribution, Normal(mu[:, d], (0.5 * logvar[:, d]).exp()))
        assert torch.allclose(marginal[:, d], one.log_prob(z[:7, d]), rtol=1e-12)


def test_as_the_prior_of_a_vae() -> None:
    """Generation ex post: the same model, with q(z) in the prior's place; it saves and loads with the rest."""
    encoder, x = Encoder(), torch.rand(40, 6)
    posterior = AggregatedPosterior.of(encoder, x, chunk_size=7)
    mu, logvar = encoder(x)
    assert torch.allclose(posterior.mu, mu, atol=1e-6) and torch.allclose(posterior.logvar, logvar, atol=1e-6)
    model = VAE(encoder, Decoder(), posterior)
    assert model.sample(5).shape == (5, 6) and not list(posterior.parameters())
    assert {"prior.mu", "prior.logvar"} <= set(model.state_dict())
    assert bool(torch.isfinite(model.elbo(x)).all())


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="mu must be floating"):
        AggregatedPosterior(torch.zeros(0, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        AggregatedPosterior(torch.zeros(4, 2), torch.zeros(2)).mutual_information(1)
    with pytest.raises(TypeError, match="num_samples must be an integer, not float"):
        AggregatedPosterior(torch.zeros(4, 2), torch.zeros(2)).total_correlation(2.5)
    with pytest.raises(NotImplementedError, match="single dimensions"):
        from fastvae.priors import Prior

        AggregatedPosterior(torch.zeros(4, 2), torch.zeros(2)).dimension_wise_kl(Prior())
