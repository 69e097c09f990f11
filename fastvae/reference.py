"""The specification: every operation in plain PyTorch, in any floating dtype, differentiable by autograd.

Tests and benchmarks compare the kernels with what stands here, in float64.  Nothing is fused and nothing is
saved: `mixture_log_prob` holds an array of M x K x D numbers.  The signatures are the public ones; `precision`,
`dense_backward` and `impl` are taken so that a call can be moved here unchanged, and change nothing.

With s = exp(-logvar / 2), t_mkd = (z_md - mu_kd) s_kd and
c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi:

    a_mk = c_k - 1/2 sum_d t_mkd^2        l_m = logsumexp_k a_mk        r_mk = exp(a_mk - l_m)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def component_log_prob(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None, exclude: Tensor | None = None
) -> Tensor:
    """a_mk = log w_k + log N(z_m; mu_k, exp(logvar_k)), [..., K].  A component of weight zero, or excluded, is -inf."""
    K, D = mu.shape
    if log_weights is None:
        log_weights = mu.new_full((K,), -math.log(K))
    absent = log_weights == -math.inf  # [K]
    mu = mu.masked_fill(absent[:, None], 0.0)  # whatever an absent component holds must reach nothing
    logvar = logvar.expand(K, D).masked_fill(absent[:, None], 0.0)
    t = (z[..., None, :] - mu) * torch.exp(-0.5 * logvar)  # [..., K, D]
    log_normal = -0.5 * (t.square().sum(-1) + logvar.sum(-1) + D * LOG_2PI)  # [..., K]
    a = (log_weights.masked_fill(absent, 0.0) + log_normal).masked_fill(absent, -math.inf)
    if exclude is not None:
        a = a.masked_fill(exclude[..., None] == torch.arange(K, device=a.device), -math.inf)
    return a


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    labels: Tensor | None = None,
    dense_backward: bool = False,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """log p(z) = logsumexp_k a_mk, [...]; see :func:`fastvae.mixture_log_prob`."""
    if labels is not None:
        assert log_weights is not None  # [L, K]
        each = [mixture_log_prob(z, mu, logvar, weights, exclude=exclude) for weights in log_weights]
        return torch.stack(each, -1).gather(-1, labels[..., None]).squeeze(-1)
    a = component_log_prob(z, mu, logvar, log_weights, exclude)  # [..., K]
    # torch.logsumexp of nothing but -inf has NaN gradients; such a row has density zero and no gradient.
    empty = (a == -math.inf).all(-1)
    return torch.logsumexp(a.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty, -math.inf)


def mixture_log_prob_and_score(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    labels: Tensor | None = None,
    dense_backward: bool = False,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p(z) [...], d log p(z) / dz [..., D]); see :func:`fastvae.mixture_log_prob_and_score`."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        weights = None if log_weights is None else log_weights.detach()
        log_prob = mixture_log_prob(leaf, mu.detach(), logvar.detach(), weights, exclude=exclude, labels=labels)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
    return mixture_log_prob(z, mu, logvar, log_weights, exclude=exclude, labels=labels), score


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One 64-bit seed, int64 [1], from the device's default generator or the given one."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def philox4x32(block: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 of the counter (block, 0) under the 64-bit key `seed`.

    Args:
        block: int64 [N], non-negative: the low half of the 128-bit counter.
        seed: int64 scalar; its low word is the first word of the key.

    Returns:
        int64 [N, 4], four words of 32 bits.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    mask = 0xFFFFFFFF

    def product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """High and low word of a * m, in halves that int64 can hold."""
        low, high = (a & 0xFFFF) * m, (a >> 16) * m
        return ((low >> 16) + high) >> 16, (a * m) & mask

    x0, x1 = block & mask, block >> 32
    x2 = x3 = torch.zeros_like(block)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        hi0, lo0 = product(x0, 0xD2511F53)
        hi1, lo1 = product(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([x0, x1, x2, x3], -1)


def philox_normal(seed: Tensor, start: int, count: int) -> Tensor:
    """Standard normal numbers `start` ... `start + count - 1` of the stream of `seed`, float64 [count].

    Block j of Philox gives numbers 4j ... 4j + 3: words (w, w') = (0, 1) make the first two, (2, 3) the others.  By
    Box-Muller, with u = (w + 1/2) 2^-32 and the angle 2 pi w' 2^-32, they are sqrt(-2 log u) times cosine and sine.
    """
    first = start // 4
    blocks = torch.arange(first, (start + count + 3) // 4, device=seed.device)
    words = philox4x32(blocks, seed.reshape(()))  # [N, 4]
    real = torch.float32 if seed.device.type == "mps" else torch.float64
    w, angle = words[:, 0::2], words[:, 1::2].to(real) * (2 * math.pi * 2.0**-32)  # [N, 2]
    # log u from whichever end of (0, 1) is nearer, so that neither loses digits
    log_u = torch.where(
        w < 2**31,
        torch.log((w.to(real) + 0.5) * 2.0**-32),
        torch.log1p((w - 0xFFFFFFFF).to(real) * 2.0**-32 - 2.0**-33),
    )
    radius = torch.sqrt(-2 * log_u)
    normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)  # [N, 2, 2]
    return normal.reshape(-1)[start - 4 * first :][:count]


def gaussian_rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    generator: torch.Generator | None = None,
    path_derivative: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, log q(z | x)); see :func:`fastvae.gaussian_rsample`.  The noise is that of every backend."""
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    seed = draw_seed(mu.device, generator)
    eps = philox_normal(seed, 0, math.prod(shape)).reshape(shape).to(mu.dtype)
    z = mu + torch.exp(0.5 * logvar) * eps
    if path_derivative:
        mu, logvar = mu.detach(), logvar.detach()
    t = (z - mu) * torch.exp(-0.5 * logvar)
    return z, -0.5 * (t.square() + logvar + LOG_2PI).sum(-1)


def gaussian_kl(mu: Tensor, logvar: Tensor, *, impl: str | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum_d (mu^2 + exp(logvar) - 1 - logvar), [...]."""
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar).sum(-1)


def mixture_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    log_weights: Tensor | None = None,
    num_samples: int | None = None,
    *,
    generator: torch.Generator | None = None,
    path_derivative: bool = False,
    exclude: Tensor | None = None,
    dense_backward: bool = False,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, log q(z | x) - log p(z)): one estimate of KL(q || p) a sample; see :func:`fastvae.mixture_kl`."""
    z, log_q = gaussian_rsample(mu, logvar, num_samples, generator=generator, path_derivative=path_derivative)
    return z, log_q - mixture_log_prob(z, prior_mu, prior_logvar, log_weights, exclude=exclude)
