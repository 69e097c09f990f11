"""Priors p(z) of a variational autoencoder: what every prior has, standard normal, free mixture.

Every prior has `log_prob(z) -> [...]`, `sample(n) -> [n, D]` and `kl(mu, logvar, num_samples) -> (z, kl)`.  Those whose
components an encoder makes are in `encoded_priors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae._noise import LOG_2PI

Density = Callable[[Tensor], Tensor]


class Prior(nn.Module):
    """What a VAE asks of its prior.  A subclass gives `log_prob` and `sample`; the rest follows."""

    has_closed_form_kl: ClassVar[bool] = False

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z): [..., D] -> [...], nats."""
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D]; no gradient."""
        raise NotImplementedError

    def density(self, index: Tensor | None = None, near: Tensor | None = None) -> Density:
        """log p(z) for one step of training: what it takes to know p is computed once, here, and not for each z.

        Args:
            index: int64 [B], which of the training points the rows of a batch are, for a prior that is made of them
                (see :class:`fastvae.ExemplarPrior`); others have no use for it.
            near: [B, D], about where the density will be asked for, as the posterior's means; for a prior that saves
                work elsewhere.

        Returns:
            A function: z [..., B, D] -> [..., B], nats, differentiable in z and in the prior's parameters.
        """
        return self.log_prob

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p(z_d) of each dimension by itself: [..., D] -> [..., D], nats."""
        raise NotImplementedError(f"{type(self).__name__} does not know the densities of single dimensions")

    def kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples of q = N(mu, exp(logvar)) and KL(q || p).

        Args:
            mu, logvar: [..., D].
            num_samples: S samples a row, or None for one without a dimension for it.
            index: as in :meth:`density`.

        Returns:
            (z, kl): z [S, ..., D] or [..., D]; kl [S, ...] or [...], nats: in closed form where there is one (then
            the same for every sample), else log q(z | x) - log p(z) of each sample.
        """
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples)
        return z, log_q - self.density(index, mu)(z)

    def snapshot(self) -> Prior:
        """This prior as it is now, for many evaluations without gradients."""
        return self


class StandardNormalPrior(Prior):
    """p(z) = N(0, I).

    Args:
        latent_dim: D.
    """

    has_closed_form_kl = True
    origin: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        self.register_buffer("origin", torch.zeros(latent_dim), persistent=False)  # knows dtype and device

    def log_prob(self, z: Tensor) -> Tensor:
        return self.marginal_log_prob(z).sum(-1)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        z = z if z.dtype == torch.float64 else z.float()
        return -0.5 * (z.square() + LOG_2PI)

    def sample(self, n: int) -> Tensor:
        return torch.randn(n, len(self.origin), dtype=self.origin.dtype, device=self.origin.device)

    def kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples)
        return z, F.gaussian_kl(mu, logvar).expand(log_q.shape)


class Mixture(Prior):
    """A prior that is a mixture: a subclass gives its components, this evaluates and draws from them."""

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mu [K, D], logvar broadcastable to [K, D], log_weights [K]), differentiable; the weights sum to one."""
        raise NotImplementedError

    def step_components(self, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The components for one step of training, where a subclass may save work; near as in :meth:`density`."""
        return self.components()

    def component_log_weights(self) -> Tensor:
        """log w, [K]."""
        raise NotImplementedError

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of these components alone; index int64 [n]."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        return F.mixture_log_prob(z, *self.components())

    def density(self, index: Tensor | None = None, near: Tensor | None = None) -> Density:
        mu, logvar, log_weights = self.step_components(near)
        return lambda z: F.mixture_log_prob(z, mu, logvar, log_weights)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        mu, logvar, log_weights = self.components()
        logvar = logvar.expand(mu.shape)
        each = [
            F.mixture_log_prob(z[..., d, None], mu[:, d, None], logvar[:, d, None], log_weights)
            for d in range(z.shape[-1])
        ]
        return torch.stack(each, -1)

    def kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return F.mixture_kl(mu, logvar, *self.step_components(mu), num_samples)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D]: a component by its weight, then that component alone."""
        if n == 0:
            return self.component_parameters(torch.zeros(0, dtype=torch.int64))[0]
        weights = self.component_log_weights().exp()
        index = torch.multinomial(weights, n, replacement=True)  # [n]
        z, _ = F.gaussian_rsample(*self.component_parameters(index))
        return z

    @torch.no_grad()
    def snapshot(self) -> Prior:
        mu, logvar, log_weights = self.components()
        frozen = MixturePrior(mu, logvar)
        frozen.logits.copy_(log_weights)
        return frozen.requires_grad_(False)


class MixturePrior(Mixture):
    """A mixture of K diagonal Gaussians whose means, variances and weights are parameters.

    Args:
        mu: [K, D], the means to start from.
        logvar: broadcastable to [K, D], the log variances to start from; None means 0.
        learn_weights: make the weights parameters too; they start equal.
    """

    logits: Tensor

    def __init__(self, mu: Tensor, logvar: Tensor | None = None, *, learn_weights: bool = True) -> None:
        super().__init__()
        if mu.ndim != 2 or 0 in mu.shape or not mu.is_floating_point():
            raise ValueError(f"mu must be floating [K, D] with K >= 1 and D >= 1, not {mu.dtype} {list(mu.shape)}")
        start = torch.zeros_like(mu) if logvar is None else logvar.to(mu).expand(mu.shape)
        self.mu = nn.Parameter(mu.detach().clone())
        self.logvar = nn.Parameter(start.detach().clone())
        self.logits = equal_logits(mu, learn_weights)

    def component_log_weights(self) -> Tensor:
        return torch.log_softmax(self.logits, 0)

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu[index], self.logvar[index]

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, self.component_log_weights()


def equal_logits(like: Tensor, learn: bool) -> Tensor:
    """[K] equal logits: a parameter, or a buffer where the weights are fixed."""
    logits = torch.full((like.shape[0],), -math.log(like.shape[0]), dtype=like.dtype, device=like.device)
    return nn.Parameter(logits) if learn else nn.Buffer(logits)
