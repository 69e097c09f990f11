"""mixture_kl and its gradients by a backend's other operators, for a backend that has no kernel of its own for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastvae.operators import Operators


def register(library: torch.library.Library, prefix: str, parts: Operators) -> None:
    """Implement the two operators under a prefix by the others, wherever no kernel stands."""
    for name, implementation in implementations(parts).items():
        library.impl(prefix + name, implementation, "CompositeExplicitAutograd")


def implementations(parts: Operators) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The two operators by name, each as a function of its own arguments."""
    return {
        "mixture_kl": partial(mixture_kl, parts),
        "mixture_kl_backward": partial(mixture_kl_backward, parts),
    }


def mixture_kl(
    parts: Operators, mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, with_score: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, log_q = parts.gaussian_rsample(mu, logvar, seed, num_samples)
    mixture = z.flatten(0, 1), prior_mu, prior_logvar, log_weights, exclude
    if with_score:
        log_prob, score = parts.mixture_log_prob_and_score(*mixture)
    else:
        log_prob, score = parts.mixture_log_prob(*mixture), z.new_empty(0)
    return z, log_q - log_prob.view_as(log_q), log_prob, score


def mixture_kl_backward(
    parts: Operators, grad_z, grad_kl, logvar, seed, path_derivative: bool, z, log_prob, score, prior_mu, prior_logvar,
    log_weights, exclude, dense: bool, need_q: bool, need_mu: bool, need_logvar: bool, need_log_weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kl = log q(z) - log p(z): what arrives at log p is -grad_kl; its gradient in z is added to grad_z."""
    grad = -grad_kl.flatten()
    from_score = need_q and score.numel() > 0
    need = need_q and not from_score, need_mu, need_logvar, need_log_weights
    mixture = z.flatten(0, 1), prior_mu, prior_logvar, log_weights, exclude
    if any(need):
        dz, *dprior = parts.mixture_log_prob_backward(grad, log_prob, *mixture, dense, *need)
    else:
        dz, *dprior = (z.new_empty(0) for _ in range(4))
    if not need_q:
        return z.new_empty(0), z.new_empty(0), *dprior
    if from_score:
        dz = grad[:, None] * score
    dz = dz.view_as(z) if grad_z is None else dz.view_as(z) + grad_z
    return *parts.gaussian_rsample_backward(dz, grad_kl, logvar, seed, path_derivative), *dprior
