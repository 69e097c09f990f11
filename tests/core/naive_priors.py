"""Mixture densities as people write them, with one switch for each known mistake; float32, eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal, StudentT


def normal(mu: Tensor, s: Tensor) -> Normal:
    return Normal(mu, s, validate_args=False)  # which would refuse NaN


# name of the mistake -> (the part of the density that it is in, another way to write that part)
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "variance-as-scale": lambda logvar: logvar.exp(),
    "scale-as-variance": lambda logvar: (0.5 * logvar).exp().sqrt(),
    "log-variance-as-scale": lambda logvar: logvar,
    "inverted-variance": lambda logvar: (-logvar).exp().sqrt(),
    "tanh-of-log-variance": lambda logvar: (0.5 * logvar.tanh()).exp(),
    "variance-ignored": torch.ones_like,
}
NORMALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "half-forgotten": lambda z, mu, s: -(((z - mu) / s) ** 2) - s.log() - 0.5 * math.log(2 * math.pi),
    "sign-of-square": lambda z, mu, s: ((z - mu) / s) ** 2 / 2 - s.log() - 0.5 * math.log(2 * math.pi),
    "student-t": lambda z, mu, s: StudentT(3.0, mu, s, validate_args=False).log_prob(z),
    "log-2pi-dropped": lambda z, mu, s: normal(mu, s).log_prob(z) + 0.5 * math.log(2 * math.pi),
    "log-2pi-once": lambda z, mu, s: normal(mu, s).log_prob(z) + (1 - 1 / z.shape[-1]) * 0.5 * math.log(2 * math.pi),
    "log-determinant-dropped": lambda z, mu, s: normal(mu, s).log_prob(z) + s.log(),
    "log-determinant-doubled": lambda z, mu, s: normal(mu, s).log_prob(z) - s.log(),
    "sign-of-log-determinant": lambda z, mu, s: normal(mu, s).log_prob(z) + 2 * s.log(),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "weights-missing": torch.zeros_like,
    "weights-ignored": lambda w: torch.full_like(w, -math.log(len(w))),
    "weights-as-logits": lambda w: torch.log_softmax(w / w.sum(), 0),
    "weights-unnormalised": lambda w: w.log(),
}
# n [M, K, D] log normals, log_w [K] -> [M]
STRUCTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product-of-mixtures": lambda n, log_w: (n + log_w[:, None]).logsumexp(1).sum(-1),
    "mean-of-logs": lambda n, log_w: (log_w.exp() * n.sum(-1)).sum(-1),
    "sum-of-logs": lambda n, log_w: (log_w + n.sum(-1)).sum(-1),
    "largest-component": lambda n, log_w: (log_w + n.sum(-1)).amax(-1),
    "mean-over-dimensions": lambda n, log_w: (log_w + n.mean(-1)).logsumexp(-1),
    "underflow": lambda n, log_w: (log_w + n.sum(-1)).exp().sum(-1).log(),
    "floor": lambda n, log_w: ((log_w + n.sum(-1)).exp().sum(-1) + 1e-30).log(),
    "sum-over-components-forgotten": lambda n, log_w: log_w + n.sum(-1),
    "sum-over-dimensions-forgotten": lambda n, log_w: (n + log_w[:, None]).logsumexp(1),
}
OUTPUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "negated": lambda log_p, D: -log_p,
    "density-not-log": lambda log_p, D: log_p.exp(),
    "bits": lambda log_p, D: log_p / math.log(2),
    "divided-by-dimensions": lambda log_p, D: log_p / D,
    "trailing-dimension": lambda log_p, D: log_p[..., None],
    "reduced-over-batch": lambda log_p, D: log_p.mean(),
    "nan-hidden": lambda log_p, D: log_p.nan_to_num(),
    "spreads-over-the-batch": lambda log_p, D: (
        log_p
        + 0.0 * log_p.detach().nan_to_num(posinf=0, neginf=0).max()
        + torch.where(log_p.isnan().any(), torch.nan, 0.0)
    ),
    "gradient-detached": lambda log_p, D: log_p.detach(),
    "gradient-wrong": lambda log_p, D: 0.5 * log_p + 0.5 * log_p.detach(),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half-precision": lambda x: x.bfloat16(),
}
GROUPS = (SCALES, NORMALS, WEIGHTS, STRUCTURES, OUTPUTS, INPUTS)
NAMES = [name for group in GROUPS for name in group]


def naive(mu: Tensor, logvar: Tensor, weights: Tensor, *mistakes: str) -> Callable[[Tensor], Tensor]:
    """z [M, D] -> log p(z) of the mixture, with these mistakes, of which each must be in a group of its own."""
    unknown = set(mistakes) - set(NAMES)
    assert not unknown, unknown

    def pick(group, otherwise):
        chosen = [name for name in mistakes if name in group]
        assert len(chosen) <= 1, chosen
        return group[chosen[0]] if chosen else otherwise

    rounded = pick(INPUTS, lambda x: x)
    scale = pick(SCALES, lambda logvar: (0.5 * logvar).exp())
    log_normal = pick(NORMALS, lambda z, mu, s: normal(mu, s).log_prob(z))
    log_weights = pick(WEIGHTS, lambda w: (w / w.sum()).log())
    structure = pick(STRUCTURES, lambda n, log_w: (log_w + n.sum(-1)).logsumexp(-1))
    output = pick(OUTPUTS, lambda log_p, D: log_p)

    def log_prob(z: Tensor) -> Tensor:
        s = scale(rounded(logvar))  # [K, D]
        n = log_normal(rounded(z)[:, None], rounded(mu), s)  # [M, K, D]
        return output(structure(n, log_weights(rounded(weights))), z.shape[-1])

    return log_prob
