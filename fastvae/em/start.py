"""Where EM starts: k-means++ seeds, improved by k-means, on the device where the rows are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.em.responsibilities import row_slices
from fastvae.em.statistics import Moments, Parameters, Statistics, moments, wide_dtype

INITS = ("kmeans", "k-means++", "random_from_data")
MAX_ITERATIONS, TOLERANCE = 30, 1e-4  # of k-means: the centres' movement, relative to the data's variance


def kmeans(z: Tensor, row_weights: Tensor | None, K: int, init: str, generator: torch.Generator) -> Moments:
    """The moments of K clusters of rows z [n, D], n >= K; an empty cluster has the variance of all rows.

    Args:
        row_weights: [n], >= 0; None, 1 each.
        init: one of INITS.  "kmeans" improves the seeds of "k-means++"; the others assign each row to the nearest seed.
        generator: of the CPU.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007); as in scikit-learn, the
    best of several candidates becomes the next seed.
    """
    g = z.new_ones(len(z)) if row_weights is None else row_weights
    # Distances are computed as products.  These cancel least about a point that most rows are near, outliers or not.
    centre, scale = z.median(0).values, float(z.var(0, correction=0).mean().sqrt()) or 1.0
    z = (z - centre) / scale
    if init == "random_from_data":
        centres = z[torch.randperm(len(z), generator=generator)[:K].to(z.device)]
    else:
        centres = _seeds(z, g, K, generator)
    iterations = MAX_ITERATIONS if init == "kmeans" else 0
    for i in range(iterations + 1):
        found = _clusters(z, g, centres)
        if i == iterations or float((found.mean - centres).square().sum()) <= TOLERANCE:
            break
        centres = found.mean.to(z)
    return Moments(found.weight, found.mean * scale + centre, found.variance * scale**2)


def _clusters(z: Tensor, g: Tensor, centres: Tensor) -> Moments:
    """The moments of the rows that are nearest to each centre; of none, the centre and a variance of 1."""
    (K, D), wide = centres.shape, wide_dtype(z.device)
    total = Statistics(*(z.new_zeros(shape, dtype=wide) for shape in ((K,), (K, D), (K, D))))
    half_squares = 0.5 * centres.square().sum(1)
    for m in row_slices(z, K):
        nearest = torch.addmm(half_squares, z[m], centres.T, alpha=-1).argmin(1)
        apart, own = (z[m] - centres[nearest]).to(wide), g[m].to(wide)
        parts = own, own[:, None] * apart, own[:, None] * apart.square()
        for summed, part in zip(total, parts, strict=True):
            # index_put_ and not index_add_, which on a GPU adds in any order
            summed.index_put_((nearest,), part, accumulate=True)
    return moments(total, Parameters(centres, torch.zeros_like(centres), z.new_zeros(K)))


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
