"""The gradient of samples of a mixture in its parameters: a velocity for each sample, whatever K is.

A parameter phi that changes moves the density p, and a sample z with it, along a velocity v = dz/dphi.  The gradient of
E[f(z)] is E[f'(z) v] for every velocity that moves p as phi does,

    dp/dphi = -div(p v).

**Means and scales.**  A component k that moves takes along what belongs to it, the share r_k = w_k N_k(z) / p(z):

    v = r_k in dimension d for mu_kd,      v = r_k t_kd for sigma_kd,      t_kd = (z_d - mu_kd) / sigma_kd

This is the mean, given z, of the usual gradient by way of the component that the sample was drawn from.

**Weights** move mass from one component to another.  The conditional distribution functions along the dimensions,

    S_d(z) = P(Z_d <= z_d | z_1 ... z_(d-1)) = sum_k pi_kd Phi(t_kd),      pi_k1 = w_k,  pi_k(d+1) = pi_kd n_kd / f_d,
    n_kd = N(z_d; mu_kd, sigma_kd^2),      f_d = sum_k pi_kd n_kd,

make independent uniform numbers of z.  Holding these fixed gives dz/dphi = -(dS/dz)^-1 dS/dphi, where dS/dz is
triangular.  For a gradient g that arrives at z, one sweep from the last dimension to the first solves it.  It carries a
vector lambda [K], minus the gradient in log pi_d, which is 0 behind the last dimension:

    u_d = g_d + sum_k lambda_k t_kd / sigma_kd
    lambda_k <- lambda_k + u_d pi_kd (Phi(t_kd) - S_d) / f_d        and at the end   dL/dlog w_k = -lambda_k

That is O(K D) work for a sample.  The sweep needs pi_d of all dimensions.  To divide pi_(d+1) by n_d again would lose
the digits of a component that n_d made small.  A block of samples keeps all pi_d instead, [samples, K, D] numbers.

Sources: Jankowiak and Karaletsos, Pathwise derivatives for multivariate distributions (AISTATS 2019), for the means and
scales; Figurnov, Mohamed and Mnih, Implicit reparameterization gradients (NeurIPS 2018), for the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvae._noise import LOG_2PI
from fastvae.distributions.batches import blocks, of_mixture
from fastvae.operators import Schema, define, library
from fastvae.transforms import Results, once_differentiable

_FARTHEST = 1e18  # in standard deviations
_ARRAYS = 32  # of [samples, K] numbers make a block, at least, so that one of them stays in a CPU's cache


class Samples(torch.autograd.Function):
    """z [B, R, D] as it is, with its gradients in locs, scale and log_weights; the shapes are those of `batches.py`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Results:
        need = ctx.needs_input_grad[1:]
        gradients = _backward(grad.contiguous(), *ctx.saved_tensors, *need)
        if torch.compiler.is_compiling():
            return (None, *(g if needed else None for g, needed in zip(gradients, need, strict=True)))
        return (None, *once_differentiable(gradients, need, grad, *ctx.saved_tensors))


def _gradients(
    grad: Tensor,
    z: Tensor,
    locs: Tensor,
    scale: Tensor,
    log_weights: Tensor,
    need_locs: bool,
    need_scale: bool,
    need_log_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those in locs, scale and log_weights for a gradient [B, R, D] at z; without elements where not needed."""
    need = need_locs, need_scale, need_log_weights
    # Components last, so that those of one dimension lie side by side in memory: [1 or B, D, 1 or K].
    parameters = locs.transpose(1, 2).contiguous(), scale.transpose(1, 2).contiguous(), log_weights
    totals = [torch.zeros_like(p) if needed else p.new_empty(0) for p, needed in zip(parameters, need, strict=True)]
    K, D = locs.shape[1:]
    for b, r in blocks(z, K * max(D, _ARRAYS)):
        own_locs, own_scale, own_log_weights = (of_mixture(p, b) for p in parameters)
        parts = _of_block(grad[b, r], z[b, r], own_locs, own_scale, own_log_weights, need)
        for total, part in zip(totals, parts, strict=True):
            if part is not None:
                place = of_mixture(total, b)
                place += part.sum_to_size(place.shape)
    of_locs, of_scale = (t.transpose(1, 2).contiguous() if n else t for t, n in zip(totals, need[:2], strict=False))
    return of_locs, of_scale, totals[2]


def _shapes(grad, z, locs, scale, log_weights, *need: bool) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape if n else (0,)) for p, n in zip((locs, scale, log_weights), need, strict=True))


# An operator, so that a compiler does not unroll the loops.
_SIGNATURE = (
    "(Tensor grad, Tensor z, Tensor locs, Tensor scale, Tensor log_weights, "
    "bool need_locs, bool need_scale, bool need_log_weights) -> (Tensor, Tensor, Tensor)"
)
(_backward,) = define("", [Schema("mixture_samples_backward", _SIGNATURE, _shapes)])
library.impl("mixture_samples_backward", _gradients, "CompositeExplicitAutograd")


def _of_block(
    grad: Tensor, z: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `_gradients` adds up: [b, D, K] for locs and scale, [b, K] for log_weights."""
    log_scale = scale.log()
    dimensions = range(z.shape[-1])

    def standardised(d: int) -> Tensor:
        """t_d [b, r, K], within bounds that its square keeps finite: 0 times infinity would be NaN."""
        t = (z[:, :, d, None] - locs[:, None, d]) / scale[:, None, d]
        return t.clamp_(-_FARTHEST, _FARTHEST)

    log_pi = log_weights[:, None]  # [b, 1, K], [b, r, K] from the second dimension on
    before: list[tuple[Tensor, Tensor]] = []  # (log pi_d [b, r, K], log f_d [b, r, 1]) of each dimension
    for d in dimensions:
        log_joint = log_pi - 0.5 * standardised(d).square() - (log_scale[:, None, d] + 0.5 * LOG_2PI)
        log_f = log_joint.logsumexp(-1, keepdim=True)
        if need[2]:
            before.append((log_pi, log_f))
        log_pi = log_joint.sub_(log_f)
    responsibilities = log_pi.exp()

    # By sums and not by matrix products, which autocast and TF32 would round.
    of_locs = of_scale = None
    if need[0]:
        of_locs = torch.stack([(responsibilities * grad[:, :, d, None]).sum(1) for d in dimensions], 1)
    if need[1]:
        each = [(responsibilities * standardised(d)).mul_(grad[:, :, d, None]).sum(1) for d in dimensions]
        of_scale = torch.stack(each, 1)
    if not need[2]:
        return of_locs, of_scale, None

    lambda_ = torch.zeros_like(responsibilities)
    for d in reversed(dimensions):
        (log_pi, log_f), t = before[d], standardised(d)
        u = grad[:, :, d, None] + (lambda_ * t / scale[:, None, d]).sum(-1, keepdim=True)
        share = torch.exp(log_pi - log_f)  # pi / f
        t.mul_(math.sqrt(0.5))
        # pi Phi / f and pi (1 - Phi) / f, so that the smaller one has all its digits, and S / f and (1 - S) / f
        below, above = share * torch.erfc(-t).mul_(0.5), share * torch.erfc(t).mul_(0.5)
        all_below, all_above = below.sum(-1, keepdim=True), above.sum(-1, keepdim=True)
        pi = log_pi.exp()
        moved = torch.where(all_below < all_above, below - pi * all_below, pi * all_above - above)
        lambda_ += u * moved
    return of_locs, of_scale, -lambda_.sum(1)
