"""The specification against torch.distributions, closed forms, published vectors, the VampPrior's code."""

from __future__ import annotations

import math

import pytest
import torch
from models import Encoder
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastvae import VampPrior, reference

KNOWN_ANSWER = [
    0x6627E8D5,
    0xE169C58D,
    0xBC57AC4C,
    0x9B00DBD8,
]  # Random123, kat_vectors: philox4x32 10, all zeros


def mixture(K: int = 7, D: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(K)
    mu, logvar = torch.randn(K, D, dtype=torch.float64), torch.randn(K, D, dtype=torch.float64)
    return mu, logvar, torch.log_softmax(torch.randn(K, dtype=torch.float64), 0)


def test_mixture_is_that_of_torch() -> None:
    mu, logvar, log_weights = mixture()
    leaves = [v.requires_grad_() for v in (torch.randn(5, 3, 4, dtype=torch.float64), mu, logvar, log_weights)]
    got = reference.mixture_log_prob(*leaves)
    components = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    # validate_args=False: else Categorical normalises the logits in another graph
    want = MixtureSameFamily(Categorical(logits=log_weights), components).log_prob(leaves[0])
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    weight = torch.randn(5, 3, dtype=torch.float64)
    for i, (g, w) in enumerate(
        zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True)
    ):
        if i == 3:  # Categorical renormalises the weights, the reference does not: torch's gradient sums to zero
            g = g - torch.exp(log_weights.detach()) * g.sum()
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-12)


def test_mixture_integrates_to_one() -> None:
    mu, logvar, log_weights = mixture(5, 1)
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    density = reference.mixture_log_prob(x[:, None], mu, logvar, log_weights).exp()
    assert abs(float(torch.trapezoid(density, x)) - 1) < 1e-9  # the rule is spectrally accurate for Gaussians


def test_one_component_is_a_gaussian() -> None:
    """At its mean -1/2 sum(logvar) - D/2 log 2 pi, and one sigma out 1/2 less."""
    logvar = torch.tensor([[0.2, -3.0]], dtype=torch.float64)
    mu = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    z = torch.cat([mu, mu + mu.new_tensor([[math.exp(0.1), 0.0]])])
    top = 1.4 - math.log(2 * math.pi)
    got = reference.mixture_log_prob(z, mu, logvar)
    assert torch.allclose(got, torch.tensor([top, top - 0.5], dtype=torch.float64), rtol=1e-14, atol=0)


def test_score_is_the_derivative() -> None:
    """Against central differences of log p."""
    mu, logvar, log_weights = mixture()
    z, h = torch.randn(5, 4, dtype=torch.float64), 1e-5
    _, score = reference.mixture_log_prob_and_score(z, mu, logvar, log_weights)
    for d in range(4):
        step = h * torch.eye(4, dtype=torch.float64)[d]
        up, down = (reference.mixture_log_prob(z + s, mu, logvar, log_weights) for s in (step, -step))
        # truncation h^2 times a third derivative, rounding 1e-16 |log p| / h: both below 1e-8 here
        assert torch.allclose(score[:, d], (up - down) / (2 * h), atol=1e-7)


def test_absent_and_excluded_components() -> None:
    """Both are deletion, with finite gradients."""
    mu, logvar, log_weights = mixture()
    z = torch.randn(5, 4, dtype=torch.float64)
    keep = torch.arange(7) != 2
    want = reference.mixture_log_prob(z, mu[keep], logvar[keep], log_weights[keep])
    excluded = reference.mixture_log_prob(z, mu, logvar, log_weights, exclude=torch.full((5,), 2))
    assert torch.allclose(excluded, want, rtol=1e-14, atol=0)
    leaves = [v.clone().requires_grad_() for v in (z, mu, logvar, log_weights)]
    with torch.no_grad():
        leaves[1][2], leaves[2][2], leaves[3][2] = math.nan, math.inf, -math.inf
    got = reference.mixture_log_prob(*leaves)
    assert torch.allclose(got, want, rtol=1e-14, atol=0)
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(got.sum(), leaves))
    nothing = reference.mixture_log_prob(leaves[0], *leaves[1:3], torch.full((7,), -math.inf).double())
    assert nothing.tolist() == [-math.inf] * 5
    assert not torch.autograd.grad(nothing.sum(), leaves[0])[0].any()


def test_philox_known_answer() -> None:
    words = reference.philox4x32(torch.zeros(1, dtype=torch.int64), torch.tensor(0))
    assert words[0].tolist() == KNOWN_ANSWER


@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF0, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("block", [0, 1, 2**32 - 1, 2**32, 2**40 + 5])
def test_philox_in_python_integers(seed: int, block: int) -> None:
    """Ten rounds written with exact integers, for the words that the known answer's zeros do not exercise."""
    low32 = 0xFFFFFFFF
    x = [block & low32, block >> 32, 0, 0]
    key = [seed & low32, (seed >> 32) & low32]
    for _ in range(10):
        p, q = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(q >> 32) ^ x[1] ^ key[0], q & low32, (p >> 32) ^ x[3] ^ key[1], p & low32]
        key = [(key[0] + 0x9E3779B9) & low32, (key[1] + 0xBB67AE85) & low32]
    assert reference.philox4x32(torch.tensor([block]), torch.tensor(seed))[0].tolist() == x


def test_normal_numbers_of_the_known_answer() -> None:
    """Box-Muller on the published words: (0, 1) make the first two numbers, (2, 3) the others."""
    got = reference.philox_normal(torch.tensor([0]), 0, 4).tolist()
    for i in (0, 2):
        radius = math.sqrt(-2 * math.log((KNOWN_ANSWER[i] + 0.5) / 2**32))
        angle = 2 * math.pi * KNOWN_ANSWER[i + 1] / 2**32
        assert got[i : i + 2] == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-12, abs=0)


def test_a_stream_does_not_depend_on_where_it_is_entered() -> None:
    seed = torch.tensor([12345])
    whole = reference.philox_normal(seed, 0, 50)
    for start in range(9):
        for count in (0, 1, 4, 7):
            assert torch.equal(reference.philox_normal(seed, start, count), whole[start : start + count])


def test_kl_is_the_expectation_of_its_estimates() -> None:
    """gaussian_kl, and mixture_kl to a standard normal of one component, within five standard errors."""
    mu = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    logvar = torch.tensor([[-0.7, 0.4]], dtype=torch.float64)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    _, kl = reference.mixture_kl(mu, logvar, zero, zero, None, 40_000)
    error = float(kl.std()) / math.sqrt(40_000)
    assert abs(float(kl.mean() - reference.gaussian_kl(mu, logvar))) < 5 * error


@pytest.mark.parametrize("impl", ["reference", None])
def test_parity_with_the_published_vampprior(impl: str | None) -> None:
    """log_p_z of models/VAE.py in jmtomczak/vae_vampprior, plus the -D/2 log 2 pi that it drops.

    There: a = sum_d -(logvar + (z - mu)^2 / exp(logvar)) / 2 - log K over the encoded pseudo-inputs, then
    log sum exp a.  Pseudo-inputs pass a hardtanh to [0, 1] first.
    """
    torch.manual_seed(0)
    encoder = Encoder().double()
    pseudo_inputs = 0.5 + torch.randn(11, 6, dtype=torch.float64)  # some of them outside [0, 1]
    prior = VampPrior(encoder, pseudo_inputs)
    z = torch.randn(9, 3, dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = encoder(torch.nn.functional.hardtanh(pseudo_inputs, 0.0, 1.0))
        exponent = -0.5 * (logvar + (z[:, None] - mean) ** 2 / logvar.exp()).sum(2) - math.log(11)
        highest = exponent.max(1, keepdim=True).values
        theirs = highest[:, 0] + (exponent - highest).exp().sum(1).log()
        ours = prior.log_prob(z) if impl is None else reference.mixture_log_prob(z, *prior.components())
    dropped = -0.5 * 3 * math.log(2 * math.pi)
    assert torch.allclose(ours, theirs + dropped, rtol=1e-12, atol=0)
    assert abs(dropped) > 2  # a constant that nobody can take for rounding
