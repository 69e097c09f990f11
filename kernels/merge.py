"""Kernels that merge the parts of splits, in a fixed order: the same input gives the same bits."""

import triton
import triton.language as tl

from .arithmetic import exp, log, lowest
from .halves import reciprocal


@triton.jit
def merge_rows_kernel(
    partial_top, partial_total, partial_score, z, origin, unit, min_precision, grad, log_prob, score,
    M, M_PADDED, D, WIDTH, SPLITS,
    SQUARES: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """log p [M] and, where there are parts of it, the score [M, D], times `grad` [M] where that is given.

    Parts of the score lie slice by slice of SLICE dimensions.  With z, origin, unit and min_precision they are the
    product form's G1, in each slice before its G2 if SQUARES, from which the score follows (`product.py`).
    log_prob: None where it is known already.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    dtype: tl.constexpr = partial_top.dtype.element_ty
    top = tl.full((ROWS,), lowest(dtype), dtype)
    at = partial_top + rows
    for _ in range(0, SPLITS):
        top = tl.maximum(top, tl.load(at))
        at += M_PADDED
    total = tl.zeros((ROWS,), dtype)
    linear = tl.zeros((ROWS, DIMS), dtype)
    square = linear
    features = (dims // SLICE * (2 * SLICE if SQUARES else SLICE) + dims % SLICE)[None, :]
    offset = rows.to(tl.int64)
    for _ in range(0, SPLITS):
        shrink = tl.exp(tl.load(partial_top + offset) - top)
        total += tl.load(partial_total + offset) * shrink
        if partial_score is not None:
            part = partial_score + (offset * WIDTH)[:, None] + features
            linear += _shrunk(tl.load(part, (dims < D)[None, :], 0.0), shrink)
            if SQUARES:
                square += _shrunk(tl.load(part + SLICE, (dims < D)[None, :], 0.0), shrink)
        offset += M_PADDED
    if log_prob is not None:
        if tl.program_id(1) == 0:
            tl.store(log_prob + rows, top + log(total), rows < M)
    if partial_score is not None:
        inside = (rows < M)[:, None] & (dims < D)[None, :]
        at_z = (rows.to(tl.int64) * D)[:, None] + dims[None, :]
        scale = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # of a row without a component the score is 0
        value = linear * scale
        if unit is not None:
            inverse = reciprocal(tl.load(unit + dims, dims < D, 1.0))[None, :]
            centred = (tl.load(z + at_z, inside, 0.0) - tl.load(origin + dims, dims < D, 0.0)[None, :]) * inverse
            least = tl.where(total == 0.0, 0.0, 1.0)[:, None] * tl.load(min_precision + dims, dims < D, 0.0)[None, :]
            value = (value + centred * (2.0 * square * scale - least)) * inverse
        if grad is not None:
            value *= tl.load(grad + rows, rows < M, 0.0)[:, None]
        tl.store(score + at_z, value, inside)


@triton.jit
def _shrunk(part, shrink):
    """part [R, D] times shrink [R], and 0 where that is 0, whatever the part."""
    return tl.where(shrink[:, None] == 0.0, 0.0, part * shrink[:, None])


@triton.jit
def merge_components_kernel(
    s0, s1, s2, mu, logvar, origin, unit, log_weights, dmu, dlogvar, dlog_weights, K, K_PADDED, D, WIDTH, SPLITS,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters from S0 [K], S1 and S2 [K, D]; those that are None are not wanted.

    dmu = s S1 and dlogvar = (S2 - S0) / 2, for sums of t = (z - mu) s and t^2.  Where origin and unit are given, s1 and
    s2 are sums of z' = (z - origin) / unit and z'^2, from which those of (z - mu) / unit = z' - mu' follow.
    """
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    dtype: tl.constexpr = mu.dtype.element_ty
    sum0 = tl.zeros((COLUMNS,), dtype)
    sum1 = tl.zeros((COLUMNS, DIMS), dtype)
    sum2 = sum1
    offset = k.to(tl.int64)
    part = (d < WIDTH)[None, :]
    for _ in range(0, SPLITS):
        sum0 += tl.load(s0 + offset)
        at = (offset * WIDTH)[:, None] + d[None, :]
        if s1 is not None:
            sum1 += tl.load(s1 + at, part, 0.0)
        if s2 is not None:
            sum2 += tl.load(s2 + at, part, 0.0)
        offset += K_PADDED
    present = k < K
    if log_weights is not None:
        present &= tl.load(log_weights + k, k < K, 0.0) != float("-inf")
    if dlog_weights is not None:
        if tl.program_id(1) == 0:
            tl.store(dlog_weights + k, tl.where(present, sum0, 0.0), k < K)
    if s1 is not None:
        out = (k.to(tl.int64) * D)[:, None] + d[None, :]
        inside = (k < K)[:, None] & (d < D)[None, :]
        present = present[:, None] & (d < D)[None, :]
        if SHARED:
            lv = tl.load(logvar + d, d < D, 0.0)[None, :]
        else:
            lv = tl.load(logvar + out, present, 0.0)
        s = exp(-0.5 * lv)
        if origin is not None:
            u = tl.load(unit + d, d < D, 1.0)
            centred = tl.load(mu + out, present, 0.0) - tl.load(origin + d, d < D, 0.0)[None, :]
            centred *= reciprocal(u)[None, :]
            scaled = s * u[None, :]
            if s2 is not None:
                sum2 = (sum2 + centred * (centred * sum0[:, None] - 2.0 * sum1)) * scaled * scaled
            sum1 = (sum1 - centred * sum0[:, None]) * scaled
        if dmu is not None:
            tl.store(dmu + out, tl.where(present, s * sum1, 0.0), inside)
        if dlogvar is not None:
            tl.store(dlogvar + out, tl.where(present, 0.5 * (sum2 - sum0[:, None]), 0.0), inside)
