"""Priors that are mixtures of diagonal Gaussians: what they share, and the one whose components are parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvae import _checks
from fastvae import functional as F
from fastvae.contracts import is_readable, require_shape, require_tensor
from fastvae.distributions import MixtureOfDiagNormals
from fastvae.distributions.draws import draw_components
from fastvae.em import MixtureFit, fit_mixture
from fastvae.grouped import grouped_mixture_log_prob
from fastvae.marginals import mixture_marginal_log_prob
from fastvae.priors.base import Density, Prior
from fastvae.priors.weights import log_weights_within, weight_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class Mixture(Prior):
    """A prior that is a mixture of K diagonal Gaussians.  A subclass defines `components`; the rest follows.

    A subclass in which a few components, or the weights alone, cost less than all components also defines
    `component_parameters` and `component_log_weights`, which `sample` is made of.

    A mixture can be conditional, p(z | y) for labels y, in two ways; it then sets `conditional = True`.  Where
    `component_labels` gives each component a label, p(z | y) is the mixture of the components with the label y, whose
    weights are normalised among themselves; without y, all components count.  Where log_weights is [L, K], every label
    has its own weights of the same components, and y must be given.

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
        [K, 1].  log_weights is [L, K] where each label has its own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define components()")

    def step_components(self, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The components for one step of training, where a subclass may save work; near as in :meth:`density`."""
        return self.components()

    def component_log_weights(self) -> Tensor:
        """log w, [K], or [L, K]."""
        return self.components()[2]

    def component_labels(self) -> Tensor | None:
        """The label of each component, int64 [K] with every one of 0 ... L - 1, or None."""
        return None

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of these components alone; index int64 [n]."""
        mu, logvar, _ = self.components()
        return mu[index], logvar.expand(mu.shape)[index]

    def log_prob(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(z), or log p(z | y), differentiable in z and in the prior's parameters.

        Args:
            z: [..., B, D]; without y, [..., D].
            y: int64 [B], the label of each row, for a conditional mixture.

        Returns:
            [..., B], or [...], nats.
        """
        return self._density_of(self.components(), y)(z)

    def density(self, index: Tensor | None = None, near: Tensor | None = None, y: Tensor | None = None) -> Density:
        return self._density_of(self.step_components(near), y)

    def _density_of(self, components: tuple[Tensor, Tensor, Tensor], y: Tensor | None) -> Density:
        mu, logvar, log_weights = components
        if y is None:
            self._require_one_mixture(log_weights)
            return lambda z: F.mixture_log_prob(z, mu, logvar, log_weights, **self.backend_options)
        self._require_labels(y, log_weights)
        groups = self.component_labels()
        if groups is None or log_weights.ndim == 2:
            return lambda z: F.mixture_log_prob(
                z, mu, logvar, log_weights, labels=_of_rows(y, z), **self.backend_options
            )
        within = log_weights_within(groups, log_weights)
        # In a compiled function, labels that no component has are then not refused: their density is zero.
        G = int(groups.max()) + 1 if is_readable(groups) else len(groups)
        impl, dense = self.backend_options["impl"], self.backend_options["dense_backward"]
        return lambda z: grouped_mixture_log_prob(
            z, mu, logvar, groups, within, num_groups=G, labels=_of_rows(y, z), dense_backward=dense, impl=impl
        )

    def _require_one_mixture(self, log_weights: Tensor) -> None:
        if log_weights.ndim == 2:
            raise ValueError(
                f"the weights of this {type(self).__name__} depend on y: give y, int64 labels below {len(log_weights)}"
            )

    def _require_labels(self, y: Tensor, log_weights: Tensor) -> None:
        self._check_given(y)
        if require_tensor("y", y).dtype != torch.int64 or y.ndim > 1:
            raise ValueError(f"y must be int64 [B], the labels, not {y.dtype} {list(y.shape)}")
        if y.device.type == "cpu" and is_readable(y) and y.numel():
            labels, count = self.component_labels(), len(log_weights)
            if labels is not None and log_weights.ndim == 1:
                low, high = (int(value) for value in labels.aminmax())
                if low < 0 or high >= count:
                    raise ValueError(
                        f"component_labels() must be numbered 0 ... L - 1, each of one component at least; those of "
                        f"this {type(self).__name__} span {low} ... {high} with {count} components"
                    )
                count = high + 1
            low, high = (int(value) for value in y.aminmax())
            if low < 0 or high >= count:
                raise ValueError(f"y must be in 0 ... {count - 1}, the labels there are; it spans {low} ... {high}")

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        mu, logvar, log_weights = self.components()
        self._require_one_mixture(log_weights)
        return mixture_marginal_log_prob(z, mu, logvar, log_weights, **self.backend_options)

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.conditional or y is not None:
            return super().kl(mu, logvar, num_samples, index=index, y=y)
        return F.mixture_kl(mu, logvar, *self.step_components(mu), num_samples, **self.backend_options)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None) -> Tensor:
        """n independent draws, [n, D]: a component by its weight, then that component alone, whatever K is.

        With y, int64 [n], draw m is of p(z | y[m]).
        """
        log_weights = self.component_log_weights()
        if y is None:
            self._require_one_mixture(log_weights)
            index = draw_components(log_weights, n)
        else:
            self._require_labels(y, log_weights)
            index = self._draw_given(require_shape("y", y, (n,)), log_weights)
        z, _ = F.gaussian_rsample(*self.component_parameters(index), impl=self.backend_options["impl"])
        return z

    def _draw_given(self, y: Tensor, log_weights: Tensor) -> Tensor:
        """A component for each label of y [n], int64 [n]."""
        index = torch.empty_like(y)
        for label in y.unique().tolist():
            if log_weights.ndim == 2:
                of_label = log_weights[label]
            else:
                of_label = log_weights.masked_fill(self.component_labels() != label, -math.inf)
            rows = y == label
            index[rows] = draw_components(of_label, int(rows.count_nonzero()))
        return index

    def distribution(self) -> MixtureOfDiagNormals:
        """p(z) as a `torch.distributions.Distribution`, of the components as they are now.

        Its gradients reach the prior's parameters.  It holds the components of one call of `components()`: a step of
        training takes a new one.
        """
        mu, logvar, log_weights = self.components()
        self._require_one_mixture(log_weights)
        return MixtureOfDiagNormals(mu, torch.exp(0.5 * logvar), log_weights, **self.backend_options)

    @torch.no_grad()
    def snapshot(self) -> Prior:
        mu, logvar, log_weights = self.components()
        frozen = MixturePrior(mu, logvar, **self.backend_options)
        frozen.logits = nn.Parameter(log_weights.clone())
        frozen.labels, frozen.conditional = self.component_labels(), self.conditional
        return frozen.requires_grad_(False)


class MixturePrior(Mixture):
    """A mixture of K diagonal Gaussians whose means, variances and weights are parameters.

    Args:
        mu: [K, D], the means to start from.
        logvar: broadcastable to [K, D], the log variances to start from; None means 0.  One dimension is [D], for all
            components alike, also where K = D; one log variance for each component is [K, 1].
        learn_weights: make the weights parameters too.
        probs: [K], the weights to start from; what they sum to does not matter.  None means equal weights.  A weight
            of 0 stays 0: it is kept as a logit of -inf, whose gradient is 0.  [L, K] are weights for each label, which
            makes the prior conditional: p(z | y) has the weights of y.
        labels: int64 [K], the label of each component, which makes the prior conditional: p(z | y) is the mixture of
            the components with the label y.
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.
    """

    logits: Tensor
    labels: Tensor | None

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        learn_weights: bool = True,
        probs: Tensor | None = None,
        labels: Tensor | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(**backend)
        logvar = expanded_logvar(mu, logvar)
        self.mu = nn.Parameter(mu.detach().clone())
        self.logvar = nn.Parameter(logvar.detach().clone())
        self.logits = weight_logits(mu, probs, learn_weights)
        if labels is not None and self.logits.ndim == 2:
            raise ValueError("labels and probs [L, K] are two ways to make the prior conditional; give one of them")
        self.register_buffer("labels", checked_labels(labels, self.logits))
        self.conditional = labels is not None or self.logits.ndim == 2

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, torch.log_softmax(self.logits, -1)

    def component_labels(self) -> Tensor | None:
        return self.labels

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
            TypeError, ValueError: as :func:`fastvae.fit_mixture`, or the prior is conditional; it stays as it was.
        """
        if self.conditional:
            raise ValueError("a conditional MixturePrior cannot be fitted: EM knows no labels of the rows")
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


def checked_labels(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """A copy of the labels [K] of the components whose logits are [K], or [L, K]; errors for what are none."""
    if labels is None:
        return None
    K = logits.shape[-1]
    if require_tensor("labels", labels).dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, not {labels.dtype}")
    if labels.shape != (K,):
        raise ValueError(f"labels must be [{K}], a label for each component, not {list(labels.shape)}")
    low, high = (int(value) for value in labels.aminmax())
    there = labels if logits.ndim == 2 else labels[logits > -math.inf]
    if low < 0 or high >= K or not bool(there.bincount(minlength=high + 1).all()):
        raise ValueError(
            f"labels must be numbered 0 ... L - 1, each of one component at least whose weight is not 0; they span "
            f"{low} ... {high}, and {len(there.unique())} of them have such components"
        )
    return labels.detach().clone()


def _of_rows(y: Tensor, z: Tensor) -> Tensor:
    """y [B] for each row of z [..., B, D]."""
    if z.shape[-2:-1] != y.shape:
        raise ValueError(f"y must be [B] to match z [..., B, D] {list(z.shape)}, not {list(y.shape)}")
    return y.expand(z.shape[:-1])


def expanded_logvar(mu: Tensor, logvar: Tensor | None, rows: str = "K") -> Tensor:
    """logvar, 0 for None, as [K, D] like mu; errors for either.  rows: how many components there are, K or N."""
    if require_tensor("mu", mu).ndim != 2 or 0 in mu.shape or not mu.is_floating_point():
        raise ValueError(
            f"mu must be floating [{rows}, D] with {rows} >= 1 and D >= 1, not {mu.dtype} {list(mu.shape)}"
        )
    logvar = mu.new_zeros(()) if logvar is None else require_tensor("logvar", logvar).to(mu)
    return _checks.components(mu, logvar, None, mu.dtype)[1].expand(mu.shape)
