"""Pairs of a row and a component for the bounds on their exponents: random ones, and those that a bound may forget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from budget import Case
from torch import Tensor

Maker = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor, Tensor]]  # (rng, M, K, D) -> z, mu, sigma


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _power(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """10^u, u uniform."""
    return 10 ** (low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64))


def _signs(n: int) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)[:, None]


def _near(rng: torch.Generator, M: int, mu: Tensor, sigma: Tensor, sigmas: Tensor | float = 1.0) -> Tensor:
    """Rows so many sigmas from a component."""
    own = torch.randint(len(mu), (M,), generator=rng)
    return mu[own] + sigmas * sigma[own] * _normal(rng, M, mu.shape[1])


def any_sigma(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each of its own from 1e-3 to 1e3: nothing balances, and large terms cancel."""
    sigma, mu = _power(rng, -3, 3, K, D), _normal(rng, K, D) * _power(rng, -2, 2, K, 1)
    return _near(rng, M, mu, sigma, _power(rng, -1, 2, M, 1)), mu, sigma


def sigma_of_dimension(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    sigma = _power(rng, -3, 3, D) * torch.exp(0.2 * _normal(rng, K, D))
    mu = 3 * sigma * _normal(rng, K, D)
    return _near(rng, M, mu, sigma), mu, sigma


def narrow(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Components a thousand sigmas apart."""
    sigma, mu = 1e-3 * torch.exp(0.3 * _normal(rng, K, D)), _normal(rng, K, D)
    return _near(rng, M, mu, sigma), mu, sigma


def one_sign(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """All products of a pair have one sign, so that what is cut off adds up."""
    mu = 5 * _normal(rng, K, D).abs() * _signs(K)
    return 5 * _normal(rng, M, D).abs(), mu, torch.ones(K, D, dtype=torch.float64)


def ties(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """All factors just beyond the middle of two fp16 numbers, so that all round the same way."""
    scale = torch.exp2(torch.randint(-1, 2, (D,), generator=rng).double())
    middle = 1 + 2.0**-11 + 2.0**-20
    return 4 * middle * _signs(M) / scale, middle * _signs(K) * scale, torch.ones(K, D, dtype=torch.float64)


def one_large_dimension(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    sigma, mu = torch.exp(0.2 * _normal(rng, K, D)), _normal(rng, K, D)
    mu[:, 0] *= 1e3
    return _near(rng, M, mu, sigma), mu, sigma


def outliers(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    sigma, mu = torch.exp(0.2 * _normal(rng, K, D)), _normal(rng, K, D)
    return _normal(rng, M, D) * _power(rng, 0, 4, M, 1), mu, sigma


def diffuse(rng: torch.Generator, M: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    return _normal(rng, M, D), 0.3 * _normal(rng, K, D), torch.exp(0.1 * _normal(rng, K, D))


MAKERS = (any_sigma, sigma_of_dimension, narrow, one_sign, ties, one_large_dimension, outliers, diffuse)


def equally_weighted(maker: Maker, M: int, K: int, D: int, seed: int = 0) -> Case:
    """In float32, all weights 1."""
    z, mu, sigma = maker(torch.Generator().manual_seed(seed + D), M, K, D)
    return Case(z, mu, 2 * torch.log(sigma), torch.zeros(K), torch.ones(M)).to(torch.float32)
