"""Priors that are mixtures of diagonal Gaussians: what they share, and the one whose components are parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvae import _checks
from fastvae import functional as F
from fastvae.contracts import require_tensor
from fastvae.distributions import MixtureOfDiagNormals
from fastvae.distributions.draws import draw_components
from fastvae.em import MixtureFit, fit_mixture
from fastvae.marginals import mixture_marginal_log_prob
from fastvae.priors.base import Density, Prior
from fastvae.priors.weights import weight_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


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
        return F.mixture_log_prob(z, *self.components(), **self.backend_options)

    def density(self, index: Tensor | None = None, near: Tensor | None = None) -> Density:
        mu, logvar, log_weights = self.step_components(near)
        return lambda z: F.mixture_log_prob(z, mu, logvar, log_weights, **self.backend_options)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        return mixture_marginal_log_prob(z, *self.components(), **self.backend_options)

    def kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return F.mixture_kl(mu, logvar, *self.step_components(mu), num_samples, **self.backend_options)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D]: a component by its weight, then that component alone, whatever K is."""
        index = draw_components(self.component_log_weights(), n)
        z, _ = F.gaussian_rsample(*self.component_parameters(index), impl=self.backend_options["impl"])
        return z

    def distribution(self) -> MixtureOfDiagNormals:
        """p(z) as a :class:`torch.distributions.Distribution`, of the components as they are now.

        Its gradients reach the prior's parameters.  It holds the components of one call of `components()`: a step of
        training takes a new one.
        """
        mu, logvar, log_weights = self.components()
        return MixtureOfDiagNormals(mu, torch.exp(0.5 * logvar), log_weights, **self.backend_options)

    @torch.no_grad()
    def snapshot(self) -> Prior:
        mu, logvar, log_weights = self.components()
        frozen = MixturePrior(mu, logvar, **self.backend_options)
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
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.
    """

    logits: Tensor

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        learn_weights: bool = True,
        probs: Tensor | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(**backend)
        logvar = expanded_logvar(mu, logvar)
        self.mu = nn.Parameter(mu.detach().clone())
        self.logvar = nn.Parameter(logvar.detach().clone())
        self.logits = weight_logits(mu, probs, learn_weights)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, torch.log_softmax(self.logits, 0)

    def fit(self, z: Any, **options: Any) -> MixtureFit:
        """Fit the parameters to rows z by EM, starting from what they are.

        They are changed in place, so that an optimiser keeps its hold of them.
        Weights that are fixed stay.  For a new prior from data alone, `fit = fastvae.fit_mixture(z, K)` and then
        `MixturePrior(fit.mu, fit.logvar, probs=fit.weights)`.

        Args:
            z: the rows: a tensor or array [N, D], or batches, see :func:`fastvae.fit_mixture`.
            options: sample_weight, batch_size, max_iter, tol, reg_covar, generator, callback, as of
                :func:`fastvae.fit_mixture`.

        Returns:
            What was found; the prior has it.

        Raises:
            TypeError, ValueError: as :func:`fastvae.fit_mixture`; the prior stays as it was.
        """
        mu, logvar, log_weights = self.components()
        fixed: dict[str, Any] = {
            "learn_weights": isinstance(self.logits, nn.Parameter),
            "device": mu.device,
            **self.backend_options,
        }
        found = fit_mixture(z, len(mu), mu=mu, logvar=logvar, log_weights=log_weights, **fixed, **options)
        with torch.no_grad():
            self.mu.copy_(found.mu)
            self.logvar.copy_(found.logvar)
            self.logits.copy_(found.log_weights)
        return found


def expanded_logvar(mu: Tensor, logvar: Tensor | None, rows: str = "K") -> Tensor:
    """logvar, 0 for None, as [K, D] like mu; errors for either.  rows: how many components there are, K or N."""
    if require_tensor("mu", mu).ndim != 2 or 0 in mu.shape or not mu.is_floating_point():
        raise ValueError(
            f"mu must be floating [{rows}, D] with {rows} >= 1 and D >= 1, not {mu.dtype} {list(mu.shape)}"
        )
    logvar = mu.new_zeros(()) if logvar is None else require_tensor("logvar", logvar).to(mu)
    return _checks.components(mu, logvar, None, mu.dtype)[1].expand(mu.shape)
