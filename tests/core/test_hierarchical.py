"""Two levels of latents: a model whose log p(x) is known, and bounds and gradients against plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Decoder, Encoder, assert_gradient_of_few_samples
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import fastvae
from fastvae import (
    VAE,
    AggregatedPosterior,
    ExemplarPrior,
    HierarchicalVAE,
    MixturePrior,
    StandardNormalPrior,
    TrainingStep,
    VampPrior,
)
from fastvae.hierarchical import HierarchicalVAEOutput
from fastvae.priors import Prior

PIXELS, D1, D2 = 6, 4, 3


class Lower(nn.Module):
    """x [B, PIXELS] and z2 [S, B, D2] -> (mu, logvar) of q(z1 | x, z2), [S, B, D1]; notes the rows of x."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_z2, self.out = nn.Linear(PIXELS, 5), nn.Linear(D2, 5), nn.Linear(5, 2 * D1)
        self.rows: list[int] = []

    def forward(self, x: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        mu, logvar = self.out(torch.tanh(self.of_x(x) + self.of_z2(z2))).chunk(2, -1)
        return mu, logvar - 1


class Upper(nn.Module):
    """z2 [..., D2] -> (mu, logvar) of p(z1 | z2), [..., D1]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(D2, 5), nn.Linear(5, 2 * D1)

    def forward(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.out(torch.tanh(self.hidden(z2))).chunk(2, -1)
        return mu, logvar


class Both(nn.Module):
    """z1 [N, D1], z2 [N, D2] -> [N, PIXELS]."""

    def __init__(self) -> None:
        super().__init__()
        self.of_z1, self.of_z2, self.out = nn.Linear(D1, 5), nn.Linear(D2, 5), nn.Linear(5, PIXELS)
        self.rows: list[int] = []

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        assert z1.shape == (len(z2), D1) and z2.shape == (len(z1), D2)
        self.rows.append(len(z1))
        return self.out(torch.tanh(self.of_z1(z1) + self.of_z2(z2)))


class Ignored:
    """In place of a list of rows, which a compiled model should not change."""

    def append(self, rows: int) -> None:
        pass


def model(prior: str = "vamp", **options: Any) -> HierarchicalVAE:
    torch.manual_seed(0)
    encoder = Encoder(PIXELS, D2)
    priors = {
        "standard": lambda: StandardNormalPrior(D2),
        "mixture": lambda: MixturePrior(torch.randn(5, D2)),
        "vamp": lambda: VampPrior(encoder, torch.rand(5, PIXELS), learn_weights=True),
        "exemplar": lambda: ExemplarPrior(encoder, torch.rand(9, PIXELS)),
    }
    return HierarchicalVAE(encoder, Lower(), Upper(), Both(), priors[prior](), **options)


class Linear:
    """x = W1 z1 + W2 z2 + b + noise,  z1 = a z2 + c + noise,  z2 ~ the prior.

    W1 and W2 have the same orthonormal directions, so that each dimension is a chain of scalars, z2 -> z1 -> x, and
    both posteriors are diagonal Gaussians.  `off` shifts the two encoders away from them.
    """

    def __init__(self, off: float = 0.0) -> None:
        rng = torch.Generator().manual_seed(7)
        self.basis, _ = torch.linalg.qr(torch.randn(PIXELS, 3, generator=rng, dtype=torch.float64))
        self.b, self.c = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (PIXELS, 3))
        self.s = torch.tensor([1.5, 0.8, 0.4], dtype=torch.float64)  # W1 = basis * s
        self.t = torch.tensor([0.5, -0.6, 0.9], dtype=torch.float64)  # W2 = basis * t
        self.a = torch.tensor([0.7, 1.2, -0.4], dtype=torch.float64)
        self.v1, self.v = torch.tensor([0.6, 0.2, 1.1], dtype=torch.float64), 0.3
        self.off = off

    def posterior_of_z2(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Under z2 ~ N(0, I)."""
        gain, variance = self.s * self.a + self.t, self.s.square() * self.v1 + self.v  # of x given z2, along the basis
        precision = 1 + gain.square() / variance
        mu = gain * ((x - self.b) @ self.basis - self.s * self.c) / variance / precision
        return mu, (-precision.log()).expand_as(mu)

    def posterior_of_z1(self, x: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 / self.v1 + self.s.square() / self.v
        rest = (x - self.b) @ self.basis - self.t * z2
        mu = ((self.a * z2 + self.c) / self.v1 + self.s * rest / self.v) / precision
        return mu, (-precision.log()).expand_as(mu)

    def z1_given_z2(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        return self.a * z2 + self.c, self.v1.log().expand_as(z2)

    def x_given_both(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        mean = (self.s * z1 + self.t * z2) @ self.basis.T + self.b
        return mean, torch.full_like(mean, math.log(self.v))

    def marginal(self, mean: Tensor, variance: Tensor) -> MultivariateNormal:
        """p(x) where z2 ~ N(mean, diag variance), by the moments of the two levels."""
        W1, W2 = self.basis * self.s, self.basis * self.t
        W = W1 * self.a + W2
        covariance = (W * variance) @ W.T + (W1 * self.v1) @ W1.T + self.v * torch.eye(PIXELS, dtype=torch.float64)
        return MultivariateNormal(W @ mean + W1 @ self.c + self.b, covariance)

    def data(self, n: int = 6) -> Tensor:
        torch.manual_seed(5)
        return self.standard().sample((n,))

    def standard(self) -> MultivariateNormal:
        return self.marginal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))

    def vae(self, prior: Prior, **leaves: Tensor) -> HierarchicalVAE:
        """The model; the networks of q have shifts that are parameters."""
        shift = Shifted(self.posterior_of_z2, self.off), Shifted(self.posterior_of_z1, self.off)
        return HierarchicalVAE(
            *shift, Shifted(self.z1_given_z2, 0.0), Called(self.x_given_both), prior.double(), "gaussian"
        )


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function  # type: ignore[method-assign]


class Shifted(nn.Module):
    """(mu, logvar) of a function, with parameters added to them."""

    def __init__(self, function: Any, off: float) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.full((2, 3), off, dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.function(*inputs)
        return mu + self.shift[0], logvar + self.shift[1]


def normal(mu: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)


def test_exact_posteriors_give_log_p_in_every_sample() -> None:
    """Every weight is p(x) then, so every sampled bound is log p(x), whatever S, estimator and chunks are."""
    linear = Linear()
    x, vae = linear.data(), linear.vae(StandardNormalPrior(3))
    log_p = linear.standard().log_prob(x)
    for S in (1, 4):
        assert torch.allclose(vae.elbo(x, S, kl="sample"), log_p, rtol=1e-11, atol=0)
        assert torch.allclose(vae.elbo(x, S, gradient="stl"), log_p, rtol=1e-11, atol=0)
        assert torch.allclose(vae.iwae(x, S), log_p, rtol=1e-11, atol=0)
        assert torch.allclose(vae.iwae(x, S, chunk_size=3), log_p, rtol=1e-11, atol=0)
        assert torch.allclose(vae.log_likelihood(x, S), log_p, rtol=1e-11, atol=0)


@pytest.mark.parametrize("prior", ["standard", "mixture"])
def test_elbo_below_and_importance_sampling_at_log_p(prior: str) -> None:
    """Encoders that are off, and a log p(x) that is known: met within five standard errors of the estimate."""
    linear, S, repeats = Linear(off=0.2), 1000, 20
    x = linear.data(4)
    torch.manual_seed(1)
    if prior == "standard":
        mu = logvar = torch.zeros(1, 3, dtype=torch.float64)
        vae = linear.vae(StandardNormalPrior(3))
    else:
        mu, logvar = torch.randn(4, 3).double(), 0.3 * torch.randn(4, 3).double()
        vae = linear.vae(MixturePrior(mu, logvar))
    parts = [linear.marginal(m, v.exp()).log_prob(x) for m, v in zip(mu, logvar, strict=True)]
    log_p = torch.logsumexp(torch.stack(parts), 0) - math.log(len(mu))
    estimates = torch.stack([vae.log_likelihood(x, S) for _ in range(repeats)])
    weights = (estimates - log_p).exp()  # of mean 1
    error = weights.std(0) / math.sqrt(repeats)
    assert bool((error < 0.02).all()) and not estimates.requires_grad
    assert bool(((weights.mean(0) - 1).abs() < 5 * error).all())
    for kl in ("auto", "sample"):
        draws = torch.stack([vae.elbo(x, 100, kl=kl).detach() for _ in range(repeats)])
        assert bool((draws.mean(0) + 5 * draws.std(0) / math.sqrt(repeats) < log_p).all())


def test_both_forms_of_the_kl_agree_in_expectation() -> None:
    vae, x = model("vamp").double(), torch.rand(3, PIXELS, dtype=torch.float64)
    means, errors = [], []
    for kl in ("auto", "sample"):
        draws = torch.stack([vae(x, num_samples=200, kl=kl).kl.detach() for _ in range(30)])
        means.append(draws.mean(0))
        errors.append(draws.std(0) / math.sqrt(30))
    assert bool(((means[0] - means[1]).abs() < 5 * (errors[0].square() + errors[1].square()).sqrt()).all())
    assert bool((errors[0] < errors[1]).all())  # what is known need not be estimated


class Plain:
    """The bounds of a model in plain PyTorch, of the very draws that it made."""

    def __init__(self, vae: HierarchicalVAE, x: Tensor, output: HierarchicalVAEOutput) -> None:
        self.vae, self.x = vae, x
        mu, logvar = vae.encoder(x)
        z1, z2 = output.z1.detach(), output.z2.detach()
        q1 = vae.lower_encoder(x, z2)
        self.eps = [(z - m) / torch.exp(0.5 * v) for z, (m, v) in ((z1, q1), (z2, (mu, logvar)))]
        self.eps = [eps.detach() for eps in self.eps]

    def draw(self) -> tuple[Tensor, Tensor]:
        """z1, z2 by the noise that was drawn; differentiable in the encoders' parameters."""
        mu, logvar = self.vae.encoder(self.x)
        z2 = mu + torch.exp(0.5 * logvar) * self.eps[1]
        mu, logvar = self.vae.lower_encoder(self.x, z2)
        return mu + torch.exp(0.5 * logvar) * self.eps[0], z2

    def log_x(self, vae: HierarchicalVAE, z1: Tensor, z2: Tensor) -> Tensor:
        logits = vae.decoder(z1.flatten(0, 1), z2.flatten(0, 1)).reshape(*z2.shape[:2], PIXELS)
        return Independent(torch.distributions.Bernoulli(logits=logits), 1).log_prob(self.x)

    def log_p2(self, vae: HierarchicalVAE, z2: Tensor) -> Tensor:
        if isinstance(vae.prior, StandardNormalPrior):
            return Independent(Normal(torch.zeros_like(z2), 1.0), 1).log_prob(z2)
        assert isinstance(vae.prior, VampPrior)
        mu, logvar = vae.encoder(vae.prior.pseudo_inputs.clamp(0, 1))
        return torch.logsumexp(
            torch.log_softmax(vae.prior.logits, 0) + normal(mu, logvar).log_prob(z2[..., None, :]), -1
        )

    def log_p(self, vae: HierarchicalVAE, z1: Tensor, z2: Tensor) -> Tensor:
        return normal(*vae.lower_prior(z2)).log_prob(z1) + self.log_p2(vae, z2)

    def log_q(self, vae: HierarchicalVAE, z1: Tensor, z2: Tensor) -> Tensor:
        return normal(*vae.encoder(self.x)).log_prob(z2) + normal(*vae.lower_encoder(self.x, z2)).log_prob(z1)

    def elbo_with_known_kl(self, beta: float) -> Tensor:
        z1, z2 = self.draw()
        mu, logvar = self.vae.encoder(self.x)
        q2, q1 = normal(mu, logvar), normal(*self.vae.lower_encoder(self.x, z2))
        kl1 = kl_divergence(q1, normal(*self.vae.lower_prior(z2)))
        if isinstance(self.vae.prior, StandardNormalPrior):
            kl2 = kl_divergence(q2, normal(torch.zeros_like(mu), torch.zeros_like(logvar))).expand_as(kl1)
        else:
            kl2 = q2.log_prob(z2) - self.log_p2(self.vae, z2)
        return (self.log_x(self.vae, z1, z2) - beta * (kl1 + kl2)).mean()

    def estimate(self, bound: str, gradient: str, beta: float) -> Tensor:
        """Something whose gradient is the estimator: the formulas at the top of bounds.py, z being both levels."""
        constant = copy.deepcopy(self.vae).requires_grad_(False)
        z = self.draw()
        still = tuple(level.detach() for level in z)

        def log_w(p: HierarchicalVAE, q: HierarchicalVAE, z: tuple[Tensor, ...]) -> Tensor:
            return self.log_x(p, *z) + beta * (self.log_p(p, *z) - self.log_q(q, *z))

        value = log_w(constant, constant, still)
        v = torch.full_like(value, 1 / len(value)) if bound == "elbo" else torch.softmax(value, 0)
        path = log_w(constant, constant, z)
        if gradient == "dreg":
            path = (1 - beta + beta * v) * path
        score = -beta * self.log_q(self.vae, *still) if gradient == "plain" else 0.0
        own = log_w(self.vae, constant, still)  # of the parameters of p
        return (v * (path + score + own)).sum(0).mean()


def gradients(vae: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    names, parameters = zip(*vae.named_parameters(), strict=True)
    return zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)


def assert_same_gradients(vae: nn.Module, got: Tensor, want: Tensor) -> None:
    for (name, a), (_, b) in zip(gradients(vae, got), gradients(vae, want), strict=True):
        assert a is not None and b is not None, name
        assert bool(b.any()) and torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("prior", ["standard", "vamp"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_elbo_and_its_gradient_are_those_of_plain_pytorch(prior: str, beta: float) -> None:
    vae, x = model(prior).double(), torch.rand(4, PIXELS, dtype=torch.float64).round()
    output = vae(x, num_samples=3, beta=beta)
    want = Plain(vae, x, output).elbo_with_known_kl(beta)
    assert torch.allclose(-output.loss, want, rtol=1e-12, atol=0)
    assert_same_gradients(vae, -output.loss, want)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("bound", "gradient"),
    [("elbo", "plain"), ("elbo", "stl"), ("iwae", "plain"), ("iwae", "stl"), ("iwae", "dreg")],
)
def test_estimators_are_those_of_plain_pytorch(bound: str, gradient: str, chunk_size: int | None) -> None:
    """Of both levels, though z1 depends on z2: by autograd through copies whose parameters are constants."""
    vae, x, beta = model("vamp").double(), torch.rand(4, PIXELS, dtype=torch.float64).round(), 0.6
    output = vae(x, num_samples=5, bound=bound, gradient=gradient, kl="sample" if bound == "elbo" else "auto",
                 beta=beta, chunk_size=chunk_size)  # fmt: skip
    plain = Plain(vae, x, output)
    log_w = plain.log_x(vae, *plain.draw()) + plain.log_p(vae, *plain.draw()) - plain.log_q(vae, *plain.draw())
    assert output.log_weights is not None
    assert torch.allclose(output.log_weights, log_w, rtol=1e-11, atol=1e-12)
    value = log_w.mean(0) if bound == "elbo" else torch.logsumexp(log_w, 0) - math.log(5)
    assert torch.allclose(output.bound, value, rtol=1e-11, atol=0)
    assert_same_gradients(vae, -output.loss, plain.estimate(bound, gradient, beta))


@pytest.mark.parametrize(("bound", "gradient"), [("elbo", "stl"), ("iwae", "stl"), ("iwae", "dreg")])
def test_no_gradient_where_both_encoders_are_exact(bound: str, gradient: str) -> None:
    """Without the path from z2 through the lower encoder there is one in every draw."""
    linear = Linear()
    vae, x = linear.vae(StandardNormalPrior(3)), linear.data()
    encoders = [vae.encoder.shift, vae.lower_encoder.shift]
    for name, small in ((gradient, True), ("plain", False)):
        loss = vae(x, num_samples=3, bound=bound, gradient=name, kl="sample" if name == "plain" else "auto").loss
        largest = max(float(g.abs().max()) for g in torch.autograd.grad(loss, encoders))
        assert (largest < 1e-12) == small


def test_iwae_of_one_sample_is_the_elbos_estimate() -> None:
    vae, x = model("vamp"), torch.rand(4, PIXELS)
    torch.manual_seed(3)
    iwae = vae.iwae(x, 1, gradient="plain")
    torch.manual_seed(3)
    output = vae(x, kl="sample")
    assert torch.equal(iwae, output.bound) and torch.equal(output.bound, output.elbo)


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_a_lower_level_that_nothing_uses_leaves_a_vae(prior: str) -> None:
    """q(z1 | x, z2) = p(z1 | z2), and a decoder of z2 alone."""
    two, x = model(prior).double(), torch.rand(4, PIXELS, dtype=torch.float64)
    decoder = Decoder(D2, PIXELS).double()
    two.lower_encoder.forward = lambda x, z2: two.lower_prior(z2)
    two.decoder.forward = lambda z1, z2: decoder(z2)
    one = VAE(two.encoder, decoder, two.prior)
    results = []
    for vae in (two, one):
        torch.manual_seed(4)
        output = vae(x)
        results.append((output.loss, output.bound, output.kl, vae.reconstruct(x)))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(*results, strict=True))
    log_p = [torch.stack([vae.log_likelihood(x, 300) for _ in range(20)]) for vae in (two, one)]
    errors = [draws.std(0) / math.sqrt(20) for draws in log_p]
    difference = log_p[0].mean(0) - log_p[1].mean(0)
    assert bool((difference.abs() < 5 * torch.hypot(errors[0], errors[1])).all())


def test_output() -> None:
    vae, x = model("vamp"), torch.rand(4, PIXELS)
    output = vae(x, num_samples=3)
    assert isinstance(output, HierarchicalVAEOutput)
    assert output.z.shape == (3, 4, D1 + D2) and output.mu.shape == output.logvar.shape == (4, D2)
    assert output.z1.shape == (3, 4, D1) and output.z2.shape == (3, 4, D2)
    assert output.log_weights is None and output.effective_sample_size is None  # the KL of z1 is in closed form
    sampled = vae(x, num_samples=3, kl="sample")
    assert sampled.log_weights is not None and sampled.log_weights.shape == (3, 4)
    with pytest.raises(ValueError, match="closed form"):
        vae(x, kl="analytic")
    assert vae.lower_encoder.rows == [4, 4]  # each x once, whatever S is
    torch.manual_seed(1)
    whole = vae(x, beta=1.0)
    torch.manual_seed(1)
    half = vae(x, beta=0.5)
    assert torch.equal(half.bound, whole.bound)
    assert torch.equal(half.loss, -(whole.reconstruction - 0.5 * whole.kl).mean())


def test_the_output_is_a_pytree(tmp_path: Path) -> None:
    """An exported file takes batches of another size, and gives the same and in the same form."""
    vae = model("vamp")
    for network in (vae.encoder, vae.lower_encoder, vae.decoder):
        network.rows = Ignored()
    doubled = torch.utils._pytree.tree_map(lambda value: 2 * value, vae(torch.rand(4, PIXELS)))
    assert isinstance(doubled, HierarchicalVAEOutput)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(vae, (torch.rand(4, PIXELS),), dynamic_shapes={"x": batch}, strict=True)
    torch.export.save(exported, tmp_path / "model.pt2")
    x, outputs = torch.rand(7, PIXELS), []
    for run in (vae, torch.export.load(tmp_path / "model.pt2").module()):
        torch.manual_seed(1)
        outputs.append(run(x))
    assert isinstance(outputs[1], HierarchicalVAEOutput) and outputs[1].z1.shape == (1, 7, D1)
    assert torch.allclose(outputs[0].bound, outputs[1].bound)


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp", "exemplar"])
def test_every_parameter_learns(prior: str) -> None:
    for options in ({}, {"gradient": "stl"}, {"bound": "iwae", "num_samples": 3, "chunk_size": 2}):
        vae = model(prior)
        vae(torch.rand(4, PIXELS), index=torch.arange(4), **options).loss.backward()
        for name, parameter in vae.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), name


def test_samples_and_reconstructions() -> None:
    vae, x = model("mixture"), torch.rand(4, PIXELS)
    assert set(vae.sample(50).unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(1)
    mean = vae.sample(50, mean=True)
    torch.manual_seed(1)
    z2 = vae.prior.sample(50)
    z1, _ = fastvae.gaussian_rsample(*vae.lower_prior(z2))
    assert torch.equal(mean, torch.sigmoid(vae.decoder(z1, z2))) and not mean.requires_grad
    mu2 = vae.encoder(x)[0]
    mu1 = vae.lower_encoder(x, mu2)[0]
    assert torch.allclose(vae.reconstruct(x), torch.sigmoid(vae.decoder(mu1, mu2)))


def test_samples_have_the_models_moments() -> None:
    linear = Linear()
    x, want = linear.vae(StandardNormalPrior(3)).sample(40_000), linear.standard()
    error = want.variance.sqrt() / math.sqrt(len(x))
    assert bool(((x.mean(0) - want.mean).abs() < 5 * error).all())
    assert torch.allclose(x.T.cov(), want.covariance_matrix, atol=0.06)


def test_log_likelihood_in_bounded_memory() -> None:
    vae = model("vamp")
    assert vae.log_likelihood(torch.rand(3, PIXELS), 2345).shape == (3,)
    assert max(vae.decoder.rows) <= 2000 and sum(vae.decoder.rows) == 3 * 2345


def test_an_empty_batch_and_a_single_row() -> None:
    for prior in ("standard", "vamp"):
        vae = model(prior)
        for B in (0, 1):
            x = torch.rand(B, PIXELS)
            assert vae.elbo(x).shape == vae.iwae(x, 2).shape == vae.log_likelihood(x, 10).shape == (B,)
            assert vae.reconstruct(x).shape == vae.sample(B).shape == (B, PIXELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Densities in float32, whatever the networks compute in."""
    vae, x = model("vamp").to(dtype), torch.rand(4, PIXELS, dtype=dtype)
    for kl in ("auto", "sample"):
        output = vae(x, kl=kl)
        assert output.bound.dtype == output.kl.dtype == torch.float32 and output.z.dtype == dtype
    assert vae.sample(3).dtype == dtype and vae.log_likelihood(x, 5).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bound": "iwae", "num_samples": 3}])
def test_under_compile(options: dict[str, Any]) -> None:
    """Without a graph break, and the same loss and gradients for the same seed."""
    vae, x = model("vamp"), torch.rand(4, PIXELS)
    for network in (vae.encoder, vae.lower_encoder, vae.decoder):
        network.rows = Ignored()
    results = []
    for run in (vae, torch.compile(vae, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        loss = run(x, **options).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, [*vae.parameters()])])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results, strict=True))


def test_the_backend_holds_inside() -> None:
    """`reference` computes in another order: other last bits of the same numbers."""
    x, values = torch.rand(4, PIXELS), []
    for options in ({}, {"impl": "reference"}):
        torch.manual_seed(0)
        vae = model("vamp", **options)
        torch.manual_seed(3)
        values.append(vae(x, num_samples=2).bound)
    torch.manual_seed(3)
    with fastvae.use_backend("reference"):
        assert torch.equal(model_bound := values[1], vae(x, num_samples=2).bound)
    assert torch.allclose(values[0], model_bound, rtol=1e-5)
    with pytest.raises(ValueError, match="impl"):
        model("vamp", impl="nothing")


def test_a_training_step_trains_it() -> None:
    torch.manual_seed(1)
    x = torch.rand(32, PIXELS).round()
    vae = model("vamp")
    before = float(vae.elbo(x, 50).mean().detach())
    step = TrainingStep(vae, torch.optim.Adam(vae.parameters(), lr=0.05), prepare=lambda rows: x[rows])
    for _ in range(25):
        output = step(torch.arange(32), beta=1.0)
    assert isinstance(output, HierarchicalVAEOutput) and not output.loss.requires_grad
    assert step.why_not_captured is not None
    assert float(vae.elbo(x, 50).mean().detach()) > before + 0.3


def test_save_load_and_copy(tmp_path: Path) -> None:
    vae, x = model("vamp"), torch.rand(4, PIXELS)
    assert {name.split(".")[0] for name in vae.state_dict()} == {
        "encoder", "lower_encoder", "lower_prior", "decoder", "prior",
    }  # fmt: skip
    torch.save(vae.state_dict(), tmp_path / "state.pt")
    fresh = model("vamp")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    results = []
    for one in (vae, fresh, copy.deepcopy(vae)):
        torch.manual_seed(2)
        results.append(one.elbo(x, 2))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_aggregated_posterior_of_the_upper_level() -> None:
    vae, x = model("vamp"), torch.rand(9, PIXELS)
    posterior = AggregatedPosterior.of(vae.encoder, x)
    assert torch.isfinite(posterior.marginal_kl(vae.prior, 100).value)
    encoder = copy.deepcopy(vae.encoder)
    vae.encoder = encoder
    assert vae.prior.encoder is encoder  # it follows


WRONG: dict[str, tuple[str, Any, str]] = {
    "lower encoder, one tensor": ("lower_encoder", lambda x, z2: z2, "lower_encoder must return .*a tensor"),
    "lower encoder, rows": (
        "lower_encoder", lambda x, z2: (z2.flatten(0, 1),) * 2, r"lower_encoder must return .*both \[S, B, D1\]",
    ),
    "lower encoder, a logvar that broadcasts": (
        "lower_encoder", lambda x, z2: (z2, z2[..., :1]), r"logvar \[2, 4, 1\]",
    ),
    "lower prior, one tensor": ("lower_prior", lambda z2: z2, "lower_prior must return .*a tensor"),
    "lower prior, another D1": ("lower_prior", lambda z2: (z2, z2), r"lower_prior must return .*both \[N, 4\]"),
    "lower prior, a scalar": ("lower_prior", lambda z2: (z2.sum(), z2.sum()), r"mu \[\]"),
    "decoder, other rows": ("decoder", lambda z1, z2: z1[:1], r"must return \[8, ...\] for z \[8, 4\] and \[8, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kl", ["auto", "sample"])
def test_networks_that_return_something_else(case: str, kl: str) -> None:
    name, function, told = WRONG[case]
    vae = model("vamp")
    getattr(vae, name).forward = function
    with pytest.raises((TypeError, ValueError), match=told):
        vae(torch.rand(4, PIXELS), num_samples=2, kl=kl)


def test_few_samples_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_gradient_of_few_samples(model("vamp"), torch.rand(4, PIXELS), monkeypatch)
    vae = model()
    vae.lower_prior = nn.Sequential(nn.Dropout(0.1), vae.lower_prior)
    with pytest.raises(ValueError, match="Dropout in training mode"):
        vae(torch.rand(4, PIXELS), bound="iwae", num_samples=3, backward_samples=2)


@pytest.mark.parametrize("wrong", [None, Upper, lambda *z: z, StandardNormalPrior])
@pytest.mark.parametrize("name", ["lower_encoder", "lower_prior"])
def test_what_is_no_network(name: str, wrong: Any) -> None:
    networks = {"lower_encoder": Lower(), "lower_prior": Upper()} | {name: wrong}
    with pytest.raises(TypeError, match=f"{name} must be a torch.nn.Module, not "):
        HierarchicalVAE(Encoder(PIXELS, D2), **networks, decoder=Both(), prior=StandardNormalPrior(D2))


def test_a_prior_with_another_encoder() -> None:
    prior = VampPrior(Encoder(PIXELS, D2), torch.rand(5, PIXELS))
    with pytest.raises(ValueError, match="the same object"):
        HierarchicalVAE(Encoder(PIXELS, D2), Lower(), Upper(), Both(), prior)
