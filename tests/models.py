"""Small encoders, decoders and VAEs for the tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from fastvae import VAE, StandardNormalPrior, VampPrior, _few
from fastvae.priors import Prior


class Encoder(nn.Module):
    """x [B, inputs] -> (mu, logvar) [B, D]; notes how many rows it was given in each call."""

    def __init__(self, inputs: int = 6, latent: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 8)
        self.mu = nn.Linear(8, latent)
        self.logvar = nn.Linear(8, latent)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        h = torch.tanh(self.hidden(x[..., None].flatten(1)))  # x of shape [B] too
        return self.mu(h), self.logvar(h)


class Decoder(nn.Module):
    """z [N, D] -> [N, outputs]; notes how many rows it was given in each call."""

    def __init__(self, latent: int = 3, outputs: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(latent, outputs)
        self.rows: list[int] = []

    def forward(self, z: Tensor) -> Tensor:
        self.rows.append(len(z))
        return self.layer(z)


def vamp_prior(learn_weights: bool = False, dtype: torch.dtype = torch.float32) -> VampPrior:
    """Five components over an encoder of its own, which no VAE casts or moves with it."""
    return VampPrior(Encoder().to(dtype), torch.rand(5, 6, dtype=dtype), learn_weights=learn_weights)


def vae(prior: str = "standard", components: int = 5) -> VAE:
    encoder = Encoder()
    chosen: Prior = (
        VampPrior(encoder, torch.rand(components, 6)) if prior == "vamp" else StandardNormalPrior(latent_dim=3)
    )
    return VAE(encoder, Decoder(), chosen)


def assert_gradient_of_few_samples(model: VAE, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the choices of 2 of 5 samples, the mean gradient is that of all, in its own direction and a random one."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(backward_samples: int | None) -> Tensor:
        torch.manual_seed(1)  # the same draws of z
        loss = model(x, bound="iwae", num_samples=5, gradient="plain", backward_samples=backward_samples).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    of_all = gradient(None)
    assert torch.equal(gradient(5), of_all)
    directions = torch.stack((of_all / of_all.norm(), torch.randn_like(of_all)))
    choice = torch.Generator().manual_seed(3)
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.rand(len(v), generator=choice))
    difference = torch.stack([directions @ (gradient(2) - of_all) for _ in range(400)]).double()
    error = difference.std(0) / math.sqrt(len(difference))
    assert 0 < error[0] < 0.1 * of_all.norm()
    assert bool((difference.mean(0).abs() < 5 * error).all())


class LinearGaussian(nn.Module):
    """x = W z + b + noise of variance v, with orthogonal columns in W, so that the posterior is diagonal too.

    With a prior N(m, diag p): p(x) = N(W m + b, W diag(p) W^T + v I).  For the standard normal prior the
    posterior's precision is 1 + |w_d|^2 / v and its mean W^T (x - b) / v over that.
    """

    def __init__(self, latent: int = 3, outputs: int = 6, variance: float = 0.3, off: float = 0.0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        basis, _ = torch.linalg.qr(torch.randn(outputs, latent, generator=rng, dtype=torch.float64))
        self.W = nn.Parameter(basis * torch.tensor([1.5, 0.8, 0.4], dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(outputs, generator=rng, dtype=torch.float64))
        self.variance = variance
        self.off = off  # how far the encoder is from the exact posterior
        self.rows: list[int] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.W.square().sum(0) / self.variance
        mu = (x - self.b) @ self.W / self.variance / precision + self.off
        return mu, (-precision.log() + self.off).expand_as(mu)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(z))
        mean = z @ self.W.T + self.b
        return mean, torch.full_like(mean, math.log(self.variance))

    def marginal(self, mean: Tensor, variance: Tensor) -> MultivariateNormal:
        """p(x) under the prior N(mean, diag variance)."""
        covariance = (self.W * variance) @ self.W.T
        covariance = covariance + self.variance * torch.eye(len(self.b), dtype=torch.float64)
        return MultivariateNormal(self.W @ mean + self.b, covariance)

    def vae(self, prior: Prior) -> VAE:
        encoder = nn.Module()
        encoder.forward = self.encode  # type: ignore[method-assign]
        return VAE(encoder, self, prior.double(), likelihood="gaussian")
