"""The operators that sample and return log q - log p: in one launch each way where the problem is small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import small
from .launch import on_device_of


@on_device_of(1)
def mixture_kl(
    from_parts: Callable[..., tuple[Tensor, ...]],
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    with_score: bool,
) -> tuple[Tensor, ...]:
    """from_parts: does the same by an operator for each part, for a problem that is empty or not small."""
    (M, D), N = mu.shape, num_samples * len(mu)
    prior = prior_mu, prior_logvar, log_weights, exclude
    if not N or not small.is_small(N, len(prior_mu), D):
        return from_parts(mu, logvar, seed, num_samples, *prior, with_score)
    z, kl, log_prob = mu.new_empty(num_samples, M, D), mu.new_empty(num_samples, M), mu.new_empty(N)
    score = mu.new_empty(N, D) if with_score else None
    sampled = small.Sampled(mu, logvar, seed, kl)
    small.forward(z.flatten(0, 1), *prior, log_prob=log_prob, score=score, sampled=sampled)
    return z, kl, log_prob, mu.new_empty(0) if score is None else score


@on_device_of(2)
def mixture_kl_backward(
    from_parts: Callable[..., tuple[Tensor, ...]],
    grad_z: Tensor | None,
    grad_kl: Tensor,
    logvar: Tensor,
    seed: Tensor,
    path_derivative: bool,
    z: Tensor,
    log_prob: Tensor,
    score: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    dense: bool,
    need_q: bool,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
) -> tuple[Tensor, ...]:
    """from_parts: as above, and for a problem whose forward was not asked for the score."""
    N, K, D = log_prob.numel(), *prior_mu.shape
    prior, need = (prior_mu, prior_logvar, log_weights, exclude), (need_mu, need_logvar, need_log_weights)
    if not N or not small.is_small(N, K, D) or (need_q and not score.numel()):
        return from_parts(
            grad_z, grad_kl, logvar, seed, path_derivative, z, log_prob, score, *prior, dense, need_q, *need
        )
    dmu, dlogvar = (torch.empty_like(logvar) if need_q else logvar.new_empty(0) for _ in range(2))
    posterior = small.PosteriorGradients(grad_z, score, logvar, seed, dmu, dlogvar) if need_q else None
    prior_gradients = small.backward(
        grad_kl, log_prob, z.flatten(0, 1), *prior, *need,
        of_kl=True, posterior=posterior, path_derivative=path_derivative,
    )  # fmt: skip
    return dmu, dlogvar, *prior_gradients
