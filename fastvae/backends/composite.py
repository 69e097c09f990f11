"""The composite backend: plain PyTorch on any device, with hand-written gradients, in O(chunk) memory.

The symbols are those of `reference.py`.  With g the gradient arriving at l, and w_mk = g_m r_mk:

    dz_md = -sum_k w_mk t_mkd s_kd            dmu_kd = s_kd sum_m w_mk t_mkd
    dlogvar_kd = 1/2 sum_m w_mk (t_mkd^2 - 1)     dlog w_k = sum_m w_mk

so l is all that has to be kept; r is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae._noise import LOG_2PI, normal
from fastvae.backends import from_parts
from fastvae.backends.backend import Backend
from fastvae.operators import SCHEMAS, Operators, define, library

# Numbers in the largest temporary, [rows, components, D].  In float32 the first is 8 MiB, which stay in a CPU's caches;
# the second, on other devices, makes a kernel that takes much longer than its launch.  Some four such temporaries
# live at a time, so that on a GPU they are held to that share of its memory.
CHUNK, DEVICE_CHUNK, MEMORY_SHARE = 2**21, 2**26, 1 / 16


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def chunk_on(device: torch.device, itemsize: int) -> int:
    """How many numbers, of so many bytes, the largest temporary has."""
    if device.type == "cpu":
        return CHUNK
    if device.type != "cuda":
        return DEVICE_CHUNK
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(DEVICE_CHUNK, int(memory * MEMORY_SHARE / 4) // itemsize)


def _row_slices(z: Tensor) -> Iterator[slice]:
    M, D = z.shape
    return _slices(M, max(1, min(1024, chunk_on(z.device, z.element_size()) // D)))


def _component_slices(rows: Tensor, K: int) -> Iterator[slice]:
    return _slices(K, max(1, chunk_on(rows.device, rows.element_size()) // max(1, rows.numel())))


def _component(z, mu, logvar, log_weights, exclude, k: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(a [m, k], t [m, k, D], s [k or 1, D]) of the rows z against the components k."""
    K, D = mu.shape
    mu = mu[k]
    logvar = logvar if logvar.shape[0] != K else logvar[k]
    if log_weights is None:
        log_w = z.new_full((mu.shape[0],), -math.log(K))
    else:  # a component of weight zero is not there: whatever its parameters are must reach nothing
        absent = log_weights[k] == -math.inf
        mu, logvar = mu.masked_fill(absent[:, None], 0.0), logvar.masked_fill(absent[:, None], 0.0)
        log_w = log_weights[k]
    s = torch.exp(-0.5 * logvar)
    t = (z[:, None, :] - mu) * s
    a = log_w - 0.5 * (logvar.sum(-1) + D * LOG_2PI) - 0.5 * t.square().sum(-1)
    if exclude is not None:
        a = a.masked_fill(exclude[:, None] == torch.arange(k.start, k.stop, device=z.device), -math.inf)
    return a, t, s


def mixture_log_prob(z, mu, logvar, log_weights, exclude) -> Tensor:
    K = mu.shape[0]
    log_prob = z.new_empty(len(z))
    for m in _row_slices(z):
        rows, skip = z[m], None if exclude is None else exclude[m]
        # the running maximum starts at the lowest number, not at -inf: -inf minus -inf would be NaN
        top = z.new_full((rows.shape[0],), torch.finfo(z.dtype).min)
        total = torch.zeros_like(top)
        for k in _component_slices(rows, K):
            a, _, _ = _component(rows, mu, logvar, log_weights, skip, k)
            new_top = torch.maximum(top, a.amax(1))
            total = total * torch.exp(top - new_top) + torch.exp(a - new_top[:, None]).sum(1)
            top = new_top
        log_prob[m] = top + torch.log(total)
    return log_prob


def mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude) -> tuple[Tensor, Tensor]:
    log_prob = mixture_log_prob(z, mu, logvar, log_weights, exclude)
    ones = torch.ones_like(log_prob)
    score, _, _, _ = mixture_log_prob_backward(
        ones, log_prob, z, mu, logvar, log_weights, exclude, True, True, False, False, False
    )
    return log_prob, score


def mixture_log_prob_backward(
    grad,
    log_prob,
    z,
    mu,
    logvar,
    log_weights,
    exclude,
    dense: bool,
    need_z: bool,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Always dense: the argument is the signature's."""
    K, shared = mu.shape[0], logvar.shape[0] != mu.shape[0]

    def wanted(need: bool, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if need else z.new_empty(0)

    dz, dmu, dlogvar = wanted(need_z, z), wanted(need_mu, mu), wanted(need_logvar, logvar)
    dlog_w = wanted(need_log_weights, mu[:, 0])
    nowhere = log_prob == -math.inf  # no component there: density zero, no gradient
    grad, log_prob = grad.masked_fill(nowhere, 0.0), log_prob.masked_fill(nowhere, 0.0)

    for m in _row_slices(z):
        rows, skip = z[m], None if exclude is None else exclude[m]
        for k in _component_slices(rows, K):
            a, t, s = _component(rows, mu, logvar, log_weights, skip, k)
            w = grad[m, None] * torch.exp(a - log_prob[m, None])  # [m, k]
            p = w[..., None] * t  # [m, k, D]
            if need_z:
                dz[m] -= (p * s).sum(1)
            if need_mu:
                dmu[k] += p.sum(0) * s
            if need_logvar:
                part = 0.5 * ((p * t).sum(0) - w.sum(0)[:, None])  # [k, D]
                dlogvar[slice(None) if shared else k] += part.sum(0) if shared else part
            if need_log_weights:
                dlog_w[k] += w.sum(0)
    return dz, dmu, dlogvar, dlog_w


def _noise(seed: Tensor, s: slice, m: slice, logvar: Tensor) -> Tensor:
    """The standard normal numbers of the samples s and rows m, which must be contiguous: [s, m, D]."""
    M, D = logvar.shape
    start, count = (s.start * M + m.start) * D, (s.stop - s.start) * (m.stop - m.start) * D
    return normal(seed, start, count).to(logvar.dtype).reshape(s.stop - s.start, m.stop - m.start, D)


def _sample_slices(S: int, mu: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pieces of the flattened [S, M]: several whole samples, or some rows of one."""
    (M, D), chunk = mu.shape, chunk_on(mu.device, mu.element_size())
    if chunk < M * D:
        return ((s, m) for s in _slices(S, 1) for m in _slices(M, max(1, chunk // D)))
    return ((s, slice(0, M)) for s in _slices(S, max(1, chunk // max(1, M * D))))


def gaussian_rsample(mu, logvar, seed, num_samples: int) -> tuple[Tensor, Tensor]:
    M, D = mu.shape
    z, log_q = mu.new_empty(num_samples, M, D), mu.new_empty(num_samples, M)
    for s, m in _sample_slices(num_samples, mu):
        eps = _noise(seed, s, m, logvar)
        z[s, m] = mu[m] + torch.exp(0.5 * logvar[m]) * eps
        log_q[s, m] = -0.5 * (eps.square() + logvar[m] + LOG_2PI).sum(-1)
    return z, log_q


def gaussian_rsample_backward(grad_z, grad_log_q, logvar, seed, path_derivative: bool) -> tuple[Tensor, Tensor]:
    """log q = -1/2 sum_d (eps^2 + logvar + log 2 pi), whose gradient by its path is -eps / sigma in z."""
    dmu, dlogvar = torch.zeros_like(logvar), torch.zeros_like(logvar)
    for s, m in _sample_slices(grad_z.shape[0], logvar):
        sigma = torch.exp(0.5 * logvar[m])
        eps, g_z, g_log_q = _noise(seed, s, m, logvar), grad_z[s, m], grad_log_q[s, m, None]
        if path_derivative:
            dmu[m] += (g_z - g_log_q * eps / sigma).sum(0)
            dlogvar[m] += 0.5 * (g_z * sigma * eps - g_log_q * eps.square()).sum(0)
        else:
            dmu[m] += g_z.sum(0)
            dlogvar[m] += 0.5 * (g_z * sigma * eps - g_log_q).sum(0)
    return dmu, dlogvar


def gaussian_kl(mu, logvar) -> Tensor:
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar).sum(-1)


def gaussian_kl_backward(grad, mu, logvar) -> tuple[Tensor, Tensor]:
    return grad[:, None] * mu, 0.5 * grad[:, None] * torch.expm1(logvar)


_operators = Operators(*define("composite_", SCHEMAS))
for _implementation in (
    mixture_log_prob,
    mixture_log_prob_and_score,
    mixture_log_prob_backward,
    gaussian_rsample,
    gaussian_rsample_backward,
    gaussian_kl,
    gaussian_kl_backward,
):
    library.impl(f"composite_{_implementation.__name__}", _implementation, "CompositeExplicitAutograd")
from_parts.register(library, "composite_", _operators)

COMPOSITE = Backend(
    impl="composite",
    devices=None,
    missing=lambda device: None,
    operators=_operators,
    default_on=("*",),
    about="plain PyTorch in chunks, on any device",
)
