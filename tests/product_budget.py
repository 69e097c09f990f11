"""Cases for the product form of Triton's lower precisions, and how far from float64 it may be on them."""

from __future__ import annotations

import torch
from budget import Case, Result

import fastvae
from fastvae import reference

LOWER = ("high", "medium")
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


def product_band(case: Case, precision: str) -> Result:
    """What the expansion may lose, for inputs as float64.

    a = c' + sum_f x_f p_f of F = 2 D features, each product wrong by ROUNDING and the sum by sqrt(F) + 2 roundings of
    float32.  logsumexp moves by no more than the most that any a moves, so r by a factor within exp(+-2 da).  The
    gradients are sums of r times features, wrong by the same ROUNDING each, from which those of z - mu are differences.
    """
    M, (K, D) = len(case.z), case.mu.shape
    u = 2.0**-24
    logvar = case.logvar.expand(K, D)
    s, v = torch.exp(-0.5 * logvar), torch.exp(-logvar)
    origin = (s * case.mu).sum(0) / s.sum(0)
    z, mu = (case.z - origin).abs()[:, None], (case.mu - origin).abs()  # [M, 1, D], [K, D]
    size = (v * (z * mu + 0.5 * z.square())).sum(-1)  # [M, K]
    c = case.log_weights.abs() + 0.5 * (logvar.abs() + 2 * mu.square() * v + reference.LOG_2PI).sum(-1)
    each = ROUNDING[precision]
    da = each * size + u * (2 + (2 * D) ** 0.5) * (size + c)
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
