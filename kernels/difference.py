"""precision="highest": the exact difference form, on the multiply-add units.

    a_mk = c_k - 1/2 sum_d ((z_md - mu_kd) s_kd)^2        s_kd = exp(-logvar_kd / 2)

This takes a subtraction, a product and a multiply-add for each row, component and dimension.  A tile of
rows x components loads its operands dimension by dimension.  So z, mu and s are packed with the dimension first, where
neighbouring rows and components are neighbours in memory, and padded, so that no load needs a mask.

The gradients are sums over the tile, for which t is computed again, dimension by dimension:

    score_md = -sum_k r t s     S1_kd = sum_m w t     S2_kd = sum_m w t^2     S0_k = sum_m w     t = (z_md - mu_kd) s_kd

The sums are of t and not of z - mu, so that w t^2 stays in float32's range at every sigma.
"""

import triton
import triton.language as tl

from .arithmetic import lowest
from .logsumexp import absorb, add_to_dimension, log_responsibility, responsibility, store_sums
from .skipping import is_active, is_active_in_score

UNROLL = tl.constexpr(4)  # D is padded to a multiple of it
# The t^2 of so many dimensions are added up one by one, and then the sums of such blocks are added up.  So the error of
# a sum of equal terms grows with BLOCK + D / BLOCK and not with D.
BLOCK = tl.constexpr(64)


@triton.jit
def _squares(
    outer, inner, scale_of_outer: tl.constexpr, outer_s, inner_s, OUTER_STEP, INNER_STEP, D, BLOCKS: tl.constexpr
):  # fmt: skip
    """sum_d ((outer_d - inner_d) s_d)^2, [outer, inner]; outer [outer, 1] and inner [1, inner] point to dimension 0.

    scale_of_outer: s is that of outer, at outer_s, and not that of inner, at inner_s.
    BLOCKS: whether D is above BLOCK.
    """
    if BLOCKS:
        total = tl.zeros((outer.shape[0], inner.shape[1]), outer.dtype.element_ty)
        for start in range(0, D, BLOCK):
            total += _squares_of_block(
                outer, inner, scale_of_outer, outer_s, inner_s, OUTER_STEP, INNER_STEP, tl.minimum(BLOCK, D - start)
            )
            outer += BLOCK * OUTER_STEP
            inner += BLOCK * INNER_STEP
            if scale_of_outer:
                outer_s += BLOCK * OUTER_STEP
            else:
                inner_s += BLOCK * INNER_STEP
    else:
        total = _squares_of_block(outer, inner, scale_of_outer, outer_s, inner_s, OUTER_STEP, INNER_STEP, D)
    return total


@triton.jit
def _squares_of_block(outer, inner, scale_of_outer: tl.constexpr, outer_s, inner_s, OUTER_STEP, INNER_STEP, D):
    """The sum over D dimensions, one by one.

    Loads are two-dimensional, so that they take the layout of the sum.  The sum starts as a matrix product of zeros:
    for that the compiler gives each thread blocks of 4 x 4, whose operands come four in one load.
    """
    R: tl.constexpr = outer.shape[0]
    C: tl.constexpr = inner.shape[1]
    dtype: tl.constexpr = outer.dtype.element_ty
    if dtype == tl.float32:
        total = tl.dot(tl.zeros((R, 16), dtype), tl.zeros((16, C), dtype), input_precision="ieee")
    else:
        total = tl.zeros((R, C), dtype)
    for _ in range(0, D, UNROLL):
        for _ in tl.static_range(UNROLL):
            u = tl.load(outer) - tl.load(inner)
            if scale_of_outer:
                t = u * tl.load(outer_s)
                outer_s += OUTER_STEP
            else:
                t = u * tl.load(inner_s)
                inner_s += INNER_STEP
            total += t * t
            outer += OUTER_STEP
            inner += INNER_STEP
    return total


@triton.jit
def forward_kernel(
    z, mu, s, c, log_sigma_ratio, exclude, partial_top, partial_total, partial_score,
    M, M_PADDED, K_PADDED, D, SPAN, log_negligible, SCORE: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """ROWS rows against SPAN components: a split's top and total, and DIMS dimensions of its score.

    log_sigma_ratio: None where there is no score, or no tile of it may be left out.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    top = tl.full((ROWS,), lowest(c.dtype.element_ty), c.dtype.element_ty)
    total = tl.zeros((ROWS,), c.dtype.element_ty)
    score = tl.zeros((ROWS, DIMS if SCORE else 1), c.dtype.element_ty)
    if exclude is not None:
        excluded = tl.load(exclude + rows, rows < M, -1)
    for k in range(split * SPAN, tl.minimum(split * SPAN + SPAN, K_PADDED), COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        mu_at, s_at = (mu + columns)[None, :], (s + columns)[None, :]
        square = _squares((z + rows)[:, None], mu_at, False, s_at, s_at, M_PADDED, K_PADDED, D, BLOCKS)
        a = tl.load((c + columns)[None, :]) - 0.5 * square
        if exclude is not None:
            a = tl.where(excluded[:, None] == columns[None, :], float("-inf"), a)
        top, total, shrink, p = absorb(top, total, a)
        if SCORE:
            score *= shrink[:, None]
            active = True
            if log_sigma_ratio is not None:
                peak, ratio = tl.load(c + columns), tl.load(log_sigma_ratio + columns)
                active = is_active_in_score(a, peak, ratio, top + log_negligible)
            if active:
                first = tl.program_id(2) * DIMS
                at = first.to(tl.int64)
                zp = (z + at * M_PADDED + rows)[:, None]
                mp, sp = mu_at + at * K_PADDED, s_at + at * K_PADDED
                for d in range(first, tl.minimum(first + DIMS, D)):
                    sd = tl.load(sp)
                    t = (tl.load(zp) - tl.load(mp)) * sd
                    score = add_to_dimension(score, dims, d, tl.sum(p * t * sd, 1))  # in this order: t s may overflow
                    zp += M_PADDED
                    mp += K_PADDED
                    sp += K_PADDED
    out = split.to(tl.int64) * M_PADDED + rows
    tl.store(partial_top + out, top)
    tl.store(partial_total + out, total)
    if SCORE:
        width = tl.num_programs(2) * DIMS
        tl.store(partial_score + (out * width)[:, None] + dims[None, :], -score)


@triton.jit
def parameters_kernel(
    z, mu, s, c, grad, log_prob, exclude, s0, s1, s2,
    M, M_PADDED, K_PADDED, D, SPAN, limit,
    NEED_S1: tl.constexpr, NEED_S2: tl.constexpr, DENSE: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """COLUMNS components against SPAN rows: S0, and DIMS dimensions of S1 and S2.

    The tile is transposed, components x rows, so that the sums over rows are within warps.
    limit: the log r below which a pair is left out.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    sum0 = tl.zeros((COLUMNS,), c.dtype.element_ty)
    sum1 = tl.zeros((COLUMNS, DIMS if NEED_S1 else 1), c.dtype.element_ty)
    sum2 = tl.zeros((COLUMNS, DIMS if NEED_S2 else 1), c.dtype.element_ty)
    constant = tl.load(c + columns)
    for m in range(split * SPAN, tl.minimum(split * SPAN + SPAN, M_PADDED), ROWS):
        rows = m + tl.arange(0, ROWS)
        mu_at, s_at = (mu + columns)[:, None], (s + columns)[:, None]
        square = _squares(mu_at, (z + rows)[None, :], True, s_at, s_at, K_PADDED, M_PADDED, D, BLOCKS)
        x = log_responsibility(constant[:, None] - 0.5 * square, log_prob, exclude, rows, columns, M)
        active = True
        if not DENSE:
            active = is_active(x, limit)
        if active:
            w = tl.load(grad + rows, rows < M, 0.0)[None, :] * responsibility(x)
            sum0 += tl.sum(w, 1)
            if NEED_S1:
                first = tl.program_id(2) * DIMS
                at = first.to(tl.int64)
                zp, mp, sp = (z + at * M_PADDED + rows)[None, :], mu_at + at * K_PADDED, s_at + at * K_PADDED
                for d in range(first, tl.minimum(first + DIMS, D)):
                    t = (tl.load(zp) - tl.load(mp)) * tl.load(sp)
                    wt = w * t
                    sum1 = add_to_dimension(sum1, dims, d, tl.sum(wt, 1))
                    if NEED_S2:
                        sum2 = add_to_dimension(sum2, dims, d, tl.sum(wt * t, 1))
                    zp += M_PADDED
                    mp += K_PADDED
                    sp += K_PADDED
    store_sums(s0, s1, s2, sum0, sum1, sum2, split.to(tl.int64) * K_PADDED + columns, dims, NEED_S1, NEED_S2)
