"""Small problems in one launch each way: sampling, log q and log p forward; all gradients backward.

A small problem is bound by launches.  So nothing is packed or merged here: the kernels of `small_forward.py` and
`small_backward.py` read the tensors as they are, and each program writes results that are complete.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import small_backward, small_forward, tiles

MAX_WORK = 2**24  # M K D: about where tiles of 128 x 128 are as fast, launches included; so offsets have 32 bits
MAX_READ = 2**16  # K D: what one program reads
MAX_DIMENSIONS = 256  # D
MULTIPROCESSORS = 132  # as many programs run before any takes a second row
MAX_ROWS = 4  # of a program: with more, a thread would load less than 16 bytes at a time
BACKWARD_ROWS = 16
ELEMENTS = 16  # of a tile, for each thread


def is_small(M: int, K: int, D: int) -> bool:
    """Whether M rows (over all samples) and K components of D dimensions are a small problem.

    With FASTVAE_TILES=1 no problem is: for the tests.
    """
    if os.environ.get("FASTVAE_TILES") == "1":
        return False
    return D <= MAX_DIMENSIONS and K * D <= MAX_READ and M * K * D <= MAX_WORK


class _Sizes(NamedTuple):
    """Sizes of a tile, as the kernels take them."""

    ROWS: int
    COLUMNS: int
    DIMS: int
    # Rows of q at a time: four elements a thread, in the layout of `gaussian.py`, so that log q has the same bits.
    SAMPLED: int
    num_warps: int


def _sizes(M: int, D: int, forward: bool) -> _Sizes:
    dims = max(4, tiles.next_power_of_2(D))
    warps = 8 if forward and dims <= 128 else 4  # 8 warps may share a row of 256, which has 4 in `gaussian.py`
    elements, sampled = ELEMENTS * 32 * warps, 4 * 32 * warps // dims
    if forward:
        rows = min(MAX_ROWS, sampled, tiles.next_power_of_2(tiles.cdiv(M, MULTIPROCESSORS)))
    else:
        rows = min(BACKWARD_ROWS, elements // dims)
    return _Sizes(rows, elements // (rows * dims), dims, sampled, warps)


class Sampled(NamedTuple):
    """What sampling needs: q and the seed, and where the KL of the samples goes."""

    mu: Tensor
    logvar: Tensor
    seed: Tensor
    kl: Tensor


def forward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    *,
    log_prob: Tensor | None = None,
    score: Tensor | None = None,
    grad: Tensor | None = None,
    sampled: Sampled | None = None,
) -> None:
    """Fill log_prob [N] and score [N, D], of which either may be None; the score times grad [N], if that is given.

    sampled: where it is given, z [N, D] is filled as well, and the KL.
    """
    (N, D), K = z.shape, len(mu)
    q_mu, q_logvar, seed, kl = sampled or (None, None, None, None)
    sizes = _sizes(N, D, forward=True)
    small_forward.forward_kernel[(tiles.cdiv(N, sizes.ROWS),)](
        q_mu, q_logvar, seed, z, kl, mu, logvar, log_weights, exclude, grad, log_prob, score,
        1 if q_mu is None else len(q_mu), N, K, D,
        QUADS=D % 4 == 0, SHARED=len(logvar) != K, **sizes._asdict(), enable_fp_fusion=True,
    )  # fmt: skip


class PosteriorGradients(NamedTuple):
    """What the gradients of q are made of, and where they go: dmu, dlogvar.  grad_z is None where z is not used."""

    grad_z: Tensor | None
    score: Tensor
    logvar: Tensor
    seed: Tensor
    dmu: Tensor
    dlogvar: Tensor


def backward(
    grad: Tensor,
    log_prob: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
    *,
    of_kl: bool = False,
    posterior: PosteriorGradients | None = None,
    path_derivative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of mu, logvar and log_weights; what is not needed has no elements.

    of_kl: grad is that of the KL, not of log p.  posterior: where it is given, the gradients of q are filled as well.
    A shared logvar's gradient is the sum of the components' own, which takes one more launch.
    """
    (N, D), K = z.shape, len(mu)
    need = need_mu, need_logvar, need_log_weights
    dmu, dlogvar, dlog_weights = (
        torch.empty_like(like) if needed else None for like, needed in zip((mu, mu, mu[:, 0]), need, strict=True)
    )
    sizes = _sizes(N, D, forward=False)
    blocks = tiles.cdiv(K, sizes.COLUMNS) if any(need) else 0
    M = len(posterior.logvar) if posterior is not None else 0
    if blocks + M:
        small_backward.backward_kernel[(blocks + tiles.cdiv(M, sizes.SAMPLED),)](
            grad, log_prob, z, mu, logvar, log_weights, exclude, dmu, dlogvar, dlog_weights,
            *(posterior or (None,) * 6), blocks, N // M if M else 0, M, N, K, D,
            OF_KL=of_kl, PATH=path_derivative, QUADS=D % 4 == 0, SHARED=len(logvar) != K, **sizes._asdict(),
            enable_fp_fusion=True,
        )  # fmt: skip
    if dlogvar is not None and len(logvar) != K:
        dlogvar = dlogvar.sum(0, keepdim=True)
    dmu, dlogvar, dlog_weights = (mu.new_empty(0) if d is None else d for d in (dmu, dlogvar, dlog_weights))
    return dmu, dlogvar, dlog_weights
