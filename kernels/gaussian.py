"""Sampling diagonal Gaussians with their log density, and the KL to N(0, I).

    z = mu + sigma eps      log q = -1/2 sum_d (eps^2 + logvar + log 2 pi)
    dmu = sum_s g_z         dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q)

or, where log q is differentiated along the path of z alone, d log q / dz = -eps / sigma:

    dmu = sum_s (g_z - g_log_q eps / sigma)      dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q eps^2)

    KL = 1/2 sum_d (mu^2 + exp(logvar) - 1 - logvar)

Tensors are contiguous: mu, logvar [M, D], z [S, M, D].  All kernels are bound by memory.  A program takes a tile of
whole rows, and a wide row piece by piece.  Backward draws the noise again from the seed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import exp, exp_and_rest
from .launch import on_device_of
from .noise import normals, normals_of_quads

LOG_2_PI = tl.constexpr(1.8378770664093453)
ELEMENTS = 2048  # of a tile: 16 for each thread
MAX_PIECE = 1024  # of a row, that a tile holds


@triton.jit
def noise_of_rows(seed, first, QUADS: tl.constexpr, DIMS: tl.constexpr):
    """Numbers first ... first + DIMS - 1 of the stream, for each first; QUADS: all of first are multiples of 4."""
    if QUADS:
        return normals_of_quads(seed, (first >> 2)[:, None] + tl.arange(0, DIMS // 4)[None, :])
    else:
        return normals(seed, first[:, None] + tl.arange(0, DIMS)[None, :])


@triton.jit
def sample_rows(mu, logvar, seed, z, row, end, M, D, QUADS: tl.constexpr, DIMS: tl.constexpr):
    """Write the rows (int64) of z that are below `end`, and return their log q."""
    if QUADS:
        D = D // 4 * 4  # tells the compiler that rows start at multiples of 16 bytes
    at_q = (row % M) * D
    key = tl.load(seed)
    total = tl.zeros((row.shape[0], DIMS), mu.dtype.element_ty)
    for d in range(0, D, DIMS):
        dims = d + tl.arange(0, DIMS)
        inside = (row < end)[:, None] & (dims < D)[None, :]
        at = at_q[:, None] + dims[None, :]
        m = tl.load(mu + at, inside, 0.0)
        lv = tl.load(logvar + at, inside, 0.0)
        eps = noise_of_rows(key, row * D + d, QUADS, DIMS).to(m.dtype)
        tl.store(z + (row * D)[:, None] + dims[None, :], m + exp(0.5 * lv) * eps, inside)
        total += tl.where(inside, eps * eps + lv, 0.0)
    return -0.5 * (tl.sum(total, 1) + D * tl.full((row.shape[0],), LOG_2_PI, total.dtype))


@triton.jit
def sample_kernel(mu, logvar, seed, z, log_q, M, D, N, QUADS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """ROWS of the N = S M rows of z."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(log_q + row, sample_rows(mu, logvar, seed, z, row, N, M, D, QUADS, DIMS), row < N)


@triton.jit
def sample_gradients(g_z, g_q, eps, sigma, PATH: tl.constexpr):
    """What one sample adds to dmu, and to 2 dlogvar."""
    if PATH:
        by_path = g_q * eps
        # the fused product is named: in another kernel the compiler might fuse the other
        return g_z - by_path / sigma, eps * tl.fma(g_z, sigma, -by_path)
    else:
        return g_z, g_z * sigma * eps - g_q


@triton.jit
def sample_backward_kernel(
    grad_z, grad_log_q, logvar, seed, dmu, dlogvar, S, M, D,
    PATH: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Tile (program_id(0), program_id(1)) of rows and dimensions, over all S samples."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DIMS
    dims = d + tl.arange(0, DIMS)
    inside = (m < M)[:, None] & (dims < D)[None, :]
    at = (m * D)[:, None] + dims[None, :]
    key = tl.load(seed)
    sigma = exp(0.5 * tl.load(logvar + at, inside, 0.0))
    sum_mu = tl.zeros((ROWS, DIMS), sigma.dtype)
    sum_logvar = sum_mu
    row = m
    for _ in range(0, S):
        g_z = tl.load(grad_z + (row * D)[:, None] + dims[None, :], inside, 0.0)
        g_q = tl.load(grad_log_q + row, m < M, 0.0)[:, None]
        eps = noise_of_rows(key, row * D + d, QUADS, DIMS).to(sigma.dtype)
        add_mu, add_logvar = sample_gradients(g_z, g_q, eps, sigma, PATH)
        sum_mu += add_mu
        sum_logvar += add_logvar
        row += M
    tl.store(dmu + at, sum_mu, inside)
    tl.store(dlogvar + at, 0.5 * sum_logvar, inside)


@triton.jit
def kl_kernel(mu, logvar, kl, M, D, ROWS: tl.constexpr, DIMS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, DIMS), mu.dtype.element_ty)
    for d in range(0, D, DIMS):
        dims = d + tl.arange(0, DIMS)
        inside = (row < M)[:, None] & (dims < D)[None, :]
        at = (row * D)[:, None] + dims[None, :]
        m = tl.load(mu + at, inside, 0.0)
        _, rest = exp_and_rest(tl.load(logvar + at, inside, 0.0))  # 0 where there is nothing
        total += m * m + rest
    tl.store(kl + row, 0.5 * tl.sum(total, 1), row < M)


@triton.jit
def kl_backward_kernel(grad, mu, logvar, dmu, dlogvar, M, D, ROWS: tl.constexpr, DIMS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside = (row < M)[:, None] & (dims < D)[None, :]
    at = (row * D)[:, None] + dims[None, :]
    g = tl.load(grad + row, row < M, 0.0)[:, None]
    lv = tl.load(logvar + at, inside, 0.0)
    _, rest = exp_and_rest(lv)
    tl.store(dmu + at, g * tl.load(mu + at, inside, 0.0), inside)
    tl.store(dlogvar + at, 0.5 * g * (rest + lv), inside)


def _tile(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a tile: DIMS a power of two of at least 4, ROWS the rest of ELEMENTS; half of them in float64."""
    dims = max(4, min(MAX_PIECE, triton.next_power_of_2(D)))
    elements = ELEMENTS // 2 if dtype == torch.float64 else ELEMENTS
    return {"ROWS": max(1, elements // dims), "DIMS": dims}


@on_device_of(0)
def gaussian_rsample(mu: Tensor, logvar: Tensor, seed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    M, D = mu.shape
    z, log_q = mu.new_empty(num_samples, M, D), mu.new_empty(num_samples, M)
    if log_q.numel():
        tile, rows = _tile(D, mu.dtype), num_samples * M
        sample_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            mu, logvar, seed, z, log_q, M, D, rows, QUADS=D % 4 == 0, **tile, enable_fp_fusion=True
        )
    return z, log_q


@on_device_of(0)
def gaussian_rsample_backward(
    grad_z: Tensor, grad_log_q: Tensor, logvar: Tensor, seed: Tensor, path_derivative: bool
) -> tuple[Tensor, Tensor]:
    (M, D), S = logvar.shape, grad_z.shape[0]
    dmu, dlogvar = torch.empty_like(logvar), torch.empty_like(logvar)
    if M:
        tile = _tile(D, logvar.dtype)
        sample_backward_kernel[(triton.cdiv(M, tile["ROWS"]), triton.cdiv(D, tile["DIMS"]))](
            grad_z, grad_log_q, logvar, seed, dmu, dlogvar, S, M, D, PATH=path_derivative, QUADS=D % 4 == 0, **tile,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dmu, dlogvar


@on_device_of(0)
def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    M, D = mu.shape
    kl = mu.new_empty(M)
    if M:
        tile = _tile(D, mu.dtype)
        kl_kernel[(triton.cdiv(M, tile["ROWS"]),)](mu, logvar, kl, M, D, **tile)
    return kl


@on_device_of(0)
def gaussian_kl_backward(grad: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    M, D = mu.shape
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(mu)
    if M:
        tile = _tile(D, mu.dtype)
        kl_backward_kernel[(triton.cdiv(M, tile["ROWS"]), triton.cdiv(D, tile["DIMS"]))](
            grad, mu, logvar, dmu, dlogvar, M, D, **tile
        )
    return dmu, dlogvar
