"""How far from float64 the CUDA kernels may be in the product form, which is precision "high" and "medium".

A pair's exponent is a = R + c' + x y^T, with the features x and y of csrc/cuda/product.h.  Its error is at most

    each sum_f |x_f y_f| + floor + u (10 W + |c| + |a| + 4)      u = 2^-24

- each: of a product.  In "high" both factors have two parts in fp16, and are off by 2^-22 of themselves; the product of
  the low parts is left out, 2^-22 more.  In "medium" they are off by 2^-11.  Tensor cores cut sums off: when they add
  eight products to a sum, each of these nine terms loses at most 2^-23 of the largest, and so does the new sum.  So 16
  features lose 20 x 2^-23.  In "high" their sum begins at 0, and is added by rounding; in "medium" the loss grows.
- floor: of small features.  An item's features are scaled so that the largest is at least 2^13.  Then the smallest are
  off by 2^-25, which is half the distance of fp16 numbers near 0, and that is 2^-38 of the largest.
- W = 1/2 sum_d (|z'| + |mu'|)^2 / sigma^2: the size of all terms.  Features, R and c' are made in float32, by at most
  ten roundings each, exp(-logvar) included.

What follows for the value and the gradients is as in budget.py: r = exp(a - l) is off by a factor within
exp(+-(da + dl)), but never by more than 1.  The gradients are differences of sums of weights times features:

- weights are made of l - R, which is rounded as much as l and R are;
- a weight is off by as much as a feature, and 64 items lose four times as much as 16 features;
- small features are off by the floor;
- a pair is left out where its weight is 2^-26 / K of its row's largest, or 2^-26 / M of its component's.
"""

from __future__ import annotations

import math

import torch
from budget import Case, Result
from torch import Tensor

from fastvae import reference
from tools.experiments.certificate import centred

U = 2.0**-24
FACTORS = {"high": 3 * 2.0**-22, "medium": 2.0**-10 + 2.0**-22}  # what a product loses by its factors
CUT_OFF = 20 * 2.0**-23  # what a sum of 16 features loses
FLOOR = 2.0**-38  # what a feature is off by at least, as a part of the item's largest


def exponent_band(case: Case, precision: str) -> Tensor:
    """What each exponent may be off [M, K]; `case` is what the kernel was given, as float64, all components present."""
    z, mu, v, *_ = about = centred(case.z, case.mu, case.logvar)
    K, D = mu.shape
    whole = 0.5 * ((z.abs()[:, None] + mu.abs()).square() * v).sum(-1)
    log_weights = torch.full((K,), -math.log(K)) if case.log_weights is None else case.log_weights
    c = log_weights.abs() + 0.5 * (torch.log(v).abs().sum(-1) + D * reference.LOG_2PI)
    a = reference.component_log_prob(case.z, case.mu, case.logvar, case.log_weights)
    x, y = about.features()
    steps = math.ceil(x.shape[1] / 16) + 1  # the padding of z' is not that of x
    each = FACTORS[precision] + (CUT_OFF + steps * U if precision == "high" else steps * CUT_OFF)
    floor = FLOOR * (x.amax(-1, True) * y.sum(-1) + x.sum(-1, True) * y.amax(-1))
    return each * (x @ y.T) + floor + U * (10 * whole + c + a.abs() + 4)


def product_band(case: Case, precision: str) -> Result:
    """What value and gradients may be off, of the same inputs."""
    M, K = len(case.z), len(case.mu)
    z, mu, v, unit, square_unit = about = centred(case.z, case.mu, case.logvar)
    a = reference.component_log_prob(case.z, case.mu, case.logvar, case.log_weights)
    if case.exclude is not None:
        a = a.masked_fill(case.exclude[:, None] == torch.arange(K), -math.inf)
    log_prob, da = torch.logsumexp(a, -1), exponent_band(case, precision)
    dl = torch.logsumexp(a + da, -1) - log_prob + U * (log_prob.abs() + 3 + K**0.5)
    rounded = U * (log_prob.abs() + 0.5 * (z.square() * v.amin(0)).sum(-1))  # l - R
    x, move = a - log_prob[:, None], da + (dl + rounded)[:, None]
    r, most = torch.exp(x), torch.exp((x + move).clamp(max=0.0))
    dr = torch.maximum(most - r, -r * torch.expm1(-move)) + U * (1 / K + 1 / M)

    each = FACTORS[precision] + 4 * CUT_OFF + U * (4 + max(M, K) ** 0.5)
    most, dr, g = most[..., None], dr[..., None], case.grad.abs()[:, None, None]
    distance, sizes = (z[:, None] - mu).abs(), z.abs()[:, None] + mu.abs()  # [M, K, D]
    x, y = (FLOOR * of_items.amax(-1)[:, None] for of_items in about.features())
    x, x_squared = (x / unit)[:, None], (x / (unit.square() * square_unit))[:, None]  # [M, 1, D], in units of z
    y = y * unit * (1 + 2 * z.abs()[:, None] * unit * square_unit)  # [M, K, D]
    moved = dr * distance + each * most * sizes
    dz = (g * (v * moved + most * y)).sum(1)
    dmu = (g * v * (moved + most * x)).sum(0)
    second = dr * (distance.square() * v - 1).abs() + each * most * (sizes.square() * v + 1)
    dlogvar = 0.5 * (g * (second + most * v * (x_squared + 2 * mu.abs() * x))).sum(0)
    dlog_weights = case.z.new_empty(0) if case.log_weights is None else (g * (dr + each * most)).sum((0, 2))
    return Result(dl, dz, dmu, dlogvar.sum_to_size(case.logvar.shape), dlog_weights)
