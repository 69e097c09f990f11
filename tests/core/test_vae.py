"""The VAE: bounds and log-likelihood of a model whose log p(x) is known, and what each pass costs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import Encoder, LinearGaussian, vae
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from fastvae import VAE, MixturePrior, StandardNormalPrior
from fastvae.likelihoods import GaussianLikelihood
from fastvae.vae import VAEOutput


def standard() -> StandardNormalPrior:
    return StandardNormalPrior(latent_dim=3)


def exact(model: LinearGaussian) -> MultivariateNormal:
    return model.marginal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))


def data(model: LinearGaussian, n: int = 8) -> Tensor:
    torch.manual_seed(5)
    return exact(model).sample((n,)).detach()


def log_importance(model: LinearGaussian, prior_mu: Tensor, prior_logvar: Tensor, x: Tensor, S: int) -> Tensor:
    """log p(x | z) p(z) / q(z | x), [S, B], by torch.distributions alone; the prior has equal weights."""
    mu, logvar = model.encode(x)
    q = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    z = q.sample((S,))
    mean, output_logvar = model(z)
    log_x = Independent(Normal(mean, torch.exp(0.5 * output_logvar)), 1).log_prob(x)
    components = Independent(Normal(prior_mu, torch.exp(0.5 * prior_logvar)), 1)
    log_p = torch.logsumexp(components.log_prob(z[..., None, :]), -1) - math.log(len(prior_mu))
    return (log_x + log_p - q.log_prob(z)).detach()


def test_exact_posterior_gives_log_p_in_every_sample() -> None:
    """log p(x|z) + log p(z) - log q(z|x) = log p(x) whatever z is."""
    linear = LinearGaussian()
    x = data(linear)
    for num_samples in (1, 3):
        elbo = linear.vae(standard()).elbo(x, num_samples, kl="sample")
        assert torch.allclose(elbo, exact(linear).log_prob(x), rtol=1e-11, atol=0)


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_both_forms_agree_in_expectation(off: float) -> None:
    """The KL in closed form, and E[log p(x|z) + log p(z) - log q(z|x)], within five standard errors."""
    linear = LinearGaussian(off=off)
    x = data(linear)
    estimates = {}
    for kl in ("analytic", "sample"):
        draws = torch.stack([linear.vae(standard()).elbo(x, 100, kl=kl).detach() for _ in range(40)])
        estimates[kl] = draws.mean(0), draws.std(0) / math.sqrt(40)
    (a, a_error), (b, b_error) = estimates["analytic"], estimates["sample"]
    assert bool(((a - b).abs() <= 5 * (a_error.square() + b_error.square()).sqrt() + 1e-10).all())
    # and the bound lies below log p(x) by KL(q || posterior), which both Gaussians give in closed form
    mu, logvar = linear.encode(x)
    exact_mu, exact_logvar = LinearGaussian().encode(x)
    gap = torch.distributions.kl_divergence(
        Normal(mu, torch.exp(0.5 * logvar)), Normal(exact_mu, torch.exp(0.5 * exact_logvar))
    ).sum(-1)
    assert bool(((exact(linear).log_prob(x) - gap - a).abs() <= 5 * a_error + 1e-10).all())


@pytest.mark.parametrize("prior", ["standard", "mixture"])
def test_log_likelihood_within_its_own_standard_error(prior: str) -> None:
    """An encoder that is off: weights vary, and the estimate is as far from log p(x) as they say."""
    linear = LinearGaussian(off=0.3)
    x, S = data(linear), 5000
    if prior == "standard":
        mu, logvar = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
        model = linear.vae(standard())
    else:
        torch.manual_seed(1)
        mu, logvar = torch.randn(4, 3).double(), 0.3 * torch.randn(4, 3).double() - 0.5
        model = linear.vae(MixturePrior(mu, logvar))
    parts = [linear.marginal(m, v.exp()).log_prob(x) for m, v in zip(mu, logvar, strict=True)]
    want = torch.logsumexp(torch.stack(parts), 0) - math.log(len(mu))
    weights = (log_importance(linear, mu, logvar, x, 20_000) - want.detach()).exp()
    error = weights.std(0) / math.sqrt(S)  # of the mean of weights whose expectation is 1, so of its logarithm
    assert bool((error < 0.2).all()) and bool((error > 0.001).all())
    got = model.log_likelihood(x, S)
    assert not got.requires_grad
    assert bool(((got - want).abs() < 5 * error).all())
    # the bound is lower, by more than the estimate's error: it is not the bound that was reported
    assert bool((model.elbo(x, 200) < got).all())


def test_log_likelihood_with_the_exact_posterior() -> None:
    """All weights are equal, so one sample is as good as many, and S must be divided out exactly."""
    linear = LinearGaussian()
    x = data(linear)
    for S in (1, 7, 3000):
        assert torch.allclose(
            linear.vae(standard()).log_likelihood(x, S), exact(linear).log_prob(x), rtol=1e-11, atol=0
        )


def test_log_likelihood_in_bounded_memory() -> None:
    """The decoder sees at most 10,000 rows at once, S of each x in all; the prior is encoded once."""
    for B, S in ((3, 12_345), (2500, 9), (1, 30_000)):
        model = vae("vamp")
        model.encoder.rows.clear()
        assert model.log_likelihood(torch.rand(B, 6), S).shape == (B,)
        assert max(model.decoder.rows) <= 10_000
        assert sum(model.decoder.rows) == B * S
        assert sum(model.encoder.rows) == B + 5


def test_chunks_do_not_change_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces or at once: two estimates of one distribution, so their means agree within their errors."""
    linear = LinearGaussian(off=0.3)
    model, x = linear.vae(standard()), data(linear, 4)
    means, errors = [], []
    for rows in (10_000, 28):  # all 50 samples at once; seven at a time, the last piece a single one
        monkeypatch.setattr("fastvae._few._ROWS", rows)
        linear.rows.clear()
        draws = torch.stack([model.log_likelihood(x, 50) for _ in range(100)])
        assert (max(linear.rows) == 200) == (rows == 10_000)
        means.append(draws.mean(0))
        errors.append(draws.std(0) / math.sqrt(100))
    assert bool(((means[0] - means[1]).abs() < 5 * (errors[0].square() + errors[1].square()).sqrt()).all())
    assert bool((errors[1] / errors[0] - 1).abs().max() < 0.6)  # the ratio of two deviations of 100 draws each


def test_output_and_beta() -> None:
    """beta weighs the KL in the loss; the bound, and what is reported, stay."""
    model, x = vae("vamp"), torch.rand(4, 6).round()
    outputs = {}
    for beta in (0.0, 0.5, 1.0):
        torch.manual_seed(3)
        outputs[beta] = model(x, beta=beta, num_samples=3)
    whole = outputs[1.0]
    assert torch.equal(whole.elbo, whole.reconstruction - whole.kl)
    for beta, output in outputs.items():
        assert torch.equal(output.elbo, whole.elbo)
        assert torch.equal(output.loss, -(whole.reconstruction - beta * whole.kl).mean())
    assert whole.z.shape == (3, 4, 3) and whole.mu.shape == whole.logvar.shape == (4, 3)
    torch.manual_seed(3)
    assert torch.equal(model.elbo(x, 3), whole.elbo)


def test_samples_are_averaged() -> None:
    """S samples give the mean of S one-sample bounds: the bound, not a tighter one, and not S times it."""
    linear = LinearGaussian(off=0.3)
    model, x = linear.vae(standard()), data(linear)
    torch.manual_seed(1)
    output = model(x, num_samples=4, kl="sample")
    mean, logvar = linear(output.z)
    log_x = Independent(Normal(mean, torch.exp(0.5 * logvar)), 1).log_prob(x)
    assert torch.allclose(output.reconstruction, log_x.mean(0), rtol=1e-12, atol=0)


def test_kl_choices() -> None:
    model, x = vae(), torch.rand(4, 6)
    torch.manual_seed(0)
    auto = model(x, kl="auto").kl
    assert torch.equal(auto, model(x, kl="analytic").kl)
    assert not torch.equal(auto, model(x, kl="sample").kl)
    vamp = vae("vamp")
    with pytest.raises(ValueError, match="closed form"):
        vamp.elbo(x, kl="analytic")
    torch.manual_seed(0)
    auto = vamp(x, kl="auto").kl
    torch.manual_seed(0)
    assert torch.equal(auto, vamp(x, kl="sample").kl)


def test_every_parameter_learns() -> None:
    for prior in ("standard", "vamp"):
        model = vae(prior)
        model(torch.rand(4, 6)).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), name


def test_images_and_pairs() -> None:
    """x of any shape; a decoder that returns a pair; S x B x image."""
    encoder = Encoder(inputs=12)

    class Pair(torch.nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            mean = torch.sigmoid(z[:, :1, None, None]).expand(-1, 3, 2, 2)
            return mean, torch.full_like(mean, -2.0)

    for likelihood in ("gaussian", "discretized_logistic", GaussianLikelihood()):
        model = VAE(encoder, Pair(), standard(), likelihood)
        x = torch.rand(5, 3, 2, 2)
        assert model.elbo(x, 4).shape == (5,)
        assert model.log_likelihood(x, 10).shape == (5,)
        assert model.sample(7).shape == (7, 3, 2, 2)
        assert model.reconstruct(x).shape == x.shape


def test_sample_and_reconstruct() -> None:
    model, x = vae(), torch.rand(4, 6)
    drawn = model.sample(50)
    assert drawn.shape == (50, 6) and set(drawn.unique().tolist()) == {0.0, 1.0} and not drawn.requires_grad
    torch.manual_seed(1)
    mean = model.sample(50, mean=True)
    torch.manual_seed(1)
    assert torch.equal(mean, torch.sigmoid(model.decoder(model.prior.sample(50))))
    assert torch.equal(model.reconstruct(x), torch.sigmoid(model.decoder(model.encoder(x)[0])))
    assert not model.reconstruct(x).requires_grad


def test_an_empty_batch() -> None:
    for prior in ("standard", "vamp"):
        model = vae(prior)
        assert model.elbo(torch.zeros(0, 6)).shape == (0,)
        assert model.log_likelihood(torch.zeros(0, 6), 10).shape == (0,)
        assert model.reconstruct(torch.zeros(0, 6)).shape == (0, 6)
        assert model.sample(0).shape == (0, 6)


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_the_output_is_a_pytree(prior: str, tmp_path: Path) -> None:
    """tree_map, torch.func and an exported file give a VAEOutput back, with None where a field is None."""
    model, x = vae(prior), torch.rand(4, 6).round()
    output = model(x)
    doubled = torch.utils._pytree.tree_map(lambda value: 2 * value, output)
    assert isinstance(doubled, VAEOutput) and torch.equal(doubled.elbo, 2 * output.elbo)
    assert (doubled.log_weights is None) == (prior == "standard")

    def fields_of(logits: Tensor) -> VAEOutput:
        return replace(output, loss=logits.sum(), z=logits[None])

    mapped = torch.func.vmap(fields_of)(torch.ones(5, 2))
    assert isinstance(mapped, VAEOutput) and mapped.z.shape == (5, 1, 2) and mapped.kl.shape == (5, 4)
    _, inside = torch.func.grad(lambda z: (z.sum(), fields_of(z)), has_aux=True)(torch.ones(2))
    assert isinstance(inside, VAEOutput)
    for strict in (True, False):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.export.save(exported, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()(x)
        assert isinstance(loaded, VAEOutput)
        assert [v if v is None else v.shape for v in vars(loaded).values()] == [
            v if v is None else v.shape for v in vars(output).values()
        ]


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_save_load_and_copy(prior: str, tmp_path: Path) -> None:
    model, x = vae(prior), torch.rand(4, 6)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = vae(prior)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.save(model, tmp_path / "model.pt")
    results = []
    for one in (model, fresh, copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.manual_seed(2)
        results.append(one.elbo(x, 2))
    assert all(torch.equal(other, results[0]) for other in results[1:])
