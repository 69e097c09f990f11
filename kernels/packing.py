"""Kernels that put rows and components into the form that the tiles read: padded, and as fp16 numbers for the product.

For the difference form the dimension comes first: z [D, M], mu and s = exp(-logvar / 2) [D, K].  For the product form
each row and component has 2 D features (`product.py`), of z' = (z - o) / u and mu' = (mu - o) / u, and a power of two
that scales them (`halves.py`).  The origin o is the mean of mu weighted by 1 / sigma, because the expansion cancels
more, the larger (z - o)^2 / sigma^2 and (mu - o)^2 / sigma^2 are.  The unit u of a dimension is the power of two next
to the geometric mean of its largest and its least sigma.  v, and the least v of a dimension, are exp(-logvar) u^2.

Each component also has its constant c, and what the score's skipping needs (`skipping.py`): its log sigma ratio
max_d (max_logvar_d - logvar_kd) / 2, where max_logvar_d is the largest logvar of any component; and in the product
form, whose constant is another, its peak, which is c.

Padding, and a component with a weight of -inf, have mu = 0, s = v = 0, c = -inf: they change no result.
"""

import triton
import triton.language as tl

from .arithmetic import EXP_LIMIT, LOG2_E, add_compensated, compensated_total, exp, lowest
from .components import HALF_LOG_2_PI, log_weight, tile_parameters
from .halves import reciprocal, scales, to_pair

CHUNK = tl.constexpr(16)  # dimensions at a time


@triton.jit
def survey_kernel(
    mu, logvar, log_weights, partial_max_logvar, partial_min_logvar, partial_weight, partial_mean, K, D, SPAN,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For CHUNK dimensions of SPAN components: the largest and least logvar, sum 1 / sigma and sum mu / sigma."""
    part = tl.program_id(0)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    dtype: tl.constexpr = mu.dtype.element_ty
    max_logvar = tl.full((CHUNK,), lowest(dtype), dtype)
    min_logvar = -max_logvar
    weight = tl.zeros((CHUNK,), dtype)
    mean = tl.zeros((CHUNK,), dtype)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        absent = log_weight(log_weights, k, K, dtype) == float("-inf")
        m, lv, present = tile_parameters(mu, logvar, absent, k, d, D, SHARED)
        s = tl.where(present, exp(-0.5 * lv), 0.0)
        max_logvar = tl.maximum(max_logvar, tl.max(tl.where(present, lv, lowest(dtype)), 0))
        min_logvar = tl.minimum(min_logvar, tl.min(tl.where(present, lv, -lowest(dtype)), 0))
        weight += tl.sum(s, 0)
        mean += tl.sum(s * m, 0)
    at = part * D + d
    tl.store(partial_max_logvar + at, max_logvar, d < D)
    tl.store(partial_min_logvar + at, min_logvar, d < D)
    tl.store(partial_weight + at, weight, d < D)
    tl.store(partial_mean + at, mean, d < D)


@triton.jit
def survey_merge_kernel(
    partial_max_logvar, partial_min_logvar, partial_weight, partial_mean, max_logvar, origin, unit, min_precision,
    PARTS, D, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the survey, [D] each; unit, min_precision: None where no product is wanted."""
    d = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    part = tl.arange(0, ROWS)
    inside = (part < PARTS)[:, None] & (d < D)[None, :]
    at = (part * D)[:, None] + d[None, :]
    dtype: tl.constexpr = max_logvar.dtype.element_ty
    weight = tl.sum(tl.load(partial_weight + at, inside, 0.0), 0)
    mean = tl.sum(tl.load(partial_mean + at, inside, 0.0), 0)
    largest = tl.max(tl.load(partial_max_logvar + at, inside, lowest(dtype)), 0)
    tl.store(max_logvar + d, largest, d < D)
    tl.store(origin + d, mean / tl.where(weight == 0.0, 1.0, weight), d < D)  # 0 where there is no component
    if unit is not None:
        least = tl.min(tl.load(partial_min_logvar + at, inside, -lowest(dtype)), 0)
        log_sigma = 0.25 * (tl.maximum(least, -EXP_LIMIT) + tl.minimum(largest, EXP_LIMIT))
        power = tl.floor(tl.where(weight == 0.0, 0.0, log_sigma) * LOG2_E + 0.5)
        u = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        tl.store(unit + d, u, d < D)
        tl.store(min_precision + d, tl.where(weight == 0.0, 0.0, exp(-largest) * u * u), d < D)


@triton.jit
def _larger_log_sigma_ratio(ratio, max_logvar, lv, present, d, D):
    """max(ratio, max_d (max_logvar_d - logvar_kd) / 2), over the dimensions d of a tile."""
    ratios = 0.5 * (tl.load(max_logvar + d, d < D, 0.0)[None, :] - lv)
    return tl.maximum(ratio, tl.max(tl.where(present, ratios, 0.0), 1))


@triton.jit
def components_difference_kernel(
    mu, logvar, log_weights, max_logvar, mu_t, s_t, c, log_sigma_ratio, K, K_PADDED, D, D_PADDED,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """max_logvar and log_sigma_ratio: None where no score is wanted that may leave tiles out."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = mu.dtype.element_ty
    log_w = log_weight(log_weights, k, K, dtype)
    absent = log_w == float("-inf")
    logvar_sum = tl.zeros((COLUMNS,), dtype)
    compensation = logvar_sum
    ratio = logvar_sum
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        m, lv, present = tile_parameters(mu, logvar, absent, k, d, D, SHARED)
        at = (d.to(tl.int64) * K_PADDED)[:, None] + k[None, :]
        tl.store(mu_t + at, tl.trans(m), (d < D_PADDED)[:, None])
        tl.store(s_t + at, tl.trans(tl.where(present, exp(-0.5 * lv), 0.0)), (d < D_PADDED)[:, None])
        logvar_sum, compensation = add_compensated(logvar_sum, compensation, tl.sum(lv, 1))
        if max_logvar is not None:
            ratio = _larger_log_sigma_ratio(ratio, max_logvar, lv, present, d, D)
    log_determinant = compensated_total(logvar_sum, compensation)
    tl.store(c + k, log_w - 0.5 * log_determinant - D * tl.full((COLUMNS,), HALF_LOG_2_PI, log_w.dtype))
    if max_logvar is not None:
        tl.store(log_sigma_ratio + k, ratio)


@triton.jit
def components_product_kernel(
    mu, logvar, log_weights, max_logvar, origin, unit, min_precision, y_high, y_low, y_scale, c, peak, log_sigma_ratio,
    K, D, F, DIMS, SQUARES: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """F features by slices of DIMS dimensions; SQUARES: whether those of the squares are among them.

    peak and log_sigma_ratio: None where no score is wanted that may leave tiles out.
    """
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    log_w = log_weight(log_weights, k, K, tl.float32)
    absent = log_w == float("-inf")
    logvar_sum = tl.zeros((COLUMNS,), tl.float32)
    compensation = logvar_sum
    mu_square = logvar_sum
    square_compensation = logvar_sum
    ratio = logvar_sum
    largest = logvar_sum
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        m, lv, present = tile_parameters(mu, logvar, absent, k, d, D, SHARED)
        m, v, excess = _in_units(m, lv, present, origin, unit, min_precision, d, D, SHARED)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(m * v), 0.5 * tl.abs(excess)), 1))
        logvar_sum, compensation = add_compensated(logvar_sum, compensation, tl.sum(lv, 1))
        mu_square, square_compensation = add_compensated(mu_square, square_compensation, tl.sum(m * m * v, 1))
        if log_sigma_ratio is not None:
            ratio = _larger_log_sigma_ratio(ratio, max_logvar, lv, present, d, D)
    inverse, scale = scales(largest)
    tl.store(y_scale + k, scale)
    log_determinant = compensated_total(logvar_sum, compensation)
    constant = log_w - 0.5 * log_determinant - D * tl.full((COLUMNS,), HALF_LOG_2_PI, log_w.dtype)
    tl.store(c + k, constant - 0.5 * compensated_total(mu_square, square_compensation))
    if log_sigma_ratio is not None:
        tl.store(peak + k, constant)
        tl.store(log_sigma_ratio + k, ratio)
    for start in range(0, F // (2 if SQUARES else 1), CHUNK):
        d = start + tl.arange(0, CHUNK)
        m, lv, present = tile_parameters(mu, logvar, absent, k, d, D, SHARED)
        m, v, excess = _in_units(m, lv, present, origin, unit, min_precision, d, D, SHARED)
        _store_features(m * v, -0.5 * excess, inverse, y_high, y_low, k, start, F, DIMS, SQUARES)


@triton.jit
def _in_units(m, lv, present, origin, unit, min_precision, d, D, SHARED: tl.constexpr):
    """(mu', v, v - the least v) of a tile, in the units of its dimensions."""
    u = tl.load(unit + d, d < D, 1.0)[None, :]
    least = tl.load(min_precision + d, d < D, 0.0)[None, :]
    m = tl.where(present, (m - tl.load(origin + d, d < D, 0.0)[None, :]) * reciprocal(u), 0.0)
    if SHARED:
        v = tl.where(present, least, 0.0)
    else:
        v = tl.where(present, exp(-lv) * u * u, 0.0)
    return m, v, tl.where(present, v - least, 0.0)


@triton.jit
def _store_features(linear, square, inverse, high, low, i, start, F, DIMS, SQUARES: tl.constexpr):
    """Store the features of lines i [n] and of CHUNK dimensions from `start`, [n, CHUNK], times `inverse` [n].

    low: None where high alone is wanted.
    """
    width = 2 * DIMS if SQUARES else DIMS
    at = (i.to(tl.int64) * F + start // DIMS * width + start % DIMS)[:, None] + tl.arange(0, CHUNK)[None, :]
    _store_pair(linear * inverse[:, None], high, low, at)
    if SQUARES:
        _store_pair(square * inverse[:, None], high, low, at + DIMS)


@triton.jit
def _store_pair(value, high, low, at):
    first, second = to_pair(value)
    tl.store(high + at, first)
    if low is not None:
        tl.store(low + at, second)


@triton.jit
def rows_difference_kernel(z, z_t, M, M_PADDED, D, D_PADDED, ROWS: tl.constexpr):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(z + (m.to(tl.int64) * D)[:, None] + d[None, :], (m < M)[:, None] & (d < D)[None, :], 0.0)
    at = (d.to(tl.int64) * M_PADDED)[:, None] + m[None, :]
    tl.store(z_t + at, tl.trans(value), (d < D_PADDED)[:, None])


@triton.jit
def rows_product_kernel(
    z, origin, unit, min_precision, x_high, x_low, x_scale, row_term, M, D, F, DIMS,
    SQUARES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """F features by slices of DIMS dimensions; SQUARES: whether those of the squares are among them."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    term = tl.zeros((ROWS,), tl.float32)
    compensation = term
    largest = term
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        value = _row_in_units(z, origin, unit, m, d, M, D)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
        least = tl.load(min_precision + d, d < D, 0.0)[None, :]
        term, compensation = add_compensated(term, compensation, tl.sum(value * least * value, 1))
    tl.store(row_term + m, -0.5 * compensated_total(term, compensation))
    if SQUARES:
        largest = tl.maximum(largest, largest * largest)
    inverse, scale = scales(largest)
    tl.store(x_scale + m, scale)
    for start in range(0, F // (2 if SQUARES else 1), CHUNK):
        value = _row_in_units(z, origin, unit, m, start + tl.arange(0, CHUNK), M, D)
        _store_features(value, value * value, inverse, x_high, x_low, m, start, F, DIMS, SQUARES)


@triton.jit
def _row_in_units(z, origin, unit, m, d, M, D):
    """z' of a tile, in the units of its dimensions; 0 beyond the last row and dimension."""
    inside = (m < M)[:, None] & (d < D)[None, :]
    value = tl.load(z + (m.to(tl.int64) * D)[:, None] + d[None, :], inside, 0.0)
    centred = value - tl.load(origin + d, d < D, 0.0)[None, :]
    return tl.where(inside, centred * reciprocal(tl.load(unit + d, d < D, 1.0))[None, :], 0.0)
