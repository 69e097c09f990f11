"""Which pairs of a row and a component the kernels leave out: the rule, for Triton.

csrc/common/skipping.h is the same rule for the CPU and CUDA; docs/concepts/skipping.md explains it.

Of a pair, a = log(w_k N(z_m; mu_k, sigma_k)) is the exponent, c the largest a that the component has anywhere (at its
mean), r = exp(a - l) the responsibility, and t = (z_d - mu_kd) / sigma_kd in any one dimension d.  A pair is left out
where a is below the limit of its row.

These kernels leave out whole tiles.  A tile is active if any of its pairs is not below its row's limit; an active tile
is computed with all of its pairs.
"""

import math

import torch
import triton
import triton.language as tl

# Forward compares with the largest terms that it has seen so far and not with l: two binary digits more to spare.
FORWARD_DIGITS = 2

LOG_3 = tl.constexpr(1.0986122886681098)
ONE_THIRD = tl.constexpr(1.0 / 3.0)


def log_negligible(K: int, dtype: torch.dtype, extra_digits: int = 0) -> float:
    """What is added to l for the limit of a row.

    In logsumexp and in the gradients of the parameters a pair counts r.  K pairs of r below 2^-digits / K are together
    less than a rounding of a row's total responsibility, which is 1.  A number of `dtype` has 24 or 53 binary digits,
    the leading one included.
    """
    digits = 1 - int(math.log2(torch.finfo(dtype).eps))
    return -math.log(K) - (digits + extra_digits) * math.log(2)


@triton.jit
def is_active(a, limit):
    """Whether a >= limit anywhere in a tile; a NaN counts, because it must not be left out."""
    return tl.max((~(a < limit)).to(tl.int32)) > 0


@triton.jit
def is_active_in_score(a, c, log_sigma_ratio, limit):
    """Whether a tile a [R, C] is active in the gradient in z; c and log_sigma_ratio [C], limit [R].

    In the gradient in z a pair counts r t / sigma.  Beside the component with the largest sigma of all in that
    dimension, sigma', it counts for t sigma' / sigma times its responsibility: the limit is lowered by
    log(sigma' / sigma), the component's log sigma ratio, and by log t.
    """
    max_log_sigma_ratio = tl.max(log_sigma_ratio, 0)
    lowered = limit - max_log_sigma_ratio - log_t_bound(limit, tl.max(c, 0), max_log_sigma_ratio)
    return is_active(a, lowered[:, None])


@triton.jit
def log_t_bound(limit, max_c, max_log_sigma_ratio):
    """A bound on log t, for components whose largest c and largest log sigma ratio are given.

    As c - a is a sum of t^2 / 2 over dimensions, t^2 <= 2 (c - a).  r t falls as a falls (where t > 1), so that t at
    the lowered limit bounds what is left out below it.  There c - a = A + log t, with
    A = c - limit + log sigma ratio, and t^2 = 2 (A + log t) < 3 A + 1.

    The header takes the power of two above 3 A + 1.  This is the logarithm of 3 A + 1 itself, which costs little: one
    for each row of a tile.  It is that of 3 (A + 1 / 3), because 3 A overflows where a row has seen no component yet.
    """
    A = tl.maximum(max_c - limit + max_log_sigma_ratio, 0.0)
    return 0.5 * (LOG_3 + tl.log(A + ONE_THIRD))
