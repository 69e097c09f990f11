"""Priors: parameters, state, and draws that follow the weights."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from models import Encoder, vamp_prior
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastvae import VAE, MixturePrior, StandardNormalPrior, VampPrior


def mixture_prior(K: int = 4, D: int = 2) -> MixturePrior:
    """Far apart components of unequal weight, so that a draw tells where it came from."""
    mu = 100.0 * torch.arange(K)[:, None] + torch.randn(K, D)
    prior = MixturePrior(mu, torch.randn(K, D))
    with torch.no_grad():
        prior.logits.copy_(torch.log(torch.arange(1.0, K + 1)))
    return prior


def as_torch(prior: MixturePrior | VampPrior) -> MixtureSameFamily:
    mu, logvar, log_weights = (v.detach().double() for v in prior.components())
    return MixtureSameFamily(
        Categorical(logits=log_weights),
        Independent(Normal(mu, torch.exp(0.5 * logvar)), 1),
        validate_args=False,
    )


def test_log_prob_is_that_of_torch() -> None:
    standard = StandardNormalPrior(latent_dim=3).double()
    mixture, vamp = mixture_prior().double(), vamp_prior(dtype=torch.float64)
    unit = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    for prior, want in ((standard, unit), (mixture, as_torch(mixture)), (vamp, as_torch(vamp))):
        z = prior.sample(5)
        assert torch.allclose(prior.log_prob(z), want.log_prob(z), rtol=1e-12, atol=0)
        assert prior.log_prob(z.reshape(1, 5, -1)).shape == (1, 5)


def test_kl_is_log_q_minus_log_p() -> None:
    """The standard normal's is its closed form, the same for every sample."""
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    for prior in (StandardNormalPrior(latent_dim=3), vamp_prior(), MixturePrior(torch.randn(5, 3))):
        for num_samples in (None, 6):
            torch.manual_seed(3)
            z, kl = prior.kl(mu, logvar, num_samples)
            assert z.shape == ((4, 3) if num_samples is None else (6, 4, 3)) and kl.shape == z.shape[:-1]
            if prior.has_closed_form_kl:
                unit = Normal(0.0, 1.0)
                want = torch.distributions.kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), unit).sum(-1)
                want = want.expand(kl.shape)
            else:
                want = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z) - prior.log_prob(z)
            assert torch.allclose(kl, want, rtol=1e-4, atol=1e-4)  # float32 throughout, numbers below 100


@pytest.mark.parametrize("which", ["mixture", "vamp"])
def test_samples_have_the_mixtures_moments(which: str) -> None:
    """Mean and variance of each dimension within five standard errors of the mixture's own."""
    prior = mixture_prior() if which == "mixture" else vamp_prior()
    n = 40_000
    z, want = prior.sample(n).double(), as_torch(prior)
    assert z.shape == (n, want.mean.shape[0]) and not z.requires_grad
    error = (want.variance / n).sqrt()
    assert bool(((z.mean(0) - want.mean).abs() < 5 * error).all())
    centred = (z - want.mean).square()
    assert bool(((centred.mean(0) - want.variance).abs() < 5 * centred.std(0) / math.sqrt(n)).all())


def test_standard_normal_samples() -> None:
    prior = StandardNormalPrior(latent_dim=3).double()
    z = prior.sample(40_000)
    assert z.shape == (40_000, 3) and z.dtype == torch.float64
    assert float(z.mean(0).abs().max()) < 5 / 200 and float((z.var(0) - 1).abs().max()) < 5 * math.sqrt(2) / 200


def test_components_are_drawn_by_their_weight() -> None:
    """Chi-square over four components: 40 has a probability of 1e-8 with 3 degrees of freedom."""
    prior = mixture_prior(4)
    n = 10_000
    own = (prior.sample(n)[:, 0] / 100).round().long().clamp(0, 3)
    expected = n * torch.arange(1.0, 5.0) / 10
    assert float(((own.bincount(minlength=4) - expected).square() / expected).sum()) < 40
    # the order is random too: the sequence of components repeats itself no more often than chance has it
    repeats = (own[1:] == own[:-1]).double().mean()
    chance = 0.1**2 + 0.2**2 + 0.3**2 + 0.4**2
    assert abs(float(repeats) - chance) < 5 * math.sqrt(chance * (1 - chance) / n) * 1.5  # overlapping pairs


def test_sampling_nothing() -> None:
    for prior in (StandardNormalPrior(latent_dim=2), mixture_prior(), vamp_prior()):
        z = prior.sample(0)
        assert z.ndim == 2 and len(z) == 0


def test_pseudo_inputs_come_from_data_or_noise_and_stay_in_range() -> None:
    """They start as given, a copy; wherever they leave the range, the encoder sees its edge."""
    data = torch.rand(5, 6)
    prior = vamp_prior()
    prior = VampPrior(prior.encoder, data)
    assert torch.equal(prior.pseudo_inputs, data) and prior.pseudo_inputs.data_ptr() != data.data_ptr()
    noise = 0.5 + 3 * torch.randn(50, 6)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        seen: list[Tensor] = []
        encoder = Encoder()
        encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        prior = VampPrior(encoder, noise, value_range=(low, high))
        prior.components()
        prior.sample(30)
        prior.inputs()
        assert len(seen) == 2
        for x in seen:
            assert x.min().item() == low and x.max().item() == high


def test_pseudo_inputs_keep_their_shape() -> None:
    """Images are given to the encoder as images."""
    encoder = Encoder(inputs=12)
    prior = VampPrior(encoder, torch.rand(5, 3, 2, 2))
    mu, logvar, log_weights = prior.components()
    assert mu.shape == logvar.shape == (5, 3) and log_weights.shape == (5,)
    assert prior.sample(4).shape == (4, 3)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_give_the_same_density_and_gradients(chunk_size: int) -> None:
    """K = 5 in chunks below, at and above it; the encoder never sees more rows than a chunk."""
    torch.manual_seed(0)
    whole = vamp_prior(learn_weights=True, dtype=torch.float64)
    encoder = copy.deepcopy(whole.encoder)
    parts = VampPrior(encoder, whole.pseudo_inputs, learn_weights=True, chunk_size=chunk_size)
    z = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for prior in (whole, parts):
        prior.encoder.rows.clear()
        log_prob = prior.log_prob(z)
        leaves = [*prior.parameters(), *prior.encoder.parameters()]
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), leaves)))
    # matrix products of other heights may round otherwise in the last place
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(*results, strict=True))
    assert max(parts.encoder.rows) <= chunk_size
    assert sum(parts.encoder.rows) == 10  # each pseudo-input once forward, once more in backward


def test_learned_weights() -> None:
    """They start equal, are parameters only when asked for, stay normalised, and drive the draws."""
    fixed, learned = vamp_prior(), vamp_prior(learn_weights=True)
    assert [name for name, _ in fixed.named_parameters()] == ["pseudo_inputs"]
    assert {name for name, _ in learned.named_parameters()} == {"pseudo_inputs", "logits"}
    for prior in (fixed, learned):
        assert torch.allclose(prior.component_log_weights(), torch.full((5,), -math.log(5)))
    learned.log_prob(torch.randn(4, 3)).sum().backward()
    assert learned.logits.grad is not None and bool(learned.logits.grad.any())
    with torch.no_grad():
        learned.logits.copy_(torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0]))
    assert abs(float(learned.components()[2].exp().sum()) - 1) < 1e-6
    with torch.no_grad():
        learned.logits.copy_(torch.tensor([-50.0, -50.0, 50.0, -50.0, -50.0]))
    seen: list[Tensor] = []
    learned.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learned.sample(20)
    assert torch.equal(seen[0], learned.inputs()[2].expand(20, 6))


def test_mixture_priors_parameters() -> None:
    prior = MixturePrior(torch.randn(4, 2), torch.tensor(0.5))
    assert {name for name, _ in prior.named_parameters()} == {"mu", "logvar", "logits"}
    assert prior.logvar.shape == (4, 2)
    prior.log_prob(torch.randn(3, 2)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in prior.parameters())
    assert "logits" not in dict(MixturePrior(torch.randn(4, 2), learn_weights=False).named_parameters())


def test_snapshot_is_the_prior_without_its_encoder() -> None:
    """The same density for many calls, from one pass of the encoder; learned weights too."""
    prior = vamp_prior(learn_weights=True)
    with torch.no_grad():
        prior.logits.copy_(torch.randn(5))
    z = torch.randn(4, 3)
    want = prior.log_prob(z).detach()
    prior.encoder.rows.clear()
    frozen = prior.snapshot()
    assert torch.equal(frozen.log_prob(z), frozen.log_prob(z))
    assert prior.encoder.rows == [5]
    assert torch.allclose(frozen.log_prob(z), want, rtol=1e-6)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_state_dict_holds_the_encoder_once_and_loads() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6), learn_weights=True))
    state = model.state_dict()
    assert sum("hidden.weight" in key for key in state) == 1
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert {"prior.pseudo_inputs", "prior.logits"} <= set(state)
    other_encoder = Encoder()
    fresh = VAE(other_encoder, nn.Linear(3, 6), VampPrior(other_encoder, torch.rand(5, 6), learn_weights=True))
    z = torch.randn(4, 3)
    assert not torch.equal(fresh.prior.log_prob(z), model.prior.log_prob(z))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.prior.log_prob(z), model.prior.log_prob(z))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_vampprior_shares_the_copied_encoder(how: str) -> None:
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6)))
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert copied.prior.encoder is copied.encoder and copied.encoder is not encoder
    z = torch.randn(4, 3)
    assert torch.equal(copied.prior.log_prob(z), model.prior.log_prob(z))
    with torch.no_grad():
        copied.encoder.mu.bias.add_(1.0)
    assert not torch.equal(copied.prior.log_prob(z), model.prior.log_prob(z))


def test_moving_a_vae_moves_its_prior_once() -> None:
    """`double()` reaches the encoder by the VAE, and the prior sees it."""
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6))).double()
    assert all(v.dtype == torch.float64 for v in model.prior.components())
    assert model.prior.sample(3).dtype == torch.float64
