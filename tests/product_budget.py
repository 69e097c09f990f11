"""Cases for the product form of Triton's lower precisions, and how far from float64 it may be on them."""

from __future__ import annotations

import math

import torch
from budget import Case, Result
from torch import Tensor

import fastvae
from fastvae import reference

LOWER = ("high", "medium")
U = 2.0**-24
FLOOR = {"high": 2.0**-50, "medium": 2.0**-39}  # what a feature is off by at least, as a part of the item's largest
ROUNDING = {"high": 3 * 2.0**-22, "medium": 2.0**-10}  # of a product: two parts and three products; two fp16 operands


def design_case(logvar: float, spread: float, M: int = 40, K: int = 300, D: int = 40) -> Case:
    """Rows near components of one sigma and means of a given spread: the larger spread / sigma, the more cancels."""
    rng = torch.Generator().manual_seed(0)
    mu = spread * torch.randn(K, D, generator=rng) + 3.0  # an offset, which the origin must take away
    own, sigma = torch.randint(K, (M,), generator=rng), torch.tensor(0.5 * logvar).exp()
    z = mu[own] + sigma * torch.randn(M, D, generator=rng)
    logvars = logvar + 0.2 * torch.randn(K, D, generator=rng)
    return Case(z, mu, logvars, torch.log_softmax(torch.randn(K, generator=rng), 0), torch.randn(M, generator=rng))


def run_at(case: Case, precision: str, dense: bool = False) -> Result:
    leaves = [v.clone().requires_grad_() for v in (case.z, case.mu, case.logvar, case.log_weights)]
    log_prob = fastvae.mixture_log_prob(*leaves, dense_backward=dense, precision=precision, impl="triton")
    return Result(log_prob.detach(), *torch.autograd.grad(log_prob, leaves, case.grad))


def exponent_band(case: Case, precision: str) -> Tensor:
    """What each exponent may be off [M, K], for inputs as float64.

    a = c' + sum_f x_f p_f of F = 2 D features, each product wrong by ROUNDING and the sum by sqrt(F) + 2 roundings of
    float32.
    """
    K, D = case.mu.shape
    logvar = case.logvar.expand(K, D)
    v, (z, mu) = torch.exp(-logvar), _centred(case)
    size = (v * (z * mu + 0.5 * z.square())).sum(-1)
    c = case.log_weights.abs() + 0.5 * (logvar.abs() + 2 * mu.square() * v + reference.LOG_2PI).sum(-1)
    return ROUNDING[precision] * size + U * (2 + (2 * D) ** 0.5) * (size + c)


def floor_band(case: Case, precision: str) -> Tensor:
    """What each exponent may be off besides [M, K], as fp16 numbers have a least one: see fastvae/kernels/halves.py.

    It counts where features of one row, or of one component, are of very different sizes.
    """
    log_sigma = 0.5 * case.logvar.expand(case.mu.shape) / math.log(2)
    unit = torch.exp2(torch.round(0.5 * (log_sigma.amin(0) + log_sigma.amax(0))))
    (z, mu), v = _centred(case), torch.exp2(-2 * log_sigma) * unit.square()
    z, mu = z[:, 0] / unit, mu / unit
    x, y = torch.cat([z, z.square()], 1), torch.cat([mu * v, 0.5 * (v - v.amin(0))], 1)
    return FLOOR[precision] * (x.amax(1, True) * y.sum(1) + x.sum(1, True) * y.amax(1))


def _centred(case: Case) -> tuple[Tensor, Tensor]:
    """|z| [M, 1, D] and |mu| [K, D] from the origin."""
    s = torch.exp(-0.5 * case.logvar.expand(case.mu.shape))
    origin = (s * case.mu).sum(0) / s.sum(0)
    return (case.z - origin).abs()[:, None], (case.mu - origin).abs()


def product_band(case: Case, precision: str) -> Result:
    """What the expansion may lose, for inputs as float64.

    logsumexp moves by no more than the most that any a moves, so r by a factor within exp(+-2 da).  The
    gradients are sums of r times features, wrong by the same ROUNDING each, from which those of z - mu are differences.
    """
    M, (K, D) = len(case.z), case.mu.shape
    v, (z, mu), da, u = torch.exp(-case.logvar.expand(K, D)), _centred(case), exponent_band(case, precision), U
    each = ROUNDING[precision]
    a = reference.component_log_prob(case.z, case.mu, case.logvar, case.log_weights)
    log_prob = torch.logsumexp(a, -1)
    dl = (torch.logsumexp(a + da, -1) - log_prob) + u * (log_prob.abs() + 3 + K**0.5)
    x = a - log_prob[:, None]
    r = torch.exp(x)
    dr = (torch.exp((x + da + dl[:, None]).clamp(max=1.0)) - r).clamp(max=1.0)[..., None]
    dr = dr + u / K  # for what is skipped
    r, g = r[..., None], case.grad.abs()[:, None, None]
    each += u * (4 + max(M, K) ** 0.5)
    distance = (case.z[:, None] - case.mu).abs()
    first = g * v * (dr * distance + each * r * (z + mu))
    second = 0.5 * g * (dr * (distance.square() * v - 1).abs() + each * r * (v * (z + mu).square() + 1))
    return Result(dl, first.sum(1), first.sum(0), second.sum(0), (g * (dr + each * r)).sum((0, 2)))
