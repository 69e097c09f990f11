"""precision="high" and "medium": the expansion as a matrix product of fp16 numbers, on tensor cores.

With z' = (z - o) / u and mu' = (mu - o) / u, o an origin near the components and u a unit, a power of two, for each
dimension (`packing.py`), v = u^2 exp(-logvar), and v0_d the least v of any component:

    a_mk = c'_k + R_m + sum_d [z'_d, z'_d^2] . [mu'_kd v_kd, -(v_kd - v0_d) / 2]
    c'_k = c_k - 1/2 sum_d mu'_kd^2 v_kd        R_m = -1/2 sum_d z'_d^2 v0_d

so rows have features x [M, F], components have features y [K, F], and a = c' + R + x y^T.  Where all components share
v, the squares of z' have no features, and F is half as wide.  The gradients are products with the same features:

    score_md = (G1 + z' (2 G2 - v0)) / u,  [G1, G2] = r y       [S1, S2] = w^T x     S0 = sum_m w

The features of a row are one power of two times pairs of fp16 numbers ("high") or single ones ("medium"), and so are
those of a component (`halves.py`).  In the gradients' products the weights are split in the same way: each row of a
tile of weights, with the powers of two of the features in it, has one of its own.  Nothing else is rounded to fp16.

Features lie slice by slice: the z' of DIMS dimensions, then their squares, then those of the next slice.  A program
sums the gradients of one slice.  Where there is only one (WHOLE), it loads its own side's features once, and those of
the other side once for both products.  Otherwise a is summed over chunks of features, and the slice is loaded again.
"""

import triton
import triton.language as tl

from .arithmetic import lowest
from .halves import add_product, joined, load_pair, scales, to_pair
from .logsumexp import absorb, log_responsibility, responsibility, store_sums
from .skipping import is_active, is_active_in_score

CHUNK = tl.constexpr(64)  # features at a time, where there are several slices


@triton.jit
def _exponents(a_high, a_low, b_high, b_low, outer, inner, F, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """sum_f a[outer, f] b[inner, f], both [., F], by chunks of features."""
    STEP: tl.constexpr = min(CHUNK, WIDTH)
    f = tl.arange(0, STEP)
    at_a, at_b = (outer.to(tl.int64) * F)[:, None] + f[None, :], (inner.to(tl.int64) * F)[:, None] + f[None, :]
    total = tl.zeros((outer.shape[0], inner.shape[0]), tl.float32)
    rest = total
    for start in range(0, F, STEP):
        ah, al = load_pair(a_high, a_low, at_a + start, PARTS)
        bh, bl = load_pair(b_high, b_low, at_b + start, PARTS)
        total, rest = add_product(total, rest, ah, al, tl.trans(bh), tl.trans(bl), PARTS)
    return joined(total, rest, PARTS)


@triton.jit
def _product(a_high, a_low, b_high, b_low, PARTS: tl.constexpr):
    """a b, [R, I] times [I, C]."""
    total = tl.zeros((a_high.shape[0], b_high.shape[1]), tl.float32)
    total, rest = add_product(total, total, a_high, a_low, b_high, b_low, PARTS)
    return joined(total, rest, PARTS)


@triton.jit
def _weighted_features(w, b_high, b_low, PARTS: tl.constexpr):
    """w b, [R, C] times [C, WIDTH]; each row of w has a power of two of its own."""
    inverse, scale = scales(tl.max(tl.abs(w), 1))
    w_high, w_low = to_pair(w * inverse[:, None])
    return _product(w_high, w_low, b_high, b_low, PARTS) * scale[:, None]


@triton.jit
def _linear_and_square(sums, SQUARES: tl.constexpr):
    """The two halves of [R, WIDTH]; without squares, the second is zero."""
    if SQUARES:
        halves = tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2))
        linear, square = tl.split(tl.permute(halves, (0, 2, 1)))
    else:
        linear, square = sums, tl.zeros_like(sums)
    return linear, square


@triton.jit
def forward_kernel(
    x_high, x_low, x_scale, row_term, y_high, y_low, y_scale, c, peak, log_sigma_ratio, exclude,
    partial_top, partial_total, partial_score, M, M_PADDED, K_PADDED, F, SPAN, log_negligible,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, WHOLE: tl.constexpr, SCORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows against SPAN components: a split's top and total, and G1 and G2 of a slice.

    row_term is R above, c is c', and peak is c, the largest a that the component has anywhere.
    peak, log_sigma_ratio: None where there is no score, or no tile of it may be left out.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    WIDTH: tl.constexpr = 2 * DIMS if SQUARES else DIMS
    features = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    top = tl.full((ROWS,), lowest(tl.float32), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH if SCORE else 1), tl.float32)
    of_rows = tl.load(x_scale + rows)[:, None]
    terms = tl.load(row_term + rows)[:, None]
    if exclude is not None:
        excluded = tl.load(exclude + rows, rows < M, -1)
    if WHOLE:
        xh, xl = load_pair(x_high, x_low, (rows.to(tl.int64) * F)[:, None] + features[None, :], PARTS)
    for k in tl.range(split * SPAN, tl.minimum(split * SPAN + SPAN, K_PADDED), COLUMNS, num_stages=STAGES):
        columns = k + tl.arange(0, COLUMNS)
        at_y = (columns.to(tl.int64) * F)[:, None] + features[None, :]
        if WHOLE:
            yh, yl = load_pair(y_high, y_low, at_y, PARTS)
            a = _product(xh, xl, tl.trans(yh), tl.trans(yl), PARTS)
        else:
            a = _exponents(x_high, x_low, y_high, y_low, rows, columns, F, WIDTH, PARTS)
        of_columns = tl.load(y_scale + columns)[None, :]
        a = a * of_columns * of_rows + tl.load(c + columns)[None, :] + terms
        if exclude is not None:
            a = tl.where(excluded[:, None] == columns[None, :], float("-inf"), a)
        top, total, shrink, p = absorb(top, total, a)
        if SCORE:
            sums *= shrink[:, None]
            active = True
            if log_sigma_ratio is not None:
                ratio = tl.load(log_sigma_ratio + columns)
                active = is_active_in_score(a, tl.load(peak + columns), ratio, top + log_negligible)
            if active:
                if not WHOLE:
                    yh, yl = load_pair(y_high, y_low, at_y, PARTS)
                sums += _weighted_features(p * of_columns, yh, yl, PARTS)
    out = split.to(tl.int64) * M_PADDED + rows
    tl.store(partial_top + out, top)
    tl.store(partial_total + out, total)
    if SCORE:
        tl.store(partial_score + (out * F)[:, None] + features[None, :], sums)


@triton.jit
def parameters_kernel(
    x_high, x_low, x_scale, row_term, y_high, y_low, y_scale, c, grad, log_prob, exclude, s0, s1, s2,
    M, M_PADDED, K_PADDED, F, SPAN, limit,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, WHOLE: tl.constexpr,
    NEED_S1: tl.constexpr, NEED_S2: tl.constexpr, DENSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS components against SPAN rows: S0, and DIMS dimensions of S1 and S2, which are of z' and not of z - mu.

    limit: the log r below which a pair is left out.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    WIDTH: tl.constexpr = 2 * DIMS if SQUARES else DIMS
    features = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    sum0 = tl.zeros((COLUMNS,), tl.float32)
    sums = tl.zeros((COLUMNS, WIDTH if NEED_S1 else 1), tl.float32)
    of_columns = tl.load(y_scale + columns)[:, None]
    constants = tl.load(c + columns)[:, None]
    if WHOLE:
        yh, yl = load_pair(y_high, y_low, (columns.to(tl.int64) * F)[:, None] + features[None, :], PARTS)
    for m in tl.range(split * SPAN, tl.minimum(split * SPAN + SPAN, M_PADDED), ROWS, num_stages=STAGES):
        rows = m + tl.arange(0, ROWS)
        at_x = (rows.to(tl.int64) * F)[:, None] + features[None, :]
        if WHOLE:
            xh, xl = load_pair(x_high, x_low, at_x, PARTS)
            a = _product(yh, yl, tl.trans(xh), tl.trans(xl), PARTS)
        else:
            a = _exponents(y_high, y_low, x_high, x_low, columns, rows, F, WIDTH, PARTS)
        of_rows = tl.load(x_scale + rows)[None, :]
        a = a * of_columns * of_rows + constants + tl.load(row_term + rows)[None, :]
        x = log_responsibility(a, log_prob, exclude, rows, columns, M)
        active = True
        if not DENSE:
            active = is_active(x, limit)
        g = tl.load(grad + rows, rows < M, 0.0)[None, :]  # here, because what is loaded under a condition is waited for
        if active:
            w = g * responsibility(x)
            sum0 += tl.sum(w, 1)
            if NEED_S1:
                if not WHOLE:
                    xh, xl = load_pair(x_high, x_low, at_x, PARTS)
                sums += _weighted_features(w * of_rows, xh, xl, PARTS)
    sum1, sum2 = _linear_and_square(sums, SQUARES and NEED_S1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    store_sums(s0, s1, s2, sum0, sum1, sum2, split.to(tl.int64) * K_PADDED + columns, dims, NEED_S1, NEED_S2)
