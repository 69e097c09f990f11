"""precision="high" and "medium": the expansion as a matrix product of fp16 numbers, on tensor cores.

With z' = (z - o) / u and mu' = (mu - o) / u, o an origin near the components and u a unit, a power of two, for each
dimension (`packing.py`), v = u^2 exp(-logvar), and v0_d the least v of any component:

    a_mk = c'_k + R_m + sum_d [z'_d, z'_d^2] . [mu'_kd v_kd, -(v_kd - v0_d) / 2]
    c'_k = c_k - 1/2 sum_d mu'_kd^2 v_kd        R_m = -1/2 sum_d z'_d^2 v0_d

so rows have features x [M, F], components have features y [K, F], and a = c' + R + x y^T.  Where all components share
v, the squares of z' have no features, and F is half as wide.  The gradients are products with the same features:

    score_md = (G1 + z' (2 G2 - v0 sum_k r)) / u,  [G1, G2] = r y       [S1, S2] = w^T x     S0 = sum_m w

The features of a row are one power of two times pairs of fp16 numbers ("high") or single ones ("medium"), and so are
those of a component (`halves.py`).  In the gradients' products the weights are split in the same way: each row of a
tile of weights, with the powers of two of the features in it, has one of its own.  Nothing else is rounded to fp16.

Two shapes.  Where all dimensions fit one slice (WHOLE), a program loads the features on its own side once, and those of
the other side once for both products.  Otherwise a is summed over chunks of features, and the slice is loaded for the
second product.
"""

import triton
import triton.language as tl

from .arithmetic import lowest
from .halves import add_product, joined, load_pair, reciprocal, scales, to_pair
from .logsumexp import absorb, log_responsibility, responsibility, store_sums
from .skipping import is_active, is_active_in_score


@triton.jit
def _features_product(
    a_high, a_low, b_high, b_low, outer, inner, F, A_STRIDE, B_STRIDE, CHUNK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """sum_f a[outer, f] b[inner, f] over F features, a [., A_STRIDE] and b [., B_STRIDE]."""
    f = tl.arange(0, CHUNK)
    at_a = (outer.to(tl.int64) * A_STRIDE)[:, None] + f[None, :]
    at_b = (inner.to(tl.int64) * B_STRIDE)[:, None] + f[None, :]
    total = tl.zeros((outer.shape[0], inner.shape[0]), tl.float32)
    rest = total
    for start in range(0, F, CHUNK):
        ah, al = load_pair(a_high, a_low, at_a + start, None, PARTS)
        bh, bl = load_pair(b_high, b_low, at_b + start, None, PARTS)
        total, rest = add_product(total, rest, ah, al, tl.trans(bh), tl.trans(bl), PARTS)
    return joined(total, rest, PARTS)


@triton.jit
def _split_weights(w):
    """(high, low, 2^e [R, 1]) of weights [R, C], a power of two for each row."""
    inverse, scale = scales(tl.max(tl.abs(w), 1))
    high, low = to_pair(w * inverse[:, None])
    return high, low, scale[:, None]


@triton.jit
def _weighted_features(w_high, w_low, w_scale, b_high, b_low, PARTS: tl.constexpr):
    """w b, [R, C] times [C, DIMS]."""
    zeros = tl.zeros((w_high.shape[0], b_high.shape[1]), tl.float32)
    total, rest = add_product(zeros, zeros, w_high, w_low, b_high, b_low, PARTS)
    return joined(total, rest, PARTS) * w_scale


@triton.jit
def forward_kernel(
    x_high, x_low, x_scale, row_term, y_high, y_low, y_scale, z, origin, unit, min_precision,
    c, peak, log_sigma_ratio, exclude, partial_top, partial_total, partial_score,
    M, M_PADDED, K_PADDED, D, D_PADDED, F, SPAN, log_negligible,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, WHOLE: tl.constexpr, SCORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS rows against SPAN components: a split's top and total, and DIMS dimensions of its score.

    row_term is R above, c is c', and peak is c, the largest a that the component has anywhere.
    peak, log_sigma_ratio: None where there is no score, or no tile of it may be left out.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    top = tl.full((ROWS,), lowest(tl.float32), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    linear = tl.zeros((ROWS, DIMS if SCORE else 1), tl.float32)
    square = linear
    of_rows = tl.load(x_scale + rows)
    terms = tl.load(row_term + rows)
    if exclude is not None:
        excluded = tl.load(exclude + rows, rows < M, -1)
    if WHOLE:
        at = (rows.to(tl.int64) * F)[:, None] + dims[None, :]
        xh, xl = load_pair(x_high, x_low, at, None, PARTS)
        if SQUARES:
            xh2, xl2 = load_pair(x_high, x_low, at + D_PADDED, None, PARTS)
    for k in range(split * SPAN, tl.minimum(split * SPAN + SPAN, K_PADDED), COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        at = (columns.to(tl.int64) * F)[:, None] + dims[None, :]
        if WHOLE:
            main = tl.zeros((ROWS, COLUMNS), tl.float32)
            rest = main
            yh, yl = load_pair(y_high, y_low, at, None, PARTS)
            main, rest = add_product(main, rest, xh, xl, tl.trans(yh), tl.trans(yl), PARTS)
            if SQUARES:
                yh2, yl2 = load_pair(y_high, y_low, at + D_PADDED, None, PARTS)
                main, rest = add_product(main, rest, xh2, xl2, tl.trans(yh2), tl.trans(yl2), PARTS)
            a = joined(main, rest, PARTS)
        else:
            a = _features_product(x_high, x_low, y_high, y_low, rows, columns, F, F, F, CHUNK, PARTS)
        of_columns = tl.load(y_scale + columns)
        a = (a * of_columns[None, :]) * of_rows[:, None] + tl.load(c + columns)[None, :] + terms[:, None]
        if exclude is not None:
            a = tl.where(excluded[:, None] == columns[None, :], float("-inf"), a)
        top, total, shrink, p = absorb(top, total, a)
        if SCORE:
            linear *= shrink[:, None]
            square *= shrink[:, None]
            active = True
            if log_sigma_ratio is not None:
                ratio = tl.load(log_sigma_ratio + columns)
                active = is_active_in_score(a, tl.load(peak + columns), ratio, top + log_negligible)
            if active:
                wh, wl, w_scale = _split_weights(p * of_columns[None, :])
                if not WHOLE:
                    inside = (dims < D_PADDED)[None, :]
                    yh, yl = load_pair(y_high, y_low, at, inside, PARTS)
                    if SQUARES:
                        yh2, yl2 = load_pair(y_high, y_low, at + D_PADDED, inside, PARTS)
                linear += _weighted_features(wh, wl, w_scale, yh, yl, PARTS)
                if SQUARES:
                    square += _weighted_features(wh, wl, w_scale, yh2, yl2, PARTS)
    out = split.to(tl.int64) * M_PADDED + rows
    tl.store(partial_top + out, top)
    tl.store(partial_total + out, total)
    if SCORE:
        width = tl.num_programs(2) * DIMS
        inside = (rows < M)[:, None] & (dims < D)[None, :]
        inverse = reciprocal(tl.load(unit + dims, dims < D, 1.0))[None, :]
        least = tl.load(min_precision + dims, dims < D, 0.0)[None, :]
        centred = tl.load(z + (rows.to(tl.int64) * D)[:, None] + dims[None, :], inside, 0.0)
        centred = (centred - tl.load(origin + dims, dims < D, 0.0)[None, :]) * inverse
        score = (linear + centred * (2.0 * square - least * total[:, None])) * inverse
        tl.store(partial_score + (out * width)[:, None] + dims[None, :], score)


@triton.jit
def parameters_kernel(
    x_high, x_low, x_scale, row_term, y_high, y_low, y_scale, c, grad, log_prob, exclude, s0, s1, s2,
    M, M_PADDED, K_PADDED, D_PADDED, F, F_ROWS, SPAN, limit,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, WHOLE: tl.constexpr,
    NEED_S1: tl.constexpr, NEED_S2: tl.constexpr, DENSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """COLUMNS components against SPAN rows: S0, and DIMS dimensions of S1 and S2, which are of z' and not of z - mu.

    limit: the log r below which a pair is left out.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    sum0 = tl.zeros((COLUMNS,), tl.float32)
    sum1 = tl.zeros((COLUMNS, DIMS if NEED_S1 else 1), tl.float32)
    sum2 = tl.zeros((COLUMNS, DIMS if NEED_S2 else 1), tl.float32)
    of_columns = tl.load(y_scale + columns)
    constant = tl.load(c + columns)
    if WHOLE:
        at = (columns.to(tl.int64) * F)[:, None] + dims[None, :]
        yh, yl = load_pair(y_high, y_low, at, None, PARTS)
        if SQUARES:
            yh2, yl2 = load_pair(y_high, y_low, at + D_PADDED, None, PARTS)
    for m in range(split * SPAN, tl.minimum(split * SPAN + SPAN, M_PADDED), ROWS):
        rows = m + tl.arange(0, ROWS)
        at = (rows.to(tl.int64) * F_ROWS)[:, None] + dims[None, :]
        if WHOLE:
            main = tl.zeros((COLUMNS, ROWS), tl.float32)
            rest = main
            xh, xl = load_pair(x_high, x_low, at, None, PARTS)
            main, rest = add_product(main, rest, yh, yl, tl.trans(xh), tl.trans(xl), PARTS)
            if SQUARES or NEED_S2:
                xh2, xl2 = load_pair(x_high, x_low, at + D_PADDED, None, PARTS)
            if SQUARES:
                main, rest = add_product(main, rest, yh2, yl2, tl.trans(xh2), tl.trans(xl2), PARTS)
            a = joined(main, rest, PARTS)
        else:
            a = _features_product(y_high, y_low, x_high, x_low, columns, rows, F, F, F_ROWS, CHUNK, PARTS)
        of_rows = tl.load(x_scale + rows)
        a = (a * of_columns[:, None]) * of_rows[None, :] + constant[:, None] + tl.load(row_term + rows)[None, :]
        x = log_responsibility(a, log_prob, exclude, rows, columns, M)
        active = True
        if not DENSE:
            active = is_active(x, limit)
        if active:
            w = tl.load(grad + rows, rows < M, 0.0)[None, :] * responsibility(x)
            sum0 += tl.sum(w, 1)
            if NEED_S1:
                wh, wl, w_scale = _split_weights(w * of_rows[None, :])
                if not WHOLE:
                    inside = (dims < D_PADDED)[None, :]
                    xh, xl = load_pair(x_high, x_low, at, inside, PARTS)
                    if NEED_S2:
                        xh2, xl2 = load_pair(x_high, x_low, at + D_PADDED, inside, PARTS)
                sum1 += _weighted_features(wh, wl, w_scale, xh, xl, PARTS)
                if NEED_S2:
                    sum2 += _weighted_features(wh, wl, w_scale, xh2, xl2, PARTS)
    store_sums(s0, s1, s2, sum0, sum1, sum2, split.to(tl.int64) * K_PADDED + columns, dims, NEED_S1, NEED_S2)
