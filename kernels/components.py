"""How kernels read the components: their weights and parameters, of which some may be absent, or the same for all.

A component is absent where its weight is -inf, and beyond the last one.  Its parameters may hold anything and are
read as zeros.
"""

import triton
import triton.language as tl

from .arithmetic import log

HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def log_weight(log_weights, k, K, dtype: tl.constexpr):
    """log w [k]; -log K where none are given, -inf beyond K."""
    if log_weights is None:
        value = -log(tl.full(k.shape, K, dtype))
    else:
        value = tl.load(log_weights + k, k < K, 0.0)
    return tl.where(k < K, value, float("-inf"))


@triton.jit
def tile_parameters(mu, logvar, absent, k, d, D, SHARED: tl.constexpr):
    """(mu, logvar, where a component is present) of a tile [k, d]."""
    present = (~absent)[:, None] & (d < D)[None, :]
    at = (k.to(tl.int64) * D)[:, None] + d[None, :]
    m = tl.load(mu + at, present, 0.0)
    if SHARED:
        lv = tl.where(present, tl.load(logvar + d, d < D, 0.0)[None, :], 0.0)
    else:
        lv = tl.load(logvar + at, present, 0.0)
    return m, lv, present


@triton.jit
def small_parameters(mu, logvar, log_w, k, d, K, D, WEIGHTED: tl.constexpr, SHARED: tl.constexpr):
    """(mu, logvar) of components k and dimensions d, which broadcast; a small problem's offsets have 32 bits.

    WEIGHTED: some may have a weight of -inf.  A shared logvar is that of absent components too.
    """
    inside = (k < K) & (d < D)
    at = k * D + d
    m = tl.load(mu + at, inside, 0.0)
    if SHARED:
        lv = tl.load(logvar + d, d < D, 0.0)
    else:
        lv = tl.load(logvar + at, inside, 0.0)
    if WEIGHTED:
        absent = log_w == float("-inf")
        m = tl.where(absent, 0.0, m)
        if not SHARED:
            lv = tl.where(absent, 0.0, lv)
    return m, lv
