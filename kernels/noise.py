"""The normal numbers of a seed: Philox4x32-10 and Box-Muller, as `fastvae.reference.philox_normal` defines them.

Block j of Philox under the 64-bit seed gives numbers 4 j ... 4 j + 3 of the stream.  Its words are exact; what is made
of them is float32, whatever the dtype of the sample, and agrees with the specification to 1e-6.
"""

import triton
import triton.language as tl

from .arithmetic import scaled_log

TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
TWO_PI_2_TO_MINUS_32 = tl.constexpr(6.283185307179586 * 2.0**-32)


@triton.jit
def words(seed, block):
    """The four 32-bit words of Philox blocks (int64) under a 64-bit seed."""
    zero = tl.zeros(block.shape, tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def radius(w):
    """sqrt(-2 log u), u = (w + 1/2) 2^-32.  Near 1, u - 1 is taken from the complement of w, with all its digits."""
    u = (w.to(tl.float32) + 0.5) * TWO_TO_MINUS_32
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # u = m 2^e with m in [1 / sqrt 2, sqrt 2)
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    near_1 = ((w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -TWO_TO_MINUS_32
    log_u = scaled_log(tl.where(e == 0, near_1, m - 1.0), e)
    return tl.sqrt(-2.0 * log_u)


@triton.jit
def direction(w):
    """cos and sin of 2 pi w 2^-32; quadrant and remainder come from the bits of w, so the reduction is exact."""
    quadrant = ((w + 0x20000000) >> 30) & 3
    x = ((w << 2).to(tl.int32, bitcast=True) >> 2).to(tl.float32) * TWO_PI_2_TO_MINUS_32  # |x| <= pi / 4
    x2 = x * x
    c = tl.full(w.shape, 1.0, tl.float32)
    s = c
    for i in tl.static_range(4, 0, -1):  # Taylor, by Horner
        c = 1.0 - c * (x2 * (1.0 / (2 * i * (2 * i - 1))))
        s = 1.0 - s * (x2 * (1.0 / (2 * i * (2 * i + 1))))
    s = s * x
    swap = (quadrant & 1) != 0
    cos, sin = tl.where(swap, s, c), tl.where(swap, c, s)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def four_normals(seed, block):
    """Numbers 4 j ... 4 j + 3 of the stream, for each block j."""
    w0, w1, w2, w3 = words(seed, block)
    c, s = direction(w1)
    c2, s2 = direction(w3)
    r, r2 = radius(w0), radius(w2)
    return r * c, r * s, r2 * c2, r2 * s2


@triton.jit
def normals_of_quads(seed, block):
    """[R, Q] blocks -> [R, 4 Q] numbers, in order."""
    n0, n1, n2, n3 = four_normals(seed, block)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (block.shape[0], 4 * block.shape[1]))


@triton.jit
def normals(seed, index):
    """Number `index` (int64) of the stream, one by one: four times the work of `normals_of_quads`."""
    w0, w1, w2, w3 = words(seed, index >> 2)
    second = (index & 2) != 0
    cos, sin = direction(tl.where(second, w3, w1))
    return radius(tl.where(second, w2, w0)) * tl.where((index & 1) != 0, sin, cos)
