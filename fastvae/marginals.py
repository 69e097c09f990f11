"""The marginal densities of a mixture: one-dimensional mixtures, one for each dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import _checks, reference
from fastvae.autograd import MarginalMixtureLogProb
from fastvae.backends.choice import choose, dense
from fastvae.backends.registry import PRECISIONS, check_name
from fastvae.dispatch import call


def mixture_marginal_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Log density of each dimension of a mixture by itself, log p(z_d) = logsumexp_k [log w_k + log N(z_d; k)].

    Differentiable once in z, mu, logvar and log_weights.  Memory is O((M + K) D) for M rows, forward and backward.
    The time is that of D mixtures of one dimension: M K D exponentials, where the joint density takes M K, and so a
    few times that of :func:`fastvae.mixture_log_prob`.

    Args:
        z: [..., D], the points.
        mu, logvar, log_weights, exclude, dense_backward, precision, impl: as of :func:`fastvae.mixture_log_prob`.

    Returns:
        [..., D], nats; float64 if any argument is, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastvae.mixture_log_prob`.

    Equals::

        torch.stack([mixture_log_prob(*one) for one in zip(*(v.split(1, -1) for v in (z, mu, logvar)))], -1)
    """
    check_name("precision", precision, PRECISIONS)
    z, mu, logvar, log_weights, exclude = _checks.mixture(z, mu, logvar, log_weights, exclude)
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        each = [
            reference.mixture_log_prob(
                z[..., d, None], mu[:, d, None], logvar[:, d, None], log_weights, exclude=exclude
            )
            for d in range(mu.shape[1])
        ]
        return torch.stack(each, -1)
    rows, mu, logvar, log_weights, exclude = _checks.flat(z, mu, logvar, log_weights, exclude)
    by_dimension = (v.T.contiguous()[..., None] for v in (rows, mu, logvar))
    log_prob = call(MarginalMixtureLogProb, *by_dimension, log_weights, exclude, dense(dense_backward), backend)
    return log_prob.T.reshape(z.shape)
