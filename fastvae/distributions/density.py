"""Densities, distribution functions and variances of a batch of mixtures; the shapes are those of `batches.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.backends import BackendOptions
from fastvae.distributions.batches import Mixtures, by_blocks, of_mixture, without_absent

# A mixture by itself is a call of the operation, some 100 us forward and backward.  PyTorch takes that long for so many
# numbers of [points, K, D], so that smaller mixtures are evaluated together.
NUMBERS_FOR_A_CALL = 2**13


def log_prob(value: Tensor, of: Mixtures, options: BackendOptions) -> Tensor:
    """log p(value), [B, R]: by the kernels, one mixture after the other, or together where the mixtures are small."""
    B, R, D = value.shape
    K = of.locs.shape[1]
    if B != 1 and R * K * D < NUMBERS_FOR_A_CALL:
        return by_blocks(_log_prob, value, *without_absent(*of.parameters))
    logvar = 2 * of.scale.log()

    def one(b: int) -> Tensor:
        locs, own_logvar, log_weights = (of_mixture(p, slice(b, b + 1))[0] for p in (of.locs, logvar, of.log_weights))
        return F.mixture_log_prob(value[b], locs, own_logvar, log_weights, **options)

    return torch.stack([one(b) for b in range(B)])


def _log_prob(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    """By plain PyTorch, with all [B, R, K, D] numbers."""
    t = (value[:, :, None] - locs[:, None]) / scale[:, None]  # [B, R, K, D]
    constant = log_weights - scale.log().sum(-1) - 0.5 * LOG_2PI * value.shape[-1]  # [B, K]
    return torch.logsumexp(constant[:, None] - 0.5 * t.square().sum(-1), -1)


def cdf(value: Tensor, of: Mixtures) -> Tensor:
    """P(Z_1 <= value_1, ..., Z_D <= value_D), [B, R]."""
    return by_blocks(_cdf, value, *without_absent(*of.parameters))


def _cdf(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    t = (value[:, :, None] - locs[:, None]) / scale[:, None]  # [B, R, K, D]
    of_components = (0.5 * torch.erfc(t * -math.sqrt(0.5))).prod(-1)  # [B, R, K]
    return (log_weights.exp()[:, None] * of_components).sum(-1)


def variance(mean: Tensor, of: Mixtures) -> Tensor:
    """The variances of mixtures with these means, [B, R, D]: no squares are subtracted, which would cancel."""
    return by_blocks(_variance, mean, *without_absent(*of.parameters))


def _variance(mean: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    squares = (locs[:, None] - mean[:, :, None]).square() + scale[:, None].square()  # [B, R, K, D]
    return (log_weights.exp()[:, None, :, None] * squares).sum(2)
