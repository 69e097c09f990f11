"""The KL term of the ELBO in three parts, over the posteriors of a whole data set: the objective of the beta-TCVAE.

With q(z) = sum_n w_n q(z | x_n), w_n = 1/N, over all N posteriors of a data set, and a prior p(z) = prod_d p(z_d):

    E_n KL(q(z|x_n) || p(z)) = E log q(z|x_n) / q(z)               index-code mutual information, at most log N
                             + E log q(z) / prod_d q(z_d)          total correlation
                             + E sum_d log q(z_d) / p(z_d)         dimension-wise KL

Each function here gives the terms of single draws z ~ q(z | x_n).  Their means over n and z are the expectations.

The gradient.  log q(z) depends on the encoder by z, and by the parameters of the N components.  For draws of all of
q(z) the second part of the gradient has mean zero, as every score has: E_q(z) [d log q(z)] = 0 at fixed z, and
E_q(z_d) [d log q(z_d)] = 0.  So the gradient by way of z alone is unbiased, with (mu, logvar) of the N posteriors as
constants, and it needs one pass over the components: the score comes with the density.  Constants that are remembered
from earlier steps give the terms, and the gradient, of the remembered q(z) at the present z.  What is biased, however
new the constants are: gradients by way of the batch's own components and no others, because a batch holds each point
together with its own component more often than with those of other points.

Source: Chen, Li, Grosse and Duvenaud, Isolating sources of disentanglement in VAEs (NeurIPS 2018), eq. 2.  Its
estimates of log q(z) and log q(z_d) know the posteriors of a minibatch alone, and are biased by nats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastvae import _checks
from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.contracts import require_shape
from fastvae.marginals import mixture_marginal_log_prob

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class KLDecomposition(NamedTuple):
    """The three parts of log q(z | x) - log p(z) of each draw, [...], nats; they add up to it.

    Attributes:
        mutual_information: log q(z | x_n) - log q(z).
        total_correlation: log q(z) - sum_d log q(z_d).
        dimension_wise_kl: sum_d log q(z_d) - log p(z); the sum of KL(q(z_d) || p(z_d)) where p(z) = prod_d p(z_d).
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise_kl: Tensor


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    **backend: Unpack[BackendOptions],
) -> Tensor:
    """log q(z) - sum_d log q(z_d) of each point, with q(z) a mixture of N diagonal Gaussians, in memory O(points + N).

    The mean over draws z ~ q(z) is the total correlation KL(q(z) || prod_d q(z_d)), which the beta-TCVAE penalises.
    Differentiable once in z, mu, logvar and log_weights.  A penalty in training needs the gradient in z alone, with
    mu and logvar detached: what comes by way of these has mean zero.

    Args:
        z: [..., D], the points: draws of q(z | x_n) for n uniform over the data set, as in shuffled batches.
        mu, logvar: [N, D] and broadcastable to it, the posteriors of all N data points.
        log_weights: [N], which must sum to one; None means 1 / N each.
        exclude: int64 [...], for each point the index of its own posterior, which is left out of q(z), or -1 for none.
            The weights that are left are normalised.  With its own posterior each point is close to a component, so
            that the mean exceeds the total correlation of the population behind a small data set; without it the mean
            is below.
        backend: impl, precision, dense_backward, as of :func:`fastvae.mixture_log_prob`.

    Returns:
        [...], nats; float64 if any argument is, else float32.  A single point's may be negative, the mean over q(z) is
        not.  NaN where `exclude` leaves components of weight zero alone.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastvae.mixture_log_prob`; `exclude` with N = 1.

    Equals::

        mixture_log_prob(z, mu, logvar, log_weights) - mixture_marginal_log_prob(z, mu, logvar, log_weights).sum(-1)

    Source: Chen, Li, Grosse and Duvenaud, Isolating sources of disentanglement in VAEs (NeurIPS 2018), eq. 2.
    """
    joint, marginals = _log_densities(z, mu, logvar, log_weights, exclude, backend)
    return joint - marginals


def decompose_kl(
    z: Tensor,
    log_q: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    log_prior: Tensor | None = None,
    exclude: Tensor | None = None,
    **backend: Unpack[BackendOptions],
) -> KLDecomposition:
    """log q(z | x) - log p(z) of each draw in three parts: mutual information, total correlation, dimension-wise KL.

    Args:
        z: [..., D], draws of q(z | x_n), n uniform over the data set.
        log_q: [...], log q(z | x_n) of each, as :func:`fastvae.gaussian_rsample` returns it.
        mu, logvar, log_weights, exclude, backend: the N posteriors, as of :func:`total_correlation`.
        log_prior: [...], log p(z) of the draws; None means that of N(0, I).

    Returns:
        A :class:`KLDecomposition` of three tensors [...], nats, differentiable in all arguments.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`total_correlation`; log_q or log_prior is not [...].

    Source: Chen, Li, Grosse and Duvenaud, Isolating sources of disentanglement in VAEs (NeurIPS 2018), eq. 2.
    """
    joint, marginals = _log_densities(z, mu, logvar, log_weights, exclude, backend)
    if log_prior is None:
        log_prior = -0.5 * (z.to(joint.dtype).square() + LOG_2PI).sum(-1)
    for name, value in (("log_q", log_q), ("log_prior", log_prior)):
        _checks.result_dtype(z=z, **{name: value})
        require_shape(f"{name} for z {list(z.shape)}", value, z.shape[:-1])
    return KLDecomposition(log_q - joint, joint - marginals, marginals - log_prior)


def _log_densities(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    backend: BackendOptions,
) -> tuple[Tensor, Tensor]:
    """(log q(z), sum_d log q(z_d)), [...] each; where a component is left out, of what is left, normalised."""
    mixture = mu, logvar, log_weights
    joint = F.mixture_log_prob(z, *mixture, exclude=exclude, **backend)
    marginals = mixture_marginal_log_prob(z, *mixture, exclude=exclude, **backend).sum(-1)
    if exclude is None:
        return joint, marginals
    N, D = mu.shape
    if N == 1:
        raise ValueError("exclude leaves nothing of a mixture of one component: mu must be [N, D] with N >= 2")
    log_w = mu.new_full((N,), -math.log(N), dtype=joint.dtype) if log_weights is None else log_weights.to(joint.dtype)
    # the index of a row that leaves nothing out is -1, whose weight must not be looked up
    left_out = torch.where(exclude >= 0, log_w[exclude.clamp(min=0)], -math.inf)
    left = torch.log(-torch.expm1(left_out))  # [...], log of the weight that is left, also of one close to 1
    return joint - left, marginals - D * left
