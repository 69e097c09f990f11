"""Small problems, backward: a few components past all rows; and a few rows of q past all of their samples.

Both are programs of one launch.  The responsibilities are computed again, as forward does (`small_forward.py`):

    dL/dmu = s S1     dL/dlogvar = (S2 - S0) / 2     dL/dlog w = S0      S0, S1, S2: sums over rows of w, w t, w t^2
"""

import triton
import triton.language as tl

from .arithmetic import exp
from .components import HALF_LOG_2_PI, log_weight, small_parameters
from .gaussian import noise_of_rows, sample_gradients
from .logsumexp import log_responsibility, responsibility


@triton.jit
def _parameters(
    block, grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights, N, K, D,
    OF_KL: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients of COLUMNS components; those that are None are not wanted."""
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DIMS)[None, None, :]
    dtype: tl.constexpr = mu.dtype.element_ty
    log_w = log_weight(log_weights, k, K, dtype)
    m, lv = small_parameters(
        mu, logvar, log_w[:, None, None], k[:, None, None], d, K, D, log_weights is not None, SHARED
    )
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
    present = (k < K) & (log_w != float("-inf"))
    weight = tl.sum(sum0, 1)
    if dlog_weights is not None:
        tl.store(dlog_weights + k, tl.where(present, weight, 0.0), k < K)
    at, inside = k[:, None, None] * D + d, (k[:, None, None] < K) & (d < D)
    present = present[:, None, None]
    if dmu is not None:
        tl.store(dmu + at, tl.where(present, s * tl.sum(sum1, 1, keep_dims=True), 0.0), inside)
    if dlogvar is not None:
        value = 0.5 * (tl.sum(sum2, 1, keep_dims=True) - weight[:, None, None])
        tl.store(dlogvar + at, tl.where(present, value, 0.0), inside)


@triton.jit
def _posterior(
    block, grad_z, grad_kl, score, logvar, seed, dmu, dlogvar, S, M, D,
    PATH: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS of the M rows of q: that in z is grad_z - grad_kl score; the noise is drawn again."""
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
        offsets = (row * D)[:, None] + dims[None, :]
        g = tl.load(grad_kl + row, m < M, 0.0)[:, None]
        row_score = tl.load(score + offsets, inside, 0.0)
        # An fma with zero, because a product would be fused with the addition below; so it is rounded as the gradient
        # that `gaussian.py` is given.
        g_z = tl.fma(tl.broadcast_to(-g, row_score.shape), row_score, tl.zeros_like(row_score))
        if grad_z is not None:
            g_z += tl.load(grad_z + offsets, inside, 0.0)
        eps = noise_of_rows(key, row * D, QUADS, DIMS).to(sigma.dtype)
        add_mu, add_logvar = sample_gradients(g_z, g, eps, sigma, PATH)
        sum_mu += add_mu
        sum_logvar += add_logvar
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
