"""Priors p(z) of a variational autoencoder: standard normal, free mixture, VampPrior.

Every prior has `log_prob(z) -> [...]`, `sample(n) -> [n, D]` and `kl(mu, logvar, num_samples) -> (z, kl)`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvae import functional as F
from fastvae.reference import LOG_2PI


class Prior(nn.Module):
    """What a VAE asks of its prior.  A subclass gives `log_prob` and `sample`; the rest follows."""

    has_closed_form_kl: ClassVar[bool] = False

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z): [..., D] -> [...], nats."""
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D]; no gradient."""
        raise NotImplementedError

    def kl(self, mu: Tensor, logvar: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Samples of q = N(mu, exp(logvar)) and KL(q || p).

        Args:
            mu, logvar: [..., D].
            num_samples: S samples a row, or None for one without a dimension for it.

        Returns:
            (z, kl): z [S, ..., D] or [..., D]; kl [S, ...] or [...], nats: in closed form where there is one (then
            the same for every sample), else log q(z | x) - log p(z) of each sample.
        """
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples)
        return z, log_q - self.log_prob(z)

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
        z = z if z.dtype == torch.float64 else z.float()
        return -0.5 * (z.square() + LOG_2PI).sum(-1)

    def sample(self, n: int) -> Tensor:
        return torch.randn(n, len(self.origin), dtype=self.origin.dtype, device=self.origin.device)

    def kl(self, mu: Tensor, logvar: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples)
        return z, F.gaussian_kl(mu, logvar).expand(log_q.shape)


class _Mixture(Prior):
    """A prior that is a mixture: a subclass gives its components, this evaluates and draws from them."""

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mu [K, D], logvar [K, D], log_weights [K]), differentiable; the weights sum to one."""
        raise NotImplementedError

    def component_log_weights(self) -> Tensor:
        """log w, [K]."""
        raise NotImplementedError

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of these components alone; index int64 [n]."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        return F.mixture_log_prob(z, *self.components())

    def kl(self, mu: Tensor, logvar: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        return F.mixture_kl(mu, logvar, *self.components(), num_samples)

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


class MixturePrior(_Mixture):
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
        self.logits = _logits(mu, learn_weights)

    def component_log_weights(self) -> Tensor:
        return torch.log_softmax(self.logits, 0)

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu[index], self.logvar[index]

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, self.component_log_weights()


class VampPrior(_Mixture):
    """p(z) = sum_k w_k q(z | u_k): the posterior of K learned pseudo-inputs (Tomczak and Welling 2018).

    Args:
        encoder: x -> (mu, logvar), the very module that the VAE encodes with.  The prior shares it but doesn't own
            it: `parameters()` and `state_dict()` of the prior hold the pseudo-inputs (and weights) alone, so that
            the VAE's hold the encoder once.
        pseudo_inputs: [K, *input_shape], the tensor to start from: data, or noise.
        value_range: (low, high), what the pseudo-inputs are clamped to wherever they are used.
        learn_weights: make the weights w_k parameters; otherwise they are 1 / K.
        chunk_size: encode this many pseudo-inputs at a time and recompute their activations in backward, so that
            memory does not grow with K; None encodes all at once.

    Source: Tomczak and Welling, VAE with a VampPrior (AISTATS 2018).
    """

    encoder: nn.Module
    logits: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        pseudo_inputs: Tensor,
        *,
        value_range: tuple[float, float] = (0.0, 1.0),
        learn_weights: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if pseudo_inputs.ndim < 2 or 0 in pseudo_inputs.shape or not pseudo_inputs.is_floating_point():
            raise ValueError(
                "pseudo_inputs must be floating [K, *input_shape] with K >= 1, "
                f"not {pseudo_inputs.dtype} {list(pseudo_inputs.shape)}"
            )
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be (low, high) with low < high, not {value_range}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, not {chunk_size}")
        self.__dict__["encoder"] = encoder  # past nn.Module's registry: the VAE registers it
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.logits = _logits(pseudo_inputs, learn_weights)
        self.value_range = value_range
        self.chunk_size = chunk_size

    def inputs(self) -> Tensor:
        """The pseudo-inputs as the encoder sees them, in their range: [K, *input_shape]."""
        return self.pseudo_inputs.clamp(*self.value_range)

    def component_log_weights(self) -> Tensor:
        return torch.log_softmax(self.logits, 0)

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(self.pseudo_inputs[index].clamp(*self.value_range))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        log_weights = self.component_log_weights()
        if self.chunk_size is None:
            return (*self.encoder(self.inputs()), log_weights)
        encoded = [checkpoint(self.encoder, u, use_reentrant=False) for u in self.inputs().split(self.chunk_size)]
        mu, logvar = (torch.cat(part) for part in zip(*encoded, strict=True))
        return mu, logvar, log_weights


def _logits(like: Tensor, learn: bool) -> Tensor:
    """[K] equal logits: a parameter, or a buffer where the weights are fixed."""
    logits = torch.full((like.shape[0],), -math.log(like.shape[0]), dtype=like.dtype, device=like.device)
    return nn.Parameter(logits) if learn else nn.Buffer(logits)
