"""Inputs for the mixture density, and how far from float64 a kernel may be on them.

The rule: |kernel - f64| <= 2 |reference in the same dtype - f64| + band, element by element, for the value
and each gradient.  The band is what a backward-stable difference form may lose, written with the unit
roundoff u:

- exp(-logvar) to one ulp, 2u relative, the same for all d where logvar is, and z - mu to u, squared: t^2 / 2 loses
  2u t^2.  No term has |mu| / sigma in it: the expansion z^2 s^2 - 2 z mu s^2 + mu^2 s^2 loses u mu^2 s^2, and even
  t = fma(z, s, -mu s) moves t by u |mu| s;
- a sum of n terms rounds n times, with a standard deviation below u |partial sum| / sqrt 3; a growing sum
  ends at most u |sum| sqrt(n) / 3 off, and three of those are u |sum| sqrt n.  Equal terms, added one by one, all round
  the same way and end u |sum| n / 4 off: the band has no room for that, and kernels add blocks or compensate;
- logsumexp adds as much for its K terms, 3u for exp, log and the rescaling, and u |l| for the last addition;
- a responsibility about the smallest normal number may as well be zero;
- unless dense_backward is set, one of at most u / K may be left out of the gradients of the parameters, by
  contract; the gradient of z has the same band either way.

From |a error| <= da the error of l and of r = exp(a - l) follows by moving a to either end of its interval,
so the band stays right where da is not small.  Gradients are sums of products of r, t and s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae import reference


@dataclass(frozen=True)
class Case:
    """One call: the arguments of `mixture_log_prob` and the gradient that arrives at its result."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor | None
    grad: Tensor
    exclude: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        floating = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "exclude"}
        return replace(self, **{name: None if v is None else v.to(dtype) for name, v in floating.items()})


class Result(NamedTuple):
    """log p(z) and its gradients; also, element by element, what each of them may be off."""

    log_prob: Tensor
    dz: Tensor
    dmu: Tensor
    dlogvar: Tensor
    dlog_weights: Tensor


def hard_case(M: int, K: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Clusters of components, so that responsibilities are neither flat nor one-hot; sigma from 1e-3 to 1e3.

    Every third row lies fifty sigmas from its component; every seventh component has weight zero.
    """
    rng = torch.Generator().manual_seed(seed + 1000003 * M + 1009 * K + D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    clusters = (K + 3) // 4
    exponent = torch.rand(clusters, D, generator=rng, dtype=torch.float64) * 6 - 3  # sigma = 10^exponent
    cluster = torch.arange(K) % clusters
    logvar = (2 * math.log(10) * exponent)[cluster] + 0.3 / math.sqrt(D) * normal(K, D)
    sigma = torch.exp(0.5 * logvar)
    mu = 3 * normal(clusters, D)[cluster] + sigma / math.sqrt(D) * normal(K, D)
    log_weights = torch.log_softmax(2 * normal(K), 0)
    log_weights[7::7] = -math.inf
    own = torch.randint(K, (M,), generator=rng)
    distance = torch.where(torch.arange(M) % 3 == 2, 50.0, 1.0)[:, None]
    z = mu[own] + sigma[own] * normal(M, D) * distance
    grad = normal(M)
    grad[4::5] = 0.0
    return Case(z, mu, logvar, log_weights, grad).to(dtype)


def diffuse_case(M: int, K: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """What an untrained encoder gives: many components share a row."""
    rng = torch.Generator().manual_seed(seed)
    z, mu = torch.randn(M, D, generator=rng), 0.3 * torch.randn(K, D, generator=rng)
    return Case(z, mu, 0.1 * torch.randn(K, D, generator=rng), None, torch.randn(M, generator=rng)).to(dtype)


def run(case: Case, impl: str, dense_backward: bool = False) -> Result:
    """The public operation and all its gradients; with log_weights None its gradient is empty."""
    leaves = [
        None if v is None else v.detach().clone().requires_grad_()
        for v in (case.z, case.mu, case.logvar, case.log_weights)
    ]
    log_prob = fastvae.mixture_log_prob(*leaves, exclude=case.exclude, dense_backward=dense_backward, impl=impl)
    wanted = [v for v in leaves if v is not None]
    grads = list(torch.autograd.grad(log_prob, wanted, case.grad))
    if case.log_weights is None:
        grads.append(case.z.new_empty(0))
    return Result(log_prob.detach(), *grads)


def band(case: Case, dtype: torch.dtype, dense_backward: bool = False) -> Result:
    """What stands at the top of this file; `case` is what the kernel was given in `dtype`, as float64."""
    u = torch.finfo(dtype).eps / 2
    (M, D), K = case.z.shape, case.mu.shape[0]
    log_w = case.mu.new_full((K,), -math.log(K)) if case.log_weights is None else case.log_weights
    absent = log_w == -math.inf
    mu = case.mu.masked_fill(absent[:, None], 0.0)
    logvar = case.logvar.expand(K, D).masked_fill(absent[:, None], 0.0)
    log_w = log_w.masked_fill(absent, 0.0)

    s = torch.exp(-0.5 * logvar)  # [K, D]
    t = (case.z[:, None, :] - mu) * s  # [M, K, D]
    a = reference.component_log_prob(case.z, case.mu, case.logvar, case.log_weights)  # [M, K]
    if case.exclude is not None:
        a = a.masked_fill(case.exclude[:, None] == torch.arange(K), -math.inf)
    magnitude = log_w.abs() + 0.5 * (logvar.abs().sum(-1) + D * reference.LOG_2PI) + 0.5 * t.square().sum(-1)
    da = u * (2 * t.square().sum(-1) + (1 + math.sqrt(D)) * magnitude)  # [M, K]

    log_prob = torch.logsumexp(a, -1)
    lost = log_prob == -math.inf  # rows without a component: exact
    lse = u * (log_prob.abs().masked_fill(lost, 0.0) + 3 + math.sqrt(K))
    up, down = torch.logsumexp(a + da, -1) - log_prob, log_prob - torch.logsumexp(a - da, -1)
    dl = (torch.maximum(up, down) + lse).masked_fill(lost, 0.0)  # [M]

    x = (a - log_prob[:, None]).masked_fill(lost[:, None], -math.inf)
    r, move = torch.exp(x), da + dl[:, None]
    upper = torch.exp(torch.minimum(x + move, (da + lse[:, None]).clamp(max=1.0)))
    dr = torch.maximum(upper - r, -r * torch.expm1(-move)).masked_fill(x == -math.inf, 0.0)
    dr = dr + r.clamp(max=4 * torch.finfo(dtype).tiny)
    left_out = torch.zeros_like(r) if dense_backward else r.clamp(max=u / K)
    dt = u * 4 * t.abs()  # [M, K, D]

    g = case.grad.abs()[:, None, None]
    r, dr, left_out = r[..., None], dr[..., None], left_out[..., None]
    each = g * s * (dr * t.abs() + r * dt)
    size = g * r * t.abs() * s
    dz = (each + u * (4 + math.sqrt(K)) * size).sum(1)
    dr = dr + left_out
    each = g * s * (dr * t.abs() + r * dt)
    n = M if case.logvar.shape == (K, D) else M * K
    dlogvar = 0.5 * g * (dr * (t.square() - 1).abs() + 2 * r * t.abs() * dt)
    dlogvar = (dlogvar + 0.5 * u * (4 + math.sqrt(n)) * g * r * (t.square() + 1)).sum(0)  # [K, D]
    dlog_w = (g * (dr + u * (2 + math.sqrt(M)) * r)).sum((0, 2))
    return Result(
        dl,
        dz,
        (each + u * (4 + math.sqrt(M)) * size).sum(0),
        dlogvar.sum_to_size(case.logvar.shape) if case.logvar.ndim else dlogvar.sum(),
        dlog_w if case.log_weights is not None else case.z.new_empty(0),
    )


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64; 0 where both are the same infinity, inf where only one is."""
    got = got.double()
    return torch.where(got == want, 0.0, (got - want).abs().nan_to_num(math.inf))


def allowance(case: Case, dense_backward: bool = False) -> tuple[Result, Result]:
    """(what float64 gives, how far from it a kernel may be), for the inputs of `case`."""
    dtype, exact = case.z.dtype, case.to(torch.float64)
    want, bands = run(exact, "reference"), band(exact, dtype, dense_backward)
    if dtype == torch.float64:  # the reference errs as much as the kernel
        return want, Result(*(2 * b for b in bands))
    eager = run(case, "reference")
    return want, Result(*(2 * difference(e, w) + b for e, w, b in zip(eager, want, bands, strict=True)))


@cache
def hard_allowance(M: int, K: int, D: int, dtype: torch.dtype, dense_backward: bool) -> tuple[Case, Result, Result]:
    """A hard case, its exact result and its allowance, kept for the next backend."""
    case = hard_case(M, K, D, dtype=dtype)
    return case, *allowance(case, dense_backward)


def worst(got: Result, want: Result, allowed: Result) -> dict[str, float]:
    """For the value and each gradient, the largest error as a multiple of what is allowed."""
    ratios = {}
    for name, g, w, limit in zip(Result._fields, got, want, allowed, strict=True):
        assert g.shape == w.shape, f"{name}: {list(g.shape)}, should be {list(w.shape)}"
        error = difference(g, w)
        # nothing allowed and nothing lost is no loss
        ratios[name] = float(torch.where(error == 0, 0.0, error / limit).max()) if g.numel() else 0.0
    return ratios


def assert_within(got: Result, want: Result, allowed: Result, what: str = "") -> None:
    ratios = worst(got, want, allowed)
    assert all(ratio <= 1 for ratio in ratios.values()), f"{what} error / allowed: {ratios}"
