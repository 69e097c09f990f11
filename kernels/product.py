"""precision="high" and "medium": the expansion as a matrix product, on tensor cores.

With z' = z - o and mu' = mu - o, o an origin near the components (`packing.py`), and v = exp(-logvar):

    a_mk = c'_k + sum_d [z'_d, z'_d^2] . [mu'_kd v_kd, -v_kd / 2]        c'_k = c_k - 1/2 sum_d mu'^2 v

so rows have features x [M, F], components have features p [K, F], and a = c' + x p^T.  Where all components share v,
the squares are one number for each row, and F is half as wide.  The gradients are products with the same features:

    score_md = G1 + 2 z' G2,  [G1, G2] = r p       [S1, S2] = w^T x     S0 = sum_m w

Operands are rounded to TF32 when they are packed: to one number ("medium"), or to the sum of two ("high"), whose three
largest products are added.  The tensor cores round operands no further, so that an interpreter shows the same errors.
TF32 operands must lie along the sum, hence features are also packed transposed where sums along both sides are needed.
"""

import triton
import triton.language as tl

from .arithmetic import exp, lowest, round_to_tf32
from .logsumexp import absorb, log_responsibility, responsibility, store_sums
from .skipping import is_active, is_active_in_score


@triton.jit
def _product(a_high, a_low, b_high, b_low, total, PARTS: tl.constexpr):
    """total + a b, small terms first."""
    if PARTS == 2:
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _features_product(a_high, a_low, b_high, b_low, outer, inner, F, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """sum_f a[outer, f] b[inner, f], both [., F]."""
    f = tl.arange(0, CHUNK)
    at_a, at_b = (outer.to(tl.int64) * F)[:, None] + f[None, :], (inner.to(tl.int64) * F)[:, None] + f[None, :]
    total = tl.zeros((outer.shape[0], inner.shape[0]), tl.float32)
    for start in range(0, F, CHUNK):
        ah, bh = tl.load(a_high + at_a + start), tl.trans(tl.load(b_high + at_b + start))
        if PARTS == 2:
            al, bl = tl.load(a_low + at_a + start), tl.trans(tl.load(b_low + at_b + start))
        else:
            al, bl = ah, bh
        total = _product(ah, al, bh, bl, total, PARTS)
    return total


@triton.jit
def _weighted_features(w, b_high, b_low, dims, inside, inner, STRIDE, total, PARTS: tl.constexpr):
    """total [R, DIMS] + sum_c w[r, c] b[dims, inner c], b [., STRIDE]."""
    at = (dims.to(tl.int64) * STRIDE)[:, None] + inner[None, :]
    w_high = round_to_tf32(w)
    bh = tl.trans(tl.load(b_high + at, inside[:, None], 0.0))
    if PARTS == 2:
        w_low, bl = round_to_tf32(w - w_high), tl.trans(tl.load(b_low + at, inside[:, None], 0.0))
    else:
        w_low, bl = w_high, bh
    return _product(w_high, w_low, bh, bl, total, PARTS)


@triton.jit
def forward_kernel(
    x_high, x_low, p_high, p_low, p_high_t, p_low_t, z, origin, row_term, c, peak, log_sigma_ratio,
    exclude, shared_logvar, partial_top, partial_total, partial_score,
    M, M_PADDED, K_PADDED, D, D_PADDED, F, SPAN, log_negligible,
    PARTS: tl.constexpr, SCORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS rows against SPAN components: a split's top and total, and DIMS dimensions of its score.

    c is c' above, and peak is c, the largest a that the component has anywhere.
    peak, log_sigma_ratio: None where there is no score, or no tile of it may be left out.
    shared_logvar: [D] where all components share it, else None; row_term [M]: what the squares then add to a.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    top = tl.full((ROWS,), lowest(tl.float32), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    linear = tl.zeros((ROWS, DIMS if SCORE else 1), tl.float32)
    square = linear
    if exclude is not None:
        excluded = tl.load(exclude + rows, rows < M, -1)
    if shared_logvar is not None:
        row_terms = tl.load(row_term + rows)
    for k in range(split * SPAN, tl.minimum(split * SPAN + SPAN, K_PADDED), COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        a = _features_product(x_high, x_low, p_high, p_low, rows, columns, F, CHUNK, PARTS)
        a += tl.load(c + columns)[None, :]
        if shared_logvar is not None:
            a += row_terms[:, None]
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
                inside = dims < D_PADDED
                linear = _weighted_features(p, p_high_t, p_low_t, dims, inside, columns, K_PADDED, linear, PARTS)
                if shared_logvar is None:
                    square = _weighted_features(
                        p, p_high_t, p_low_t, D_PADDED + dims, inside, columns, K_PADDED, square, PARTS
                    )
    out = split.to(tl.int64) * M_PADDED + rows
    tl.store(partial_top + out, top)
    tl.store(partial_total + out, total)
    if SCORE:
        width = tl.num_programs(2) * DIMS
        at = (rows.to(tl.int64) * D)[:, None] + dims[None, :]
        inside = (rows < M)[:, None] & (dims < D)[None, :]
        centred = tl.load(z + at, inside, 0.0) - tl.load(origin + dims, dims < D, 0.0)[None, :]
        if shared_logvar is not None:
            v = exp(-tl.load(shared_logvar + dims, dims < D, 0.0))
            square = -0.5 * total[:, None] * v[None, :]
        tl.store(partial_score + (out * width)[:, None] + dims[None, :], linear + 2.0 * centred * square)


@triton.jit
def parameters_kernel(
    x_high, x_low, x_high_t, x_low_t, p_high, p_low, row_term, c, grad, log_prob, exclude, s0, s1, s2,
    M, M_PADDED, K_PADDED, D_PADDED, F, SPAN, limit,
    PARTS: tl.constexpr, NEED_S1: tl.constexpr, NEED_S2: tl.constexpr, DENSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """COLUMNS components against SPAN rows: S0, and DIMS dimensions of S1 and S2, which are of z' and not of z - mu.

    limit: the log r below which a pair is left out.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    inside = dims < D_PADDED
    sum0 = tl.zeros((COLUMNS,), tl.float32)
    sum1 = tl.zeros((COLUMNS, DIMS if NEED_S1 else 1), tl.float32)
    sum2 = tl.zeros((COLUMNS, DIMS if NEED_S2 else 1), tl.float32)
    constant = tl.load(c + columns)
    for m in range(split * SPAN, tl.minimum(split * SPAN + SPAN, M_PADDED), ROWS):
        rows = m + tl.arange(0, ROWS)
        x = _features_product(p_high, p_low, x_high, x_low, columns, rows, F, CHUNK, PARTS) + constant[:, None]
        if row_term is not None:
            x += tl.load(row_term + rows)[None, :]
        x = log_responsibility(x, log_prob, exclude, rows, columns, M)
        active = True
        if not DENSE:
            active = is_active(x, limit)
        if active:
            w = tl.load(grad + rows, rows < M, 0.0)[None, :] * responsibility(x)
            sum0 += tl.sum(w, 1)
            if NEED_S1:
                sum1 = _weighted_features(w, x_high_t, x_low_t, dims, inside, rows, M_PADDED, sum1, PARTS)
            if NEED_S2:
                sum2 = _weighted_features(w, x_high_t, x_low_t, D_PADDED + dims, inside, rows, M_PADDED, sum2, PARTS)
    store_sums(s0, s1, s2, sum0, sum1, sum2, split.to(tl.int64) * K_PADDED + columns, dims, NEED_S1, NEED_S2)
