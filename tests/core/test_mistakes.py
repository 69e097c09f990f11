"""Mistakes that others made: each test computes, or provokes, the mistaken result and rejects it.

Two more have a file of their own: gradient filtering that is not exact by default (test_skipping.py) and the
expansion of the square (test_mixture.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from models import Decoder, Encoder, vae
from support.backend import interpreted
from torch import Tensor, nn

import fastvae
from fastvae import VAE, MixturePrior, StandardNormalPrior, VampPrior, reference

CLOSE = 1e-4  # nats; float32 evaluations of densities below 100 nats lose a tenth of it


def mixture(K: int = 6, D: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, D), torch.randn(K, D), torch.randn(K, D), torch.log_softmax(torch.randn(K), 0)


def per_dimension(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """[..., K, D], log N(z_d; mu_kd, sigma_kd^2)."""
    return -0.5 * ((z[:, None] - mu).square() / logvar.exp() + logvar + math.log(2 * math.pi))


def correct(impl: str) -> tuple[Tensor, Tensor]:
    """(what the backend gives, the formula summed over D before the logsumexp)."""
    z, mu, logvar, log_weights = mixture()
    want = torch.logsumexp(per_dimension(z, mu, logvar, log_weights).sum(-1) + log_weights, -1)
    got = fastvae.mixture_log_prob(z, mu, logvar, log_weights, impl=impl)
    assert torch.allclose(got, want, rtol=0, atol=CLOSE)
    return got, want


def test_logsumexp_per_latent_dimension(each_impl: str) -> None:
    """A product over d of one-dimensional mixtures is another distribution: K^D components, not K."""
    z, *components = mixture()
    product = torch.logsumexp(per_dimension(z, *components) + components[2][:, None], 1).sum(-1)
    got, _ = correct(each_impl)
    assert bool(((got - product).abs() > 100 * CLOSE).all())


@pytest.mark.parametrize("mistake", ["sqrt of a scale", "variance as scale", "sigma for logvar"])
def test_the_wrong_power_of_sigma(each_impl: str, mistake: str) -> None:
    """logvar = log sigma^2: sigma is exp(logvar / 2), neither its root nor its square."""
    z, mu, logvar, log_weights = mixture()
    wrong = {
        "sqrt of a scale": 0.5 * logvar,
        "variance as scale": 2 * logvar,
        "sigma for logvar": logvar.exp(),
    }[mistake]
    mistaken = torch.logsumexp(per_dimension(z, mu, wrong, log_weights).sum(-1) + log_weights, -1)
    got, _ = correct(each_impl)
    assert bool(((got - mistaken).abs() > 100 * CLOSE).all())


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["sqrt of a scale", "variance as scale"])
def test_the_wrong_power_of_sigma_in_sampling(each_impl: str, factor: float) -> None:
    """sigma = 0.1: the samples' deviation is 0.1, not 0.32 or 0.01, and log q is their density."""
    n, logvar = 20_000, 2 * math.log(0.1)
    z, log_q = fastvae.gaussian_rsample(torch.zeros(n, 1), torch.tensor(logvar), impl=each_impl)
    spread = float(z.std())
    assert abs(spread - 0.1) < 5 * 0.1 / math.sqrt(2 * n)  # five standard errors of a deviation
    assert abs(spread - math.exp(0.5 * factor * logvar)) > 0.05
    want = -0.5 * ((z / 0.1).square()[:, 0] + logvar + math.log(2 * math.pi))
    assert torch.allclose(log_q, want, rtol=0, atol=CLOSE)


def test_log_2pi_dropped_on_one_side(each_impl: str) -> None:
    """Where q = p the KL is zero in every sample; dropped on one side it is D/2 log 2 pi = 7.4."""
    torch.manual_seed(0)
    mu, logvar = torch.randn(1, 8), torch.randn(1, 8)
    _, kl = fastvae.mixture_kl(mu, logvar, mu, logvar, None, 20, impl=each_impl)
    assert float(kl.abs().max()) < CLOSE < 0.5 * 8 * math.log(2 * math.pi)


def test_log_2pi_of_the_priors() -> None:
    """A mixture of one standard component is the standard prior; by both routes the same KL, to its error."""
    z = torch.randn(5, 8)
    one = MixturePrior(torch.zeros(1, 8))
    assert torch.allclose(one.log_prob(z), StandardNormalPrior(8).log_prob(z), rtol=0, atol=CLOSE)
    mu, logvar = torch.randn(1, 8), torch.randn(1, 8)
    _, sampled = one.kl(mu, logvar, 20_000)
    _, closed = StandardNormalPrior(8).kl(mu, logvar)
    assert abs(float(sampled.detach().mean() - closed)) < 5 * float(sampled.detach().std()) / math.sqrt(20_000)


def test_a_prior_sampled_by_its_first_components_in_order() -> None:
    """n draws hit n components in order with probability n^-n; and the weights say which are drawn."""
    mu = 100.0 * torch.arange(20)[:, None]
    prior = MixturePrior(mu.clone(), torch.tensor(-2.0))
    own = (prior.sample(20)[:, 0] / 100).round().long()
    assert own.tolist() != list(range(20))
    with torch.no_grad():
        prior.logits.fill_(-100.0)[15:] = 0.0
    own = (prior.sample(10)[:, 0] / 100).round().long()
    assert int(own.min()) >= 15


def test_drawing_all_components_to_sample_one() -> None:
    """K = 1000 pseudo-inputs: three samples encode three of them."""
    encoder = Encoder()
    model = VAE(encoder, Decoder(), VampPrior(encoder, torch.rand(1000, 6)))
    for n in (1, 3):
        encoder.rows.clear()
        model.sample(n)
        assert encoder.rows == [n]


def test_pseudo_inputs_overwritten_by_a_later_initialisation() -> None:
    """Whoever initialises the layers of a finished model leaves the pseudo-inputs as they are."""
    data = torch.rand(5, 6)
    encoder = Encoder()
    model = VAE(encoder, Decoder(), VampPrior(encoder, data))
    before = encoder.hidden.weight.detach().clone()

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    model.apply(initialise)
    assert not torch.equal(encoder.hidden.weight, before)
    assert torch.equal(model.prior.pseudo_inputs, data)


def test_exp_before_normalising(each_impl: str) -> None:
    """At D = 784 every component's density underflows, even in float64; its logarithm is about -3000."""
    torch.manual_seed(0)
    D = 250 if interpreted(each_impl) else 784  # about -1000, and time goes with D
    z, mu = 2 * torch.randn(5, D), 2 * torch.randn(6, D)
    leaves = [v.requires_grad_() for v in (z, mu)]
    got = fastvae.mixture_log_prob(*leaves, torch.zeros(()), impl=each_impl)
    components = reference.component_log_prob(z.double(), mu.double(), torch.zeros((), dtype=torch.float64))
    naive = components.exp().sum(-1).log()
    assert bool((naive == -math.inf).all())
    # roundings of a sum of D squares
    assert torch.allclose(got.double(), torch.logsumexp(components, -1), rtol=4 * math.sqrt(D) * 2**-24, atol=0)
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads)


def test_exp_of_the_other_sign(each_impl: str) -> None:
    """sigma = 1e-3 at D = 784: the density itself, exp(4700), overflows."""
    mu = torch.randn(6, 784, generator=torch.Generator().manual_seed(0))
    got = fastvae.mixture_log_prob(mu, mu, torch.tensor(2 * math.log(1e-3)), impl=each_impl)
    top = 784 * (math.log(1e3) - 0.5 * math.log(2 * math.pi)) - math.log(6)
    assert torch.allclose(got, torch.full((6,), top), rtol=4 * math.sqrt(784) * 2**-24, atol=0)


def test_importance_weights_are_constants() -> None:
    """What is reported as log p(x) carries no graph that someone could descend by mistake."""
    model = vae("vamp")
    assert not model.log_likelihood(torch.rand(4, 6), 20).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_surrogate_reported_as_the_bound() -> None:
    """At beta = 0 the loss is the reconstruction; the bound that is reported keeps its whole KL."""
    model, x = vae("vamp"), torch.rand(4, 6)
    output = model(x, beta=0.0)
    surrogate = -float(output.loss.detach())
    assert abs(surrogate - float(output.reconstruction.detach().mean())) < CLOSE
    assert abs(float(output.elbo.detach().mean()) - (surrogate - float(output.kl.detach().mean()))) < CLOSE
    assert float(output.kl.detach().abs().mean()) > 100 * CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_in_half_precision(each_impl: str, dtype: torch.dtype) -> None:
    """Hundreds of nats summed in 8 or 11 bits are off by whole nats; ours is of the upcast inputs."""
    torch.manual_seed(0)
    mu, logvar = torch.randn(64, 256).to(dtype), torch.randn(64, 256).to(dtype)
    exact = reference.gaussian_kl(mu.double(), logvar.double())
    halved = torch.zeros(64, dtype=dtype)
    for d in range(256):  # in that dtype throughout; torch's own sum would accumulate in float32
        halved = halved + 0.5 * (mu[:, d].square() + logvar[:, d].exp() - 1 - logvar[:, d])
    got = fastvae.gaussian_kl(mu, logvar, impl=each_impl)
    assert got.dtype == torch.float32
    assert float((got - exact).abs().max()) < 20 * CLOSE  # 3 x 256 roundings of 300 nats, by their root: 5e-4
    assert float((halved - exact).abs().max()) > 100 * CLOSE
    _, kl = fastvae.mixture_kl(mu, logvar, mu[:5], logvar[:5], impl=each_impl)
    assert kl.dtype == torch.float32
