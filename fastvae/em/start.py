"""Where EM starts: k-means++ seeds, improved by k-means, on the device where the rows are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.em.statistics import Moments, Parameters, Statistics, moments, wide_dtype

CHUNK = 2**22  # numbers in a table of rows and centres
MAX_ITERATIONS, TOLERANCE = 30, 1e-4  # of k-means: the centres' movement, relative to the data's variance


def kmeans(z: Tensor, row_weights: Tensor | None, K: int, generator: torch.Generator, iterations: int) -> Moments:
    """The moments of K clusters of rows z [n, D].

    Args:
        row_weights: [n], >= 0; None, 1 each.
        generator: of the CPU.
        iterations: of k-means at most, after the seeding; 0 assigns each row to the nearest seed.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007); as in scikit-learn, the
    best of several candidates becomes the next seed.
    """
    g = z.new_ones(len(z)) if row_weights is None else row_weights
    centre = torch.lerp(*z.aminmax(dim=0), 0.5)  # distances are computed as products, which cancel less about 0
    z = z - centre
    centres = _seeds(z, g, K, generator)
    scale = float(z.var(0, correction=0).mean())
    for i in range(iterations + 1):
        found = _assigned(z, g, centres)
        moved = (found.mean - centres).square().sum()
        if i == iterations or float(moved) <= TOLERANCE * scale:
            break
        centres = found.mean.to(z)
    return found._replace(mean=found.mean + centre)


def _seeds(z: Tensor, g: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """K of the rows, [K, D]: each drawn in proportion to its squared distance from the seeds before it."""
    candidates = 2 + int(math.log(K))
    draws = torch.rand(K, candidates, generator=generator, dtype=torch.float64).to(z.device, wide_dtype(z.device))
    squares = z.square().sum(1)
    index = torch.empty(K, dtype=torch.int64, device=z.device)
    index[0] = _draw(g, draws[0, 0])
    nearest = _squared_distances(z, squares, z[index[:1]])[0]
    for k in range(1, K):
        drawn = _draw(g * nearest, draws[k])
        distances = torch.minimum(_squared_distances(z, squares, z[drawn]), nearest)  # [candidates, n]
        best = (distances @ g).argmin()
        index[k], nearest = drawn[best], distances[best]
    return z[index]


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """For each u in [0, 1) an index, in proportion to the weights; where all are 0, any."""
    cumulative = weights.to(u).cumsum(0)
    total = cumulative[-1]
    drawn = torch.searchsorted(cumulative, u * total, right=True).clamp_max(len(weights) - 1)
    return torch.where(total > 0, drawn, (u * len(weights)).long())


def _squared_distances(z: Tensor, squares: Tensor, centres: Tensor) -> Tensor:
    """[centres, n]; a rounding may leave a small one where the rows are the same."""
    products = torch.addmm(squares, centres, z.T, alpha=-2)
    return (products + centres.square().sum(1, keepdim=True)).clamp_min_(0.0)


def _assigned(z: Tensor, g: Tensor, centres: Tensor) -> Moments:
    """The moments of the clusters that have these centres; an empty one keeps its centre, with a variance of 1."""
    K, wide = len(centres), wide_dtype(z.device)
    total = Statistics(*(z.new_zeros(shape, dtype=wide) for shape in ((K,), centres.shape, centres.shape)))
    half_squares = 0.5 * centres.square().sum(1)
    for m in _slices(len(z), max(1, CHUNK // K)):
        nearest = torch.addmm(half_squares, z[m], centres.T, alpha=-1).argmin(1)
        u = z[m] - centres[nearest]
        # a product and not index_add, whose order of summation on a GPU is left to chance
        own = (nearest[:, None] == torch.arange(K, device=z.device)).to(z.dtype) * g[m, None]  # [m, K]
        total += Statistics(own.sum(0).to(wide), (own.T @ u).to(wide), (own.T @ u.square()).to(wide))
    return moments(total, Parameters(centres, torch.zeros_like(centres), half_squares))


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
