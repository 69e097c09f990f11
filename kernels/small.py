"""Small problems in one launch each way: sampling, log q and log p forward; all gradients backward.

A small problem is bound by launches, so nothing here is packed or merged: a program takes a few rows past all
components, or backward a few components past all rows, a tile [rows, components, dimensions] at a time with every
dimension in it.  The arithmetic is the difference form, in every precision, and nothing is skipped:

    a_mk = log w_k - D/2 log 2 pi - 1/2 sum_d (t_mkd^2 + logvar_kd)        t_mkd = (z_md - mu_kd) s_kd

Forward, each place of the tile keeps an online logsumexp, and sums of the score, of the components that it sees; these
meet once, at the end.  Each row's exponentials s are its own program's, which is what the missing launch costs.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .arithmetic import exp, log, lowest
from .gaussian import noise_of_rows, sample_gradients, sample_rows
from .logsumexp import log_responsibility, responsibility
from .packing import HALF_LOG_2_PI, log_weight

LARGEST = 2**24  # M K D: about where tiles of 128 x 128 are as fast, launches included; so offsets have 32 bits
LARGEST_STREAM = 2**16  # K D: what one program reads
WIDEST = 256  # D
MULTIPROCESSORS = 132  # as many programs run before any takes a second row
MOST_ROWS = 4  # of a program: with more, a thread would load less than 16 bytes at a time
BACKWARD_ROWS = 16
ELEMENTS = 16  # of a tile, for each thread


def fits(M: int, K: int, D: int) -> bool:
    """Whether M rows (over all samples) and K components of D dimensions are a small problem.

    FASTVAE_TILES=1 takes tiles at any size: for the tests.
    """
    if os.environ.get("FASTVAE_TILES") == "1":
        return False
    return D <= WIDEST and K * D <= LARGEST_STREAM and M * K * D <= LARGEST


@triton.jit
def _components(mu, logvar, log_w, k, d, K, D, WEIGHTED: tl.constexpr, SHARED: tl.constexpr):
    """(mu, logvar) of components k and dimensions d, which broadcast; zeros where there is nothing.

    WEIGHTED: some may be absent, by a weight of -inf, and hold anything.
    """
    inside = (k < K) & (d < D)
    at = k * D + d
    m = tl.load(mu + at, inside, 0.0)
    if SHARED:
        lv = tl.load(logvar + d, d < D, 0.0)
    else:
        lv = tl.load(logvar + at, inside, 0.0)
    if WEIGHTED:
        absent = log_w == float("-inf")
        m = tl.where(absent, 0.0, m)
        if not SHARED:
            lv = tl.where(absent, 0.0, lv)
    return m, lv


@triton.jit
def forward_kernel(
    q_mu, q_logvar, seed, z, kl, mu, logvar, log_weights, exclude, grad, log_prob, score, M, N, K, D,
    QUADS: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """ROWS of the N = S M rows of z against all K components.

    seed: None where z is given; otherwise z is sampled, SAMPLED >= ROWS rows at a time, and kl is wanted.
    log_prob, score: may be None; grad: where not None, what the score is multiplied by.
    """
    if QUADS:
        D = D // 4 * 4  # see `sample_rows`
    first = tl.program_id(0) * ROWS
    if seed is not None:
        own, end = first.to(tl.int64) + tl.arange(0, SAMPLED), tl.minimum(first + ROWS, N)
        tl.store(kl + own, sample_rows(q_mu, q_logvar, seed, z, own, end, M, D, QUADS, DIMS), own < end)
        tl.debug_barrier()  # what other threads wrote is read below
    rows = first + tl.arange(0, ROWS)
    d = tl.arange(0, DIMS)[None, None, :]
    at_rows, inside = rows[:, None, None] * D + d, (rows[:, None, None] < N) & (d < D)
    x = tl.load(z + at_rows, inside, 0.0)
    dtype: tl.constexpr = x.dtype
    if exclude is not None:
        left_out = tl.load(exclude + rows, rows < N, -1)
    top = tl.full((ROWS, COLUMNS), lowest(dtype), dtype)
    total = tl.zeros((ROWS, COLUMNS), dtype)
    weighted = tl.zeros((ROWS, COLUMNS, DIMS if score is not None else 1), dtype)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        log_w = log_weight(log_weights, k, K, dtype)
        m, lv = _components(
            mu, logvar, log_w[None, :, None], k[None, :, None], d, K, D, log_weights is not None, SHARED
        )
        s = exp(-0.5 * lv)
        t = (x - m) * s
        a = (log_w - D * tl.full((COLUMNS,), HALF_LOG_2_PI, dtype))[None, :] - 0.5 * tl.sum(t * t + lv, 2)
        if exclude is not None:
            a = tl.where(left_out[:, None] == k[None, :], float("-inf"), a)
        new_top = tl.maximum(top, a)
        shrink, p = tl.exp(top - new_top), tl.exp(a - new_top)
        top, total = new_top, total * shrink + p
        if score is not None:
            added = p[:, :, None] * t * s  # in this order: t s may be no float32
            weighted = tl.fma(weighted, tl.broadcast_to(shrink[:, :, None], weighted.shape), added)
    row_top = tl.max(top, 1)
    share = tl.exp(top - row_top[:, None])
    row_total = tl.sum(total * share, 1)
    value = row_top + log(row_total)
    if log_prob is not None:
        tl.store(log_prob + rows, value, rows < N)
    if seed is not None:
        tl.store(kl + rows, tl.load(kl + rows, rows < N, 0.0) - value, rows < N)
    if score is not None:
        summed = tl.sum(tl.where(share[:, :, None] == 0.0, 0.0, weighted * share[:, :, None]), 1)
        scale = -1.0 / tl.where(row_total == 0.0, 1.0, row_total)  # of a row without a component the score is 0
        if grad is not None:
            scale *= tl.load(grad + rows, rows < N, 0.0)
        dims = tl.arange(0, DIMS)[None, :]
        inside_score = (rows < N)[:, None] & (dims < D)
        tl.store(score + (rows * D)[:, None] + dims, summed * scale[:, None], inside_score)


@triton.jit
def _parameters(
    block, grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights, N, K, D,
    OF_KL: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients of COLUMNS components, of which those that are None are not wanted.

    dmu = s S1     dlogvar = (S2 - S0) / 2     dlog w = S0
    """
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DIMS)[None, None, :]
    dtype: tl.constexpr = mu.dtype.element_ty
    log_w = log_weight(log_weights, k, K, dtype)
    m, lv = _components(mu, logvar, log_w[:, None, None], k[:, None, None], d, K, D, log_weights is not None, SHARED)
    s = exp(-0.5 * lv)
    constant = (log_w - D * tl.full((COLUMNS,), HALF_LOG_2_PI, dtype))[:, None]
    sum0 = tl.zeros((COLUMNS, ROWS), dtype)
    sum1 = tl.zeros((COLUMNS, ROWS, DIMS), dtype)
    sum2 = sum1
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = rows[None, :, None]
        t = (tl.load(z + row * D + d, (row < N) & (d < D), 0.0) - m) * s
        a = constant - 0.5 * tl.sum(t * t + lv, 2)
        g = tl.load(grad + rows, rows < N, 0.0)
        if OF_KL:
            g = -g
        w = g[None, :] * responsibility(log_responsibility(a, log_prob, exclude, rows, k, N))
        sum0 += w
        if dmu is not None or dlogvar is not None:
            wt = w[:, :, None] * t
            sum1 += wt
            if dlogvar is not None:
                sum2 += wt * t
    there = (k < K) & (log_w != float("-inf"))
    weight = tl.sum(sum0, 1)
    if dlog_weights is not None:
        tl.store(dlog_weights + k, tl.where(there, weight, 0.0), k < K)
    at, inside = k[:, None, None] * D + d, (k[:, None, None] < K) & (d < D)
    there = there[:, None, None]
    if dmu is not None:
        tl.store(dmu + at, tl.where(there, s * tl.sum(sum1, 1, keep_dims=True), 0.0), inside)
    if dlogvar is not None:
        value = 0.5 * (tl.sum(sum2, 1, keep_dims=True) - weight[:, None, None])
        tl.store(dlogvar + at, tl.where(there, value, 0.0), inside)


@triton.jit
def _posterior(
    block, grad_z, grad_kl, score, logvar, seed, dmu, dlogvar, S, M, D,
    PATH: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS of the M rows of q: what comes by z is grad_z - grad_kl score, the noise is drawn again."""
    m = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    inside = (m < M)[:, None] & (dims < D)[None, :]
    at = (m * D)[:, None] + dims[None, :]
    key = tl.load(seed)
    sigma = exp(0.5 * tl.load(logvar + at, inside, 0.0))
    sum_mu = tl.zeros((ROWS, DIMS), sigma.dtype)
    sum_logvar = sum_mu
    row = m
    for _ in range(0, S):
        place = (row * D)[:, None] + dims[None, :]
        g = tl.load(grad_kl + row, m < M, 0.0)[:, None]
        of_score = tl.load(score + place, inside, 0.0)
        # rounded by itself, as where `gaussian.py` is handed it: a product would fuse with what is added to it
        g_z = tl.fma(tl.broadcast_to(-g, of_score.shape), of_score, tl.zeros_like(of_score))
        if grad_z is not None:
            g_z += tl.load(grad_z + place, inside, 0.0)
        eps = noise_of_rows(key, row * D, QUADS, DIMS).to(sigma.dtype)
        of_mu, of_logvar = sample_gradients(g_z, g, eps, sigma, PATH)
        sum_mu += of_mu
        sum_logvar += of_logvar
        row += M
    tl.store(dmu + at, sum_mu, inside)
    tl.store(dlogvar + at, 0.5 * sum_logvar, inside)


@triton.jit
def backward_kernel(
    grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights,
    grad_z, score, q_logvar, seed, dq_mu, dq_logvar, BLOCKS, S, M, N, K, D,
    OF_KL: tl.constexpr, PATH: tl.constexpr, QUADS: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """The first BLOCKS programs have COLUMNS components each, the others SAMPLED rows of q.

    OF_KL: grad is that of kl = log q - log p, not of log p.  dq_mu and dq_logvar: None where q has no gradient.
    """
    if QUADS:
        D = D // 4 * 4  # see `sample_rows`
    block = tl.program_id(0)
    if block < BLOCKS:
        _parameters(
            block, grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights, N, K, D,
            OF_KL, SHARED, COLUMNS, ROWS, DIMS,
        )  # fmt: skip
    if dq_mu is not None:
        if block >= BLOCKS:
            _posterior(
                block - BLOCKS, grad_z, grad, score, q_logvar, seed, dq_mu, dq_logvar, S, M, D,
                PATH, QUADS, SAMPLED, DIMS,
            )  # fmt: skip


class _Sizes(NamedTuple):
    """Of a tile, as kernels take them."""

    ROWS: int
    COLUMNS: int
    DIMS: int
    SAMPLED: int  # rows of q at a time: four elements a thread, laid out as in `gaussian.py`: log q has the same bits
    num_warps: int


def _sizes(M: int, D: int, forward: bool) -> _Sizes:
    dims = max(4, tiles.next_power_of_2(D))
    warps = 8 if forward and dims <= 128 else 4  # 8 may share a row of 256 that has 4 in `gaussian.py`
    elements, sampled = ELEMENTS * 32 * warps, 4 * 32 * warps // dims
    if forward:
        rows = min(MOST_ROWS, sampled, tiles.next_power_of_2(tiles.cdiv(M, MULTIPROCESSORS)))
    else:
        rows = min(BACKWARD_ROWS, elements // dims)
    return _Sizes(rows, elements // (rows * dims), dims, sampled, warps)


class Sampled(NamedTuple):
    """q, the seed, and where the samples' KL goes."""

    mu: Tensor
    logvar: Tensor
    seed: Tensor
    kl: Tensor


def forward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    *,
    log_prob: Tensor | None = None,
    score: Tensor | None = None,
    grad: Tensor | None = None,
    sampled: Sampled | None = None,
) -> None:
    """Fill log_prob [N] and score [N, D], of which either may be None; the score times grad [N], if that is given.

    sampled: z [N, D] is filled too, and the KL.
    """
    (N, D), K = z.shape, len(mu)
    q_mu, q_logvar, seed, kl = sampled or (None, None, None, None)
    sizes = _sizes(N, D, forward=True)
    forward_kernel[(tiles.cdiv(N, sizes.ROWS),)](
        q_mu, q_logvar, seed, z, kl, mu, logvar, log_weights, exclude, grad, log_prob, score,
        1 if q_mu is None else len(q_mu), N, K, D,
        QUADS=D % 4 == 0, SHARED=len(logvar) != K, **sizes._asdict(), enable_fp_fusion=True,
    )  # fmt: skip


class OfPosterior(NamedTuple):
    """What the gradients dmu and dlogvar of q are made of; grad_z is None where z is not used."""

    grad_z: Tensor | None
    score: Tensor
    logvar: Tensor
    seed: Tensor
    dmu: Tensor
    dlogvar: Tensor


def backward(
    grad: Tensor,
    log_prob: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
    *,
    of_kl: bool = False,
    posterior: OfPosterior | None = None,
    path_derivative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of mu, logvar and log_weights; what is not needed has no elements.

    of_kl: grad is that of the KL; posterior: its gradients are filled too.  Where logvar is shared, its gradient is the
    sum of the components' own, one more launch.
    """
    (N, D), K = z.shape, len(mu)
    need = need_mu, need_logvar, need_log_weights
    dmu, dlogvar, dlog_weights = (
        torch.empty_like(like) if needed else None for like, needed in zip((mu, mu, mu[:, 0]), need, strict=True)
    )
    sizes = _sizes(N, D, forward=False)
    blocks = tiles.cdiv(K, sizes.COLUMNS) if any(need) else 0
    M = len(posterior.logvar) if posterior is not None else 0
    if blocks + M:
        backward_kernel[(blocks + tiles.cdiv(M, sizes.SAMPLED),)](
            grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights,
            *(posterior or (None,) * 6), blocks, N // M if M else 0, M, N, K, D,
            OF_KL=of_kl, PATH=path_derivative, QUADS=D % 4 == 0, SHARED=len(logvar) != K, **sizes._asdict(),
            enable_fp_fusion=True,
        )  # fmt: skip
    if dlogvar is not None and len(logvar) != K:
        dlogvar = dlogvar.sum(0, keepdim=True)
    dmu, dlogvar, dlog_weights = (mu.new_empty(0) if d is None else d for d in (dmu, dlogvar, dlog_weights))
    return dmu, dlogvar, dlog_weights
