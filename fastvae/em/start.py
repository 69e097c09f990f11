"""Where EM starts: k-means++ seeds, improved by k-means, on the device where the rows are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.em.statistics import Moments, Parameters, e_step, moments, wide_dtype

INITS = ("kmeans", "k-means++", "random_from_data")
MAX_ITERATIONS, TOLERANCE = 30, 1e-4  # of k-means: the centres' movement, relative to the data's variance
# The variance of the components that are clusters, relative to the data's: so small that a row belongs to one alone,
# and so large that float32 rounds the exponents, of some 1e5, by far less than 1.
HARD = 1e-4


def kmeans(
    z: Tensor, row_weights: Tensor | None, K: int, init: str, generator: torch.Generator, backend: str
) -> Moments:
    """The moments of K clusters of rows z [n, D], n >= K.

    k-means is EM of equal components whose variance goes to 0, so that the kernels of EM do it.

    Args:
        row_weights: [n], >= 0; None, 1 each.
        init: one of INITS.  "kmeans" improves the seeds of "k-means++"; the others assign each row to the nearest seed.
        generator: of the CPU.
        backend: a name in BACKENDS, or "reference".

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007); as in scikit-learn, the
    best of several candidates becomes the next seed.
    """
    g = z.new_ones(len(z)) if row_weights is None else row_weights
    centre = torch.lerp(*z.aminmax(dim=0), 0.5)  # distances are computed as products, which cancel less about 0
    z = z - centre
    variance = float(z.var(0, correction=0).mean()) or 1.0
    if init == "random_from_data":
        centres = z[torch.randperm(len(z), generator=generator)[:K].to(z.device)]
    else:
        centres = _seeds(z, g, K, generator)
    iterations = MAX_ITERATIONS if init == "kmeans" else 0
    logvar = torch.full_like(centres, math.log(HARD * variance))
    for i in range(iterations + 1):
        about = Parameters(centres, logvar, z.new_zeros(K))
        found = moments(e_step(z, about, g, backend, False)[1], about)
        moved = float((found.mean - centres).square().sum())
        if i == iterations or moved <= TOLERANCE * variance:
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
