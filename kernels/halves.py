"""A float32 number as two fp16 numbers, and products of such pairs on tensor cores.

    x = (high + 2^-11 low) 2^e        high = fp16(x 2^-e)        low = fp16(2^11 (x 2^-e - high))

The power of two 2^e is that of a row, a component, or a row of weights: it brings their largest number to [2^14, 2^15),
well inside fp16's range, which ends at 65504.  high has 11 binary digits and low the next 11, so a number is wrong by
2^-23 of itself, or, where low is subnormal, by 2^-36, which is at most 2^-50 of the largest.  Without the factor of
2^11 the second figure would be 2^-39: that is how far fp16's range reaches down.

Of a product of two pairs, high high is summed for itself, because tensor cores cut off what lies below the last digit
of a sum; the two mixed products are summed together, times 2^11; low low, at most 2^-22 of the product, is left out.
"""

import triton
import triton.language as tl

LOW_SCALE = tl.constexpr(2048.0)
INVERSE_LOW_SCALE = tl.constexpr(1.0 / 2048.0)


@triton.jit
def scales(largest):
    """(2^-e, 2^e) that bring `largest`, not negative, to [2^14, 2^15); a number below 2^-112 stays below that."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)  # with a bias of 127
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return inverse, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(power):
    """1 / power of a power of two: without a division, which a GPU rounds."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def to_pair(x):
    """(high, low) of x 2^-e."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW_SCALE).to(tl.float16)


@triton.jit
def load_pair(high, low, at, PARTS: tl.constexpr):
    """(high, low) at offsets; with one part, (high, high)."""
    first = tl.load(high + at)
    if PARTS == 2:
        second = tl.load(low + at)
    else:
        second = first
    return first, second


@triton.jit
def add_product(total, rest, a_high, a_low, b_high, b_low, PARTS: tl.constexpr):
    """a b added, [R, F] times [F, C], to the sums [R, C] of high high and of what is mixed; see `joined`."""
    total = tl.dot(a_high, b_high, total)
    if PARTS == 2:
        rest = tl.dot(a_low, b_high, rest)
        rest = tl.dot(a_high, b_low, rest)
    return total, rest


@triton.jit
def joined(total, rest, PARTS: tl.constexpr):
    """One number of the two sums of a product."""
    if PARTS == 2:
        total += rest * INVERSE_LOW_SCALE
    return total
