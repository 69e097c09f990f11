"""The online logsumexp of a row, responsibilities, and the sums over them that gradients are made of."""

import triton
import triton.language as tl


@triton.jit
def absorb(top, total, a):
    """Add terms a [R, C] to (top, total) [R]: top is the largest term so far, and the sum of exp is total exp(top).

    Returns (new top, new total, the factor by which earlier sums shrink [R], exp(a - new top) [R, C]).  top starts at
    the lowest number and not at -inf, because -inf minus -inf is NaN.  A NaN in a makes total NaN even where the
    maximum leaves it out.
    """
    new_top = tl.maximum(top, tl.max(a, 1))
    shrink = tl.exp(top - new_top)
    p = tl.exp(a - new_top[:, None])
    return new_top, total * shrink + tl.sum(p, 1), shrink, p


@triton.jit
def log_responsibility(a, log_prob, exclude, rows, columns, M):
    """a_mk - log p(z_m) of a tile a [columns, rows]; -inf where the component is excluded or the density is zero."""
    log_p = tl.load(log_prob + rows, rows < M, float("inf"))
    x = a - tl.where(log_p == float("-inf"), float("inf"), log_p)[None, :]
    if exclude is not None:
        x = tl.where(tl.load(exclude + rows, rows < M, -1)[None, :] == columns[:, None], float("-inf"), x)
    return x


@triton.jit
def responsibility(x):
    """exp(x), 0 where that is no normal number."""
    min_exponent: tl.constexpr = -708.0 if x.dtype == tl.float64 else -87.0
    return tl.where(x < min_exponent, 0.0, tl.exp(x))


@triton.jit
def add_to_dimension(totals, dims, d, values):
    """totals [R, DIMS] with values [R] added to the column of dimension d."""
    return totals + tl.where((dims == d)[None, :], values[:, None], 0.0)


@triton.jit
def store_sums(s0, s1, s2, sum0, sum1, sum2, at, dims, NEED_S1: tl.constexpr, NEED_S2: tl.constexpr):
    """Store the parameters' sums at offsets `at` of s0, and at dimensions `dims` of s1 and s2, if wanted."""
    if tl.program_id(2) == 0:
        tl.store(s0 + at, sum0)
    offsets = (at * (tl.num_programs(2) * dims.shape[0]))[:, None] + dims[None, :]
    if NEED_S1:
        tl.store(s1 + offsets, sum1)
    if NEED_S2:
        tl.store(s2 + offsets, sum2)
