"""Densities, distribution functions and moments of a batch of mixtures; the shapes are those of `batches.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.backends import BackendOptions
from fastvae.backends.choice import choose
from fastvae.distributions.batches import Mixtures, by_blocks, without_absent

# A mixture by itself is a call of the operation, some 100 us forward and backward.  PyTorch takes that long for so many
# numbers of [points, K, D], so that smaller mixtures are evaluated together.
NUMBERS_FOR_A_CALL = 2**13


def log_prob(value: Tensor, of: Mixtures, options: BackendOptions) -> Tensor:
    """log p(value), [B, R]: by the kernels, one mixture after the other, or together where the mixtures are small."""
    B, R, D = value.shape
    K = of.locs.shape[1]
    if B == 0 or (B > 1 and R * K * D < NUMBERS_FOR_A_CALL):
        choose(
            options["impl"], value.device, value.dtype, options["precision"]
        )  # a backend that cannot run is an error
        return by_blocks(_log_prob, value, *without_absent(*of.parameters))
    # unbind, and not a slice for each mixture, whose gradients would each be as large as the whole
    points = value.unbind()
    parameters = [p.unbind() for p in (of.locs, 2 * of.scale.log(), of.log_weights)]

    def one(b: int) -> Tensor:
        mu, logvar, log_weights = (own[b if len(own) == B else 0] for own in parameters)
        return F.mixture_log_prob(points[b], mu, logvar, log_weights, **options)

    return torch.stack([one(b) for b in range(B)])


def _log_prob(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    """By plain PyTorch, with all [B, R, K, D] numbers."""
    t = (value[:, :, None] - locs[:, None]) / scale[:, None]  # [B, R, K, D]
    constant = log_weights - scale.log().sum(-1) - 0.5 * LOG_2PI * value.shape[-1]  # [B, K]
    a = constant[:, None] - 0.5 * t.square().sum(-1)  # [B, R, K]
    # torch.logsumexp of nothing but -inf has NaN gradients; a point of density zero has none.
    zero = (a == -math.inf).all(-1)
    return torch.logsumexp(a.masked_fill(zero[..., None], 0.0), -1).masked_fill(zero, -math.inf)


def cdf(value: Tensor, of: Mixtures) -> Tensor:
    """P(Z_1 <= value_1, ..., Z_D <= value_D), [B, R]."""
    return by_blocks(_cdf, value, *without_absent(*of.parameters))


def _cdf(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    infinite = value.isinf()  # a dimension that is not asked for; its t would make NaN gradients, infinity times 0
    t = (value.masked_fill(infinite, 0.0)[:, :, None] - locs[:, None]) / scale[:, None]  # [B, R, K, D]
    of_dimensions = torch.where(
        infinite[:, :, None], (value > 0)[:, :, None].to(t), 0.5 * torch.erfc(t * -math.sqrt(0.5))
    )
    return (log_weights.exp()[:, None] * of_dimensions.prod(-1)).sum(-1)


def mean(of: Mixtures) -> Tensor:
    """The means of the mixtures, [B, 1, D]."""
    zero = of.locs.new_zeros(of.number, 1, of.locs.shape[2])
    return by_blocks(_mean_beyond, zero, *without_absent(*of.parameters))


def _mean_beyond(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    """E[z - value], [B, R, D]; not by a matrix product, which autocast and TF32 would round."""
    return (log_weights.exp()[:, None, :, None] * (locs[:, None] - value[:, :, None])).sum(2)


def variance(of: Mixtures) -> Tensor:
    """The variances of the dimensions, [B, 1, D]: no squares are subtracted, which would cancel."""
    return by_blocks(_square_beyond, mean(of), *without_absent(*of.parameters))


def _square_beyond(value: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    """E[(z - value)^2], [B, R, D]."""
    squares = (locs[:, None] - value[:, :, None]).square() + scale[:, None].square()  # [B, R, K, D]
    return (log_weights.exp()[:, None, :, None] * squares).sum(2)
