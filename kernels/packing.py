"""Rows and components in the form that the tiles read: padded, so that nothing there needs a mask, and rounded.

For the difference form the dimension comes first: z [D, M], mu and s = exp(-logvar / 2) [D, K].  For the product each
row and component has 2 D features (`product.py`), of z' = z - o and mu' = mu - o.  Beside them lie c [K] and

    reach_k = c_k / 64 + max_d (widest_d - logvar_kd) / 2 + constant

(`logsumexp.py`), widest_d the largest logvar of any component.  The origin o is the mean of mu weighted by 1 / sigma:
what the expansion cancels grows with (z - o)^2 / sigma^2 and (mu - o)^2 / sigma^2.

A component that is absent, by a weight of -inf or as padding, has mu = 0, s = v = 0, c = -inf: whatever its parameters
are, it reaches nothing.
"""

import triton
import triton.language as tl

from .arithmetic import exp, log, lowest, round_to_tf32
from .logsumexp import REACH_CONSTANT

HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)
CHUNK = tl.constexpr(16)  # dimensions at a time


@triton.jit
def log_weight(log_weights, k, K, dtype: tl.constexpr):
    """log w [k]; -log K where none are given, -inf beyond K."""
    if log_weights is None:
        value = -log(tl.full(k.shape, K, dtype))
    else:
        value = tl.load(log_weights + k, k < K, 0.0)
    return tl.where(k < K, value, float("-inf"))


@triton.jit
def add_exactly(total, lost, x):
    """(total, lost) with x added to total, and to lost what that addition rounds off (Knuth's two-sum).

    A plain sum of D equal terms is off by D / 4 roundings: as long as the sum stays between two powers of 2, every
    addition rounds by the same amount in the same direction.
    """
    new_total = total + x
    added = new_total - total
    return new_total, lost + ((total - (new_total - added)) + (x - added))


@triton.jit
def exact_total(total, lost):
    """What `add_exactly` has added up; an infinite total has lost NaN."""
    return total + tl.where(lost == lost, lost, 0.0)


@triton.jit
def _parameters(mu, logvar, absent, k, d, D, SHARED: tl.constexpr):
    """(mu, logvar, where there is something) of a tile [k, d]; absent components are all zeros."""
    there = (~absent)[:, None] & (d < D)[None, :]
    at = (k.to(tl.int64) * D)[:, None] + d[None, :]
    m = tl.load(mu + at, there, 0.0)
    if SHARED:
        lv = tl.where(there, tl.load(logvar + d, d < D, 0.0)[None, :], 0.0)
    else:
        lv = tl.load(logvar + at, there, 0.0)
    return m, lv, there


@triton.jit
def survey_kernel(
    mu, logvar, log_weights, partial_widest, partial_weight, partial_mean, K, D, SPAN,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For CHUNK dimensions of SPAN components: the largest logvar, sum 1 / sigma, sum mu / sigma."""
    part = tl.program_id(0)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    dtype: tl.constexpr = mu.dtype.element_ty
    widest = tl.full((CHUNK,), lowest(dtype), dtype)
    weight = tl.zeros((CHUNK,), dtype)
    mean = tl.zeros((CHUNK,), dtype)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        absent = log_weight(log_weights, k, K, dtype) == float("-inf")
        m, lv, there = _parameters(mu, logvar, absent, k, d, D, SHARED)
        s = tl.where(there, exp(-0.5 * lv), 0.0)
        widest = tl.maximum(widest, tl.max(tl.where(there, lv, lowest(dtype)), 0))
        weight += tl.sum(s, 0)
        mean += tl.sum(s * m, 0)
    at = part * D + d
    tl.store(partial_widest + at, widest, d < D)
    tl.store(partial_weight + at, weight, d < D)
    tl.store(partial_mean + at, mean, d < D)


@triton.jit
def survey_merge_kernel(partial_widest, partial_weight, partial_mean, widest, origin, PARTS, D, ROWS: tl.constexpr):
    """The parts of the survey together: widest [D] and origin [D]."""
    d = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    part = tl.arange(0, ROWS)
    inside = (part < PARTS)[:, None] & (d < D)[None, :]
    at = (part * D)[:, None] + d[None, :]
    dtype: tl.constexpr = widest.dtype.element_ty
    weight = tl.sum(tl.load(partial_weight + at, inside, 0.0), 0)
    mean = tl.sum(tl.load(partial_mean + at, inside, 0.0), 0)
    tl.store(widest + d, tl.max(tl.load(partial_widest + at, inside, lowest(dtype)), 0), d < D)
    tl.store(origin + d, mean / tl.where(weight == 0.0, 1.0, weight), d < D)  # 0 where there is no component


@triton.jit
def _steepness(widest, lv, there, d, D, steep):
    """max(steep, max_d (widest_d - logvar_kd) / 2)."""
    return tl.maximum(steep, tl.max(tl.where(there, 0.5 * (tl.load(widest + d, d < D, 0.0)[None, :] - lv), 0.0), 1))


@triton.jit
def components_difference_kernel(
    mu, logvar, log_weights, widest, mu_t, s_t, c, reach, K, K_PADDED, D, D_PADDED,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = mu.dtype.element_ty
    log_w = log_weight(log_weights, k, K, dtype)
    absent = log_w == float("-inf")
    logvar_sum = tl.zeros((COLUMNS,), dtype)
    lost = logvar_sum
    steep = logvar_sum
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        m, lv, there = _parameters(mu, logvar, absent, k, d, D, SHARED)
        at = (d.to(tl.int64) * K_PADDED)[:, None] + k[None, :]
        tl.store(mu_t + at, tl.trans(m), (d < D_PADDED)[:, None])
        tl.store(s_t + at, tl.trans(tl.where(there, exp(-0.5 * lv), 0.0)), (d < D_PADDED)[:, None])
        logvar_sum, lost = add_exactly(logvar_sum, lost, tl.sum(lv, 1))
        if widest is not None:
            steep = _steepness(widest, lv, there, d, D, steep)
    constant = log_w - 0.5 * exact_total(logvar_sum, lost) - D * tl.full((COLUMNS,), HALF_LOG_2_PI, log_w.dtype)
    tl.store(c + k, constant)
    if widest is not None:
        tl.store(reach + k, constant / 64 + steep + REACH_CONSTANT)


@triton.jit
def components_product_kernel(
    mu, logvar, log_weights, widest, origin, p_high, p_low, p_high_t, p_low_t, c, reach, K, K_PADDED, D, D_PADDED, F,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    log_w = log_weight(log_weights, k, K, tl.float32)
    absent = log_w == float("-inf")
    logvar_sum = tl.zeros((COLUMNS,), tl.float32)
    lost = logvar_sum
    mu_square = logvar_sum
    lost_of_square = logvar_sum
    steep = logvar_sum
    for start in range(0, D_PADDED, CHUNK):
        d = start + tl.arange(0, CHUNK)
        m, lv, there = _parameters(mu, logvar, absent, k, d, D, SHARED)
        m = tl.where(there, m - tl.load(origin + d, d < D, 0.0)[None, :], 0.0)
        v = tl.where(there, exp(-lv), 0.0)
        _store_feature(m * v, p_high, p_low, p_high_t, p_low_t, k, d, F, K_PADDED)
        if not SHARED:
            _store_feature(-0.5 * v, p_high, p_low, p_high_t, p_low_t, k, D_PADDED + d, F, K_PADDED)
        logvar_sum, lost = add_exactly(logvar_sum, lost, tl.sum(lv, 1))
        mu_square, lost_of_square = add_exactly(mu_square, lost_of_square, tl.sum(m * m * v, 1))
        steep = _steepness(widest, lv, there, d, D, steep)
    constant = log_w - 0.5 * exact_total(logvar_sum, lost) - D * tl.full((COLUMNS,), HALF_LOG_2_PI, log_w.dtype)
    tl.store(c + k, constant - 0.5 * exact_total(mu_square, lost_of_square))
    tl.store(reach + k, constant / 64 + steep + REACH_CONSTANT)


@triton.jit
def _store_feature(value, high, low, high_t, low_t, i, f, F, STRIDE):
    """A tile [i, f] as high + low, TF32 each, into [., F], and into [., STRIDE] turned around; what is None is not."""
    first = round_to_tf32(value)
    second = round_to_tf32(value - first)
    at = (i.to(tl.int64) * F)[:, None] + f[None, :]
    if high is not None:
        tl.store(high + at, first)
    if low is not None:
        tl.store(low + at, second)
    at = (f.to(tl.int64) * STRIDE)[:, None] + i[None, :]
    if high_t is not None:
        tl.store(high_t + at, tl.trans(first))
    if low_t is not None:
        tl.store(low_t + at, tl.trans(second))


@triton.jit
def rows_difference_kernel(z, z_t, M, M_PADDED, D, D_PADDED, ROWS: tl.constexpr):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(z + (m.to(tl.int64) * D)[:, None] + d[None, :], (m < M)[:, None] & (d < D)[None, :], 0.0)
    at = (d.to(tl.int64) * M_PADDED)[:, None] + m[None, :]
    tl.store(z_t + at, tl.trans(value), (d < D_PADDED)[:, None])


@triton.jit
def rows_product_kernel(
    z, origin, shared_logvar, x_high, x_low, x_high_t, x_low_t, row_term, M, M_PADDED, D, D_PADDED, F,
    ROWS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros((ROWS,), tl.float32)
    lost = square
    for start in range(0, D_PADDED, CHUNK):
        d = start + tl.arange(0, CHUNK)
        inside = (m < M)[:, None] & (d < D)[None, :]
        value = tl.load(z + (m.to(tl.int64) * D)[:, None] + d[None, :], inside, 0.0)
        value = tl.where(inside, value - tl.load(origin + d, d < D, 0.0)[None, :], 0.0)
        _store_feature(value, x_high, x_low, x_high_t, x_low_t, m, d, F, M_PADDED)
        if shared_logvar is None:
            _store_feature(value * value, x_high, x_low, x_high_t, x_low_t, m, D_PADDED + d, F, M_PADDED)
        else:
            _store_feature(value * value, None, None, x_high_t, x_low_t, m, D_PADDED + d, F, M_PADDED)
            v = exp(-tl.load(shared_logvar + d, d < D, 0.0))
            square, lost = add_exactly(square, lost, tl.sum(value * value * v[None, :], 1))
    if shared_logvar is not None:
        tl.store(row_term + m, -0.5 * exact_total(square, lost))
