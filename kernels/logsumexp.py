"""The online logsumexp of a row, responsibilities and their sums, and which tiles may be left out of a gradient."""

import triton
import triton.language as tl

TOUCHES = tl.constexpr(64.0)  # the t^2 at which the bound on log t below is log t
REACH_CONSTANT = tl.constexpr(0.5 * (4.1588830833596715 - 1.0))  # (log 64 - 1) / 2


@triton.jit
def absorb(top, total, a):
    """Terms a [R, C] into (top, total) [R], sum exp = total exp(top).

    Returns (new top, new total, what earlier sums shrink by [R], exp(a - new top) [R, C]).  top starts at the lowest
    number, not at -inf, so that no -inf meets another.  A NaN in a reaches total whatever a maximum does with it.
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
    least: tl.constexpr = -708.0 if x.dtype == tl.float64 else -87.0
    return tl.where(x < least, 0.0, tl.exp(x))


@triton.jit
def any_at_least(value, limit):
    """Whether value >= limit anywhere in a tile; a NaN counts, because it must not be left out."""
    return tl.max((~(value < limit)).to(tl.int32)) > 0


@triton.jit
def score_matters(a, reach, limit):
    """Whether a tile [R, C] can matter to the score of its rows.

    A term counts there r t / sigma, t = sqrt(2 (c - a)) at most: next to the widest component's, sigma'/sigma times as
    much (its steepness), and t times.  log t <= t^2 / (2 * 64) + (log 64 - 1) / 2, so that with

        reach_k = c_k / 64 + log steepness_k + (log 64 - 1) / 2

    a (1 - 1 / 64) + reach bounds a + log(steepness t).
    """
    return any_at_least(a * (1.0 - 1.0 / TOUCHES) + reach[None, :], limit[:, None])


@triton.jit
def column(totals, dims, d, values):
    """totals [R, DIMS] with values [R] added to the column of dimension d."""
    return totals + tl.where((dims == d)[None, :], values[:, None], 0.0)


@triton.jit
def store_sums(s0, s1, s2, sum0, sum1, sum2, at, dims, NEED_S1: tl.constexpr, NEED_S2: tl.constexpr):
    """The parameters' sums to places `at` of s0, and to dimensions `dims` there of s1 and s2 where they are wanted."""
    if tl.program_id(2) == 0:
        tl.store(s0 + at, sum0)
    places = (at * (tl.num_programs(2) * dims.shape[0]))[:, None] + dims[None, :]
    if NEED_S1:
        tl.store(s1 + places, sum1)
    if NEED_S2:
        tl.store(s2 + places, sum2)
