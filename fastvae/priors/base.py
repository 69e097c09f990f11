"""What every prior p(z) has, and the standard normal one.

A prior has `log_prob(z) -> [...]`, `sample(n) -> [n, D]` and `kl(mu, logvar, num_samples) -> (z, kl)`.  One's own prior
is a subclass of :class:`Prior`, or of :class:`fastvae.Mixture`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.backends import BackendOptions, choice
from fastvae.contracts import evaluate

if TYPE_CHECKING:
    from typing_extensions import Unpack

Density = Callable[[Tensor], Tensor]


class Prior(nn.Module):
    """p(z), as a VAE asks for it.  A subclass defines `log_prob` and `sample`; the rest follows.

    A subclass may also define `kl` where there is a closed form (and set `has_closed_form_kl`), `density` where one
    step of training can share work between evaluations or leave points out, `marginal_log_prob` for
    :meth:`fastvae.AggregatedPosterior.dimension_wise_kl`, and `snapshot` where `log_prob` is costly to prepare.

    A conditional prior p(z | y) sets `conditional = True` and takes y in `log_prob(z, y)` and `sample(n, y)`.

    Args:
        impl, precision, dense_backward: as of :func:`fastvae.mixture_log_prob`, for all that the prior computes with
            fastvae's operations.  None leaves the choice to :func:`fastvae.use_backend`, and without it to the device.

    Attributes:
        backend_options: these three, to hand on as `**self.backend_options`.
        has_closed_form_kl: whether `kl` returns KL(q || p) itself, and not an estimate by the samples.
        conditional: whether the prior is p(z | y).  A VAE hands its y [B, ...] to such priors alone.

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
    conditional: bool = False
    backend_options = choice.NO_OPTIONS  # of a subclass that calls nn.Module.__init__ alone

    def __init__(self, **backend: Unpack[BackendOptions]) -> None:
        super().__init__()
        self.backend_options = choice.checked(type(self).__name__, backend)

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

    def density(self, index: Tensor | None = None, near: Tensor | None = None, y: Tensor | None = None) -> Density:
        """A function z -> log p(z) for one step of training.

        What all its evaluations share is computed once, when the function is made.

        Args:
            index: int64 [B], which of the training points the rows of a batch are, for a prior that is made of them
                (see :class:`fastvae.ExemplarPrior`); others have no use for it.
            near: [B, D], points close to the z that will be evaluated, such as the posteriors' means; a prior may use
                them to choose which components to encode.
            y: [B, ...], for a conditional prior: what each row of a batch is given.  Others refuse it.

        Returns:
            A function: z [..., B, D] -> [..., B], nats, differentiable in z and in the prior's parameters.
        """
        self._check_given(y)
        return self.log_prob if y is None else partial(self.log_prob, y=y)  # type: ignore[call-arg]  # which a conditional one takes

    def _check_given(self, y: Tensor | None) -> None:
        if y is not None and not self.conditional:
            raise ValueError(f"this {type(self).__name__} is not conditional, and takes no y")

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p(z_d) of each dimension by itself: [..., D] -> [..., D], nats."""
        raise NotImplementedError(f"{type(self).__name__} does not know the densities of single dimensions")

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples of q = N(mu, exp(logvar)) and KL(q || p).

        Args:
            mu, logvar: [..., D].
            num_samples: S samples a row, or None for one without a dimension for it.
            index, y: as in :meth:`density`.

        Returns:
            (z, kl): z [S, ..., D] or [..., D]; kl [S, ...] or [...], nats: in closed form where there is one (then
            the same for every sample), else log q(z | x) - log p(z) of each sample.
        """
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples, impl=self.backend_options["impl"])
        given = {} if y is None else {"y": y}  # a prior of one's own need not take it
        return z, log_q - evaluate(f"the density of {type(self).__name__}", self.density(index, mu, **given), z)

    def snapshot(self) -> Prior:
        """A copy of this prior that is cheap to evaluate many times; it has no gradients."""
        return self


class StandardNormalPrior(Prior):
    """p(z) = N(0, I).

    Args:
        latent_dim: D.
        backend: impl, precision, dense_backward, see :class:`Prior`.
    """

    has_closed_form_kl = True
    origin: Tensor

    def __init__(self, latent_dim: int, **backend: Unpack[BackendOptions]) -> None:
        super().__init__(**backend)
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
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_given(y)
        self._check_dimensions("mu", mu)
        impl = self.backend_options["impl"]
        z, log_q = F.gaussian_rsample(mu, logvar, num_samples, impl=impl)
        return z, F.gaussian_kl(mu, logvar, impl=impl).expand(log_q.shape)

    def _check_dimensions(self, name: str, tensor: Tensor) -> None:
        D = len(self.origin)
        if tensor.ndim == 0 or tensor.shape[-1] != D:
            raise ValueError(
                f"{name} must be [..., {D}] for StandardNormalPrior({D}), not {list(tensor.shape)}: "
                "the prior's latent_dim must be the encoder's D"
            )
