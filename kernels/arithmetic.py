"""Elementary functions to about one unit in the last place, the same on every device, and compensated sums.

A GPU's fast instructions are too inaccurate here.  lg2.approx has no relative accuracy near 1, where the radius of a
normal number comes from.  ex2.approx(x log2 e) is wrong by |x| roundings, which is too much for a variance.  In float64
Triton's own functions are accurate, and used.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)  # with LN_2_LOW the sum is ln 2; n LN_2_HIGH is exact for |n| < 2^14
LN_2_LOW = tl.constexpr(-2.12194440e-4)
EXP_LIMIT = tl.constexpr(87.0)  # |x| beyond which float32 exp(x) leaves the normal numbers
LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
LOWEST_64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def exp(x):
    """exp(x) for |x| <= EXP_LIMIT; beyond, exp of the limit."""
    if x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        value, _ = exp_and_rest(x)
    return value


@triton.jit
def exp_and_rest(x):
    """(exp(x), exp(x) - 1 - x), the second without cancellation where x is small.

    With x = n ln 2 + r and q = e^r - 1 - r, by Taylor: exp(x) = 2^n (1 + r + q), and
    exp(x) - 1 - x = 2^n q + (2^n - 1) + (2^n r - x).
    """
    if x.dtype == tl.float64:
        # no relative accuracy below 1 but by the series, whose first 13 terms do for |x| < 1 / 2
        series = tl.full(x.shape, 1.0, x.dtype)
        for i in tl.static_range(15, 2, -1):
            series = 1.0 + series * (x / i)
        value = tl.exp(x)
        rest = tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, (value - 1.0) - x)
    else:
        inside = tl.minimum(tl.maximum(x, -EXP_LIMIT), EXP_LIMIT)
        n = tl.floor(inside * LOG2_E + 0.5)
        r = tl.fma(n, tl.full(x.shape, -LN_2_HIGH, x.dtype), inside)
        r = tl.fma(n, tl.full(x.shape, -LN_2_LOW, x.dtype), r)
        scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n
        series = tl.full(x.shape, 1.0, x.dtype)  # 2 (e^r - 1 - r) / r^2, |r| < 0.35
        for i in tl.static_range(7, 2, -1):
            series = 1.0 + series * (r * (1.0 / i))
        q = 0.5 * r * r * series
        value = scale * (q + r) + scale
        rest = scale * q + ((scale - 1.0) + (scale * r - x))
        value = tl.where(x == x, value, x)  # minimum and maximum may lose a NaN
        rest = tl.where(x == x, rest, x)
    return value, rest


@triton.jit
def log(x):
    """log(x) of positive x; -inf of 0; NaN of NaN."""
    if x.dtype == tl.float64:
        value = tl.log(x)
    else:  # and not after a return, because what follows one is compiled all the same
        bits = x.to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23  # x = m 2^e with m in [1 / sqrt 2, sqrt 2)
        m = (bits - (e << 23)).to(tl.float32, bitcast=True)
        value = scaled_log(m - 1.0, e)
        value = tl.where(x == 0.0, float("-inf"), value)
        value = tl.where((x == x) & (x != float("inf")), value, x)
    return value


@triton.jit
def log_near_1(f):
    """log(1 + f), float32, 1 / sqrt 2 <= 1 + f < sqrt 2: 2 artanh(f / (2 + f))."""
    s = f / (2.0 + f)
    s2 = s * s
    p = tl.full(f.shape, 1.0 / 11, f.dtype)
    for i in tl.static_range(9, 0, -2):
        p = p * s2 + 1.0 / i
    return 2.0 * s * p


@triton.jit
def scaled_log(f, e):
    """log((1 + f) 2^e), float32, 1 / sqrt 2 <= 1 + f < sqrt 2, e an integer."""
    # of two products the compiler could fuse either with the sum, and in two kernels would do so differently
    return tl.fma(e.to(tl.float32), tl.full(f.shape, LN_2, f.dtype), log_near_1(f))


@triton.jit
def add_compensated(total, compensation, x):
    """(total, compensation) with x added to total, and to compensation what that addition rounds off (Knuth's two-sum).

    A plain sum of D equal terms is off by D / 4 roundings: as long as the sum stays between two powers of 2, every
    addition rounds by the same amount in the same direction.
    """
    new_total = total + x
    added = new_total - total
    return new_total, compensation + ((total - (new_total - added)) + (x - added))


@triton.jit
def compensated_total(total, compensation):
    """What `add_compensated` has added up; the compensation of an infinite total is NaN, and is not added."""
    return total + tl.where(compensation == compensation, compensation, 0.0)


@triton.jit
def lowest(dtype: tl.constexpr):
    """Where a running maximum starts: not at -inf, because -inf minus -inf is NaN."""
    if dtype == tl.float64:
        return LOWEST_64
    else:
        return LOWEST_32
