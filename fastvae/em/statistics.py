"""The two steps of EM: the sufficient statistics of some rows, and the mixture that these make most likely.

With the symbols of `reference.py` and g_m the weight of row m, the E step leaves for each component

    N_k = sum_m g_m r_mk        S1_kd = sum_m g_m r_mk t_mkd        S2_kd = sum_m g_m r_mk t_mkd^2

about the mean and in units of the standard deviation that the component has, so that little cancels when the M step
subtracts a squared mean.  They are what the backward operator gives for an upstream gradient g:

    N_k = dL/dlog w_k        S1_kd = sigma_kd dL/dmu_kd        S2_kd = 2 dL/dlogvar_kd + N_k
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import reference
from fastvae.backends import BACKENDS

# Rows in one call of the operators.  Their sums are in the dtype of the rows, the sums over calls in float64.
ROWS = 2**16


class Parameters(NamedTuple):
    """mu [K, D], logvar [K, D], log_weights [K]; -inf is the log weight of a component that is not there."""

    mu: Tensor
    logvar: Tensor
    log_weights: Tensor

    def to(self, dtype: torch.dtype) -> Parameters:
        return Parameters(*(t.to(dtype).contiguous() for t in self))


class Statistics(NamedTuple):
    """N [K], S1 [K, D] and S2 [K, D], see above."""

    N: Tensor
    S1: Tensor
    S2: Tensor

    def __add__(self, other: Statistics) -> Statistics:  # type: ignore[override]  # of two tuples it would be a longer one
        return Statistics(*(a + b for a, b in zip(self, other, strict=True)))


class Moments(NamedTuple):
    """The total weight [K] of each component's rows, their mean [K, D] and their variance [K, D]."""

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def towards(self, new: Moments, step: float) -> Moments:
        """Those of both sets of rows together, the old ones with weight 1 - step and the new ones with weight step."""
        old_weight, new_weight = (1 - step) * self.weight, step * new.weight
        weight = old_weight + new_weight
        share = torch.where(weight > 0, new_weight / weight, 0.0)[:, None]  # of the new rows
        apart = new.mean - self.mean
        within = torch.lerp(self.variance, new.variance, share)
        return Moments(weight, self.mean + share * apart, within + share * (1 - share) * apart.square())


def wide_dtype(device: torch.device) -> torch.dtype:
    """What statistics are summed in: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def e_step(
    z: Tensor, parameters: Parameters, row_weights: Tensor | None, backend: str, dense: bool
) -> tuple[Tensor, Statistics]:
    """(log p(z) [M] of contiguous rows z [M, D], their statistics in the wide dtype).

    Args:
        parameters: in the dtype of z.
        row_weights: g [M] in the dtype of z; None, 1 each.
        backend: a name in BACKENDS, or "reference".
        dense: whether every term is summed, as `dense_backward` of :func:`fastvae.mixture_log_prob`.
    """
    (K, D), wide = parameters.mu.shape, wide_dtype(z.device)
    log_prob = z.new_empty(len(z))
    total = Statistics(*(z.new_zeros(shape, dtype=wide) for shape in ((K,), (K, D), (K, D))))
    rows = max(1, 2**22 // (K * D)) if backend == "reference" else ROWS
    for m in (slice(start, start + rows) for start in range(0, len(z), rows)):
        g = z.new_ones(len(z[m])) if row_weights is None else row_weights[m]
        if backend == "reference":
            log_prob[m], part = _by_reference(z[m], parameters, g)
        else:
            log_prob[m], part = _by_operators(z[m], parameters, g, backend, dense)
        total += part
    return log_prob, total


def _by_operators(z: Tensor, parameters: Parameters, g: Tensor, backend: str, dense: bool) -> tuple[Tensor, Statistics]:
    operators, wide = BACKENDS[backend].operators, wide_dtype(z.device)
    log_prob = operators.mixture_log_prob(z, *parameters, None)
    _, dmu, dlogvar, N = operators.mixture_log_prob_backward(
        g, log_prob, z, *parameters, None, dense, False, True, True, True
    )
    sigma, N = torch.exp(0.5 * parameters.logvar.to(wide)), N.to(wide)
    return log_prob, Statistics(N, sigma * dmu.to(wide), 2 * dlogvar.to(wide) + N[:, None])


def _by_reference(z: Tensor, parameters: Parameters, g: Tensor) -> tuple[Tensor, Statistics]:
    a = reference.component_log_prob(z, *parameters)  # [M, K]
    log_prob = torch.logsumexp(a, 1)
    w = (g[:, None] * torch.exp(a - log_prob[:, None])).to(wide_dtype(z.device))
    t = ((z[:, None] - parameters.mu) * torch.exp(-0.5 * parameters.logvar)).to(w)  # [M, K, D]
    t = t.masked_fill((parameters.log_weights == -math.inf)[:, None], 0.0)
    return log_prob, Statistics(w.sum(0), torch.einsum("mk,mkd->kd", w, t), torch.einsum("mk,mkd->kd", w, t.square()))


def moments(statistics: Statistics, about: Parameters) -> Moments:
    """The moments of each component's rows; a component without rows keeps the mean and variance that it has.

    Args:
        about: the mixture that the statistics were computed with, as it was then rounded.
    """
    N, S1, S2 = statistics
    mu, variance = about.mu.to(N), torch.exp(about.logvar.to(N))
    has_rows = N[:, None] > 0
    safe_N = torch.where(has_rows, N[:, None], 1.0)
    mean_t = S1 / safe_N
    variance_t = (S2 / safe_N - mean_t.square()).clamp_min(0.0)
    return Moments(
        N,
        torch.where(has_rows, mu + variance.sqrt() * mean_t, mu),
        torch.where(has_rows, variance * variance_t, variance),
    )


def m_step(found: Moments, before: Parameters | None, reg_covar: float, negligible: float) -> Parameters:
    """The mixture that makes rows with these moments most likely, `reg_covar` added to its variances.

    A component whose share of all weight is at most `negligible` is dead: it keeps the mean and variance that it had
    `before`, and its weight becomes 0 for good, because it then gets no responsibilities.

    Raises:
        ValueError: a variance is 0.
    """
    share = found.weight / found.weight.sum()
    alive = share > negligible
    variance = found.variance + reg_covar
    if bool(((variance <= torch.finfo(torch.float32).tiny) & alive[:, None]).any()):
        raise ValueError(
            f"reg_covar must be larger than {reg_covar:g}: a component's rows all have the same value in a dimension, "
            "and its variance would be 0"
        )
    mu, logvar = found.mean, torch.log(variance)
    if before is not None:
        mu = torch.where(alive[:, None], mu, before.mu)
        logvar = torch.where(alive[:, None], logvar, before.logvar)
    log_weights = torch.where(alive, share, 1.0).log().masked_fill(~alive, -math.inf)
    return Parameters(mu, logvar, log_weights)
