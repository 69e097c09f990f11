"""Small problems, forward: a few rows past all components; the rows may be samples, drawn first.

A program takes a tile [rows, components, dimensions] at a time, with every dimension in it.  The arithmetic is the
difference form, in every precision, and nothing is left out:

    a_mk = log w_k - D/2 log 2 pi - 1/2 sum_d (t_mkd^2 + logvar_kd)        t_mkd = (z_md - mu_kd) s_kd

Each element of the tile keeps an online logsumexp, and sums of the score, over the components that it sees.  They are
merged once, at the end, within the program.  Each program computes the exponentials s of all components again, because
packing them would be another launch.
"""

import triton
import triton.language as tl

from .arithmetic import exp, log, lowest
from .components import HALF_LOG_2_PI, log_weight, small_parameters
from .gaussian import sample_rows


@triton.jit
def forward_kernel(
    q_mu, q_logvar, seed, z, kl, mu, logvar, log_weights, exclude, grad, log_prob, score, M, N, K, D,
    QUADS: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """ROWS of the N = S M rows of z against all K components.

    seed: None where z is given; otherwise z is sampled, SAMPLED >= ROWS rows at a time, and kl is wanted.
    log_prob, score: may be None.  grad: if given, the score is multiplied by it.
    """
    if QUADS:
        D = D // 4 * 4  # see `sample_rows`
    first = tl.program_id(0) * ROWS
    if seed is not None:
        own, end = first.to(tl.int64) + tl.arange(0, SAMPLED), tl.minimum(first + ROWS, N)
        tl.store(kl + own, sample_rows(q_mu, q_logvar, seed, z, own, end, M, D, QUADS, DIMS), own < end)
        tl.debug_barrier()  # below, threads read what other threads have written
    rows = first + tl.arange(0, ROWS)
    d = tl.arange(0, DIMS)[None, None, :]
    at_rows, inside = rows[:, None, None] * D + d, (rows[:, None, None] < N) & (d < D)
    x = tl.load(z + at_rows, inside, 0.0)
    dtype: tl.constexpr = x.dtype
    if exclude is not None:
        excluded = tl.load(exclude + rows, rows < N, -1)
    top = tl.full((ROWS, COLUMNS), lowest(dtype), dtype)
    total = tl.zeros((ROWS, COLUMNS), dtype)
    weighted = tl.zeros((ROWS, COLUMNS, DIMS if score is not None else 1), dtype)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        log_w = log_weight(log_weights, k, K, dtype)
        m, lv = small_parameters(
            mu, logvar, log_w[None, :, None], k[None, :, None], d, K, D, log_weights is not None, SHARED
        )
        s = exp(-0.5 * lv)
        t = (x - m) * s
        a = (log_w - D * tl.full((COLUMNS,), HALF_LOG_2_PI, dtype))[None, :] - 0.5 * tl.sum(t * t + lv, 2)
        if exclude is not None:
            a = tl.where(excluded[:, None] == k[None, :], float("-inf"), a)
        new_top = tl.maximum(top, a)
        shrink, p = tl.exp(top - new_top), tl.exp(a - new_top)
        top, total = new_top, total * shrink + p
        if score is not None:
            added = p[:, :, None] * t * s  # in this order: t s may overflow
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
