"""Priors p(z) of a variational autoencoder: what every prior has, standard normal, free mixture.

Every prior has `log_prob(z) -> [...]`, `sample(n) -> [n, D]` and `kl(mu, logvar, num_samples) -> (z, kl)`.  Those whose
components an encoder makes are in `encoded_priors.py`.  One's own prior is a subclass of :class:`Prior` or
:class:`Mixture`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastvae import _checks
from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.contracts import evaluate, is_readable, require_tensor

Density = Callable[[Tensor], Tensor]


class Prior(nn.Module):
    """p(z), as a VAE asks for it.  A subclass defines `log_prob` and `sample`; the rest follows.

    A subclass may also define `kl` where there is a closed form (and set `has_closed_form_kl`), `density` where one
    step of training can share work between evaluations or leave points out, `marginal_log_prob` for
    :meth:`fastvae.AggregatedPosterior.dimension_wise_kl`, and `snapshot` where `log_prob` is costly to prepare.

    Attributes:
        has_closed_form_kl: whether `kl` returns KL(q || p) itself, and not an estimate by the samples.

    Example::

        class LaplacePrior(fastvae.Prior):
            def __init__(self, latent_dim):
                super().__init__()
                self.log_scale = torch.nn.Parameter(torch.zeros(latent_dim))

            def log_prob(self, z):
                return torch.distributions.Laplace(0.0, self.log_scale.exp()).log_prob(z).sum(-1)

            @torch.no_grad()
            def sample(self, n):
                return torch.distributions.Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp()).sample((n,))
    """

    has_closed_form_kl: ClassVar[bool] = False

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), differentiable in z and in the prior's parameters.

        Args:
            z: [..., D].

        Returns:
            [...], nats, summed over D.  The VAE refuses any other shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(z)")

    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D]; no gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define sample(n)")

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
        return z, log_q - evaluate(f"the density of {type(self).__name__}", self.density(index, mu), z)

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
        self._check_dimensions("z", z)
        z = z if z.dtype == torch.float64 else z.float()
        return -0.5 * (z.square() + LOG_2PI)

    def sample(self, n: int) -> Tensor:
        return torch.randn(n, len(self.origin), dtype=self.origin.dtype, device=self.origin.device)

    def kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check_dimensions("mu", mu)
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples)
        return z, F.gaussian_kl(mu, logvar).expand(log_q.shape)

    def _check_dimensions(self, name: str, tensor: Tensor) -> None:
        D = len(self.origin)
        if tensor.ndim == 0 or tensor.shape[-1] != D:
            raise ValueError(
                f"{name} must be [..., {D}] for StandardNormalPrior({D}), not {list(tensor.shape)}: "
                "the prior's latent_dim must be the encoder's D"
            )


class Mixture(Prior):
    """A prior that is a mixture of K diagonal Gaussians.  A subclass defines `components`; the rest follows.

    A subclass in which a few components, or the weights alone, cost less than all components also defines
    `component_parameters` and `component_log_weights`, which `sample` is made of.

    Example::

        class UnitVariances(fastvae.Mixture):
            def __init__(self, mu):
                super().__init__()
                self.mu = torch.nn.Parameter(mu)

            def components(self):
                K = len(self.mu)
                return self.mu, self.mu.new_zeros(()), self.mu.new_full((K,), -math.log(K))
    """

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mu [K, D], logvar broadcastable to [K, D], log_weights [K]), differentiable; the weights sum to one.

        A logvar of one dimension is [D], for all components alike, also where K = D; one for each component is
        [K, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must define components()")

    def step_components(self, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The components for one step of training, where a subclass may save work; near as in :meth:`density`."""
        return self.components()

    def component_log_weights(self) -> Tensor:
        """log w, [K]."""
        return self.components()[2]

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of these components alone; index int64 [n]."""
        mu, logvar, _ = self.components()
        return mu[index], logvar.expand(mu.shape)[index]

    def log_prob(self, z: Tensor) -> Tensor:
        return F.mixture_log_prob(z, *self.components())

    def density(self, index: Tensor | None = None, near: Tensor | None = None) -> Density:
        mu, logvar, log_weights = self.step_components(near)
        return lambda z: F.mixture_log_prob(z, mu, logvar, log_weights)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        mu, logvar, log_weights = self.components()
        if z.ndim == 0 or z.shape[-1] != mu.shape[1]:
            raise ValueError(f"z must be [..., {mu.shape[1]}] to match mu {list(mu.shape)}, not {list(z.shape)}")
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
        """n independent draws, [n, D]: a component by its weight, then that component alone, whatever K is."""
        index = _draw_components(self.component_log_weights(), n)
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
        logvar: broadcastable to [K, D], the log variances to start from; None means 0.  One dimension is [D], for all
            components alike, also where K = D; one log variance for each component is [K, 1].
        learn_weights: make the weights parameters too.
        probs: [K], the weights to start from; what they sum to does not matter.  None means equal weights.  A weight
            of 0 stays 0: it is kept as a logit of -inf, whose gradient is 0.
    """

    logits: Tensor

    def __init__(
        self, mu: Tensor, logvar: Tensor | None = None, *, learn_weights: bool = True, probs: Tensor | None = None
    ) -> None:
        super().__init__()
        logvar = expanded_logvar(mu, logvar)
        self.mu = nn.Parameter(mu.detach().clone())
        self.logvar = nn.Parameter(logvar.detach().clone())
        self.logits = weight_logits(mu, probs, learn_weights)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, torch.log_softmax(self.logits, 0)


def log_weights_of(probs: Tensor) -> Tensor:
    """log w of weights w for :func:`fastvae.mixture_log_prob`, with a finite gradient also where a weight is 0.

    A component of weight 0 is not there: its log weight is -inf, and it gets a gradient of 0.  `probs.log()` has the
    same values, but autograd makes NaN of such a weight's gradient, 0 / 0.

    Of the derivative d log p / d w_k = N_k / p only as much comes back as goes by way of log w_k:

    - w_k > 0: N_k / p, as the gradient r_k in log w_k, divided by w_k.  By default the compiled kernels leave out
      responsibilities r_k below a rounding (see `dense_backward`), and r_k / w_k of a small w_k is not small: a
      gradient of 0 comes back where w_k is about 1e-10 or less.  With `dense_backward=True` it is N_k / p.
    - w_k = 0: N_k / p is not 0 there, but r_k is, so it cannot be had.  The gradient is 0, and a step along it leaves
      the component out of the mixture.  A component that training may bring in needs a weight above 0 to start from.

    Args:
        probs: weights >= 0, any shape.  They are not normalised.

    Returns:
        Their logarithms, in the same shape; -inf for a weight of 0.

    Raises:
        TypeError: probs is not a floating tensor.
        ValueError: a weight is negative (on the CPU; elsewhere, and in a compiled function, its logarithm is NaN).
    """
    if not require_tensor("probs", probs).is_floating_point():
        raise TypeError(f"probs must be a floating tensor, not {probs.dtype}")
    if probs.device.type == "cpu" and is_readable(probs) and bool((probs < 0).any()):
        raise ValueError(f"probs must be >= 0, but the smallest is {float(probs.detach().min()):.4g}")
    absent = probs == 0
    return probs.masked_fill(absent, 1.0).log().masked_fill(absent, -math.inf)


def weight_logits(like: Tensor, probs: Tensor | None, learn: bool) -> Tensor:
    """[K] logits of these weights, or of equal ones: a parameter, or a buffer where the weights are fixed."""
    K = like.shape[0]
    if probs is None:
        logits = like.new_full((K,), -math.log(K))
    else:
        if require_tensor("probs", probs).shape != (K,):
            raise ValueError(f"probs must be [{K}], a weight for each component, not {list(probs.shape)}")
        total = probs.detach().sum(dtype=torch.float64)
        if is_readable(probs) and not (bool((probs >= 0).all()) and 0 < float(total) < math.inf):
            raise ValueError("probs must be finite weights >= 0, and not all 0")
        logits = log_weights_of(probs.detach().double() / total).to(like)
    return nn.Parameter(logits) if learn else nn.Buffer(logits)


def expanded_logvar(mu: Tensor, logvar: Tensor | None, rows: str = "K") -> Tensor:
    """logvar, 0 for None, as [K, D] like mu; errors for either.  rows: how many components there are, K or N."""
    if require_tensor("mu", mu).ndim != 2 or 0 in mu.shape or not mu.is_floating_point():
        raise ValueError(
            f"mu must be floating [{rows}, D] with {rows} >= 1 and D >= 1, not {mu.dtype} {list(mu.shape)}"
        )
    logvar = mu.new_zeros(()) if logvar is None else require_tensor("logvar", logvar).to(mu)
    return _checks.components(mu, logvar, None, mu.dtype)[1].expand(mu.shape)


def _draw_components(log_weights: Tensor, n: int) -> Tensor:
    """n indices, int64 [n], each k with probability w_k / sum w; log_weights [K].

    By the inverse of the distribution function, in float64: torch.multinomial takes 2^24 weights and no more.
    """
    device = log_weights.device
    if device.type == "mps":
        log_weights = log_weights.cpu()  # where there is float64
    log_weights = log_weights.double()
    cumulative = torch.exp(log_weights - log_weights.max()).cumsum(0)
    total = cumulative[-1]
    if is_readable(total) and not 0 < float(total) < math.inf:
        raise ValueError("the mixture's log weights must hold no NaN, and one at least above -inf, to draw from it")
    u = total * torch.rand(n, dtype=torch.float64, device=log_weights.device)
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # a product may be rounded up to the total
    # right: the first k with u < cumulative_k, which is never one of weight 0
    return torch.searchsorted(cumulative, u, right=True).to(device)
