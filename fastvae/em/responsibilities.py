"""The components that rows most likely come from, without a table of rows and components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import _checks, reference
from fastvae import functional as F
from fastvae.backends import BACKENDS
from fastvae.backends.choice import choose, dense
from fastvae.backends.composite import chunk_on
from fastvae.em.statistics import wide_dtype

SPARE = 8  # candidates beyond top_k
ROUNDING = 1e-8  # of an exponent, in nats: where a product's may be larger, the differences are taken


class Responsibilities(NamedTuple):
    """`values` [..., k], the responsibilities in descending order, and `indices` int64 [..., k], their components."""

    values: Tensor
    indices: Tensor


@torch.no_grad()
def mixture_responsibilities(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    top_k: int = 1,
    exclude: Tensor | None = None,
    impl: str | None = None,
) -> Responsibilities:
    """The top_k components of each row with the largest responsibilities, r_k = w_k N(z; mu_k, sigma_k^2) / p(z).

    Of the [M, K] responsibilities of M rows only parts exist at a time, so that memory grows with M top_k + K.  Without
    gradients.  p(z) is that of :func:`mixture_log_prob`, in float64 (on MPS float32), and so are the exponents of the
    components taken, from the differences z - mu.  They are chosen by a matrix product in float64, and by the
    differences where the product's rounding could reach 1e-8 nats.  That takes some five times as long for components
    whose standard deviation is below about 1e-4 of the distances between rows and means.

    Args:
        z, mu, logvar, log_weights, exclude, impl: as of :func:`mixture_log_prob`.
        top_k: k, at most K.  With k = K the responsibilities sum to one, with fewer to the share that these hold.

    Returns:
        (values [..., k], indices int64 [..., k]), in descending order; float64 if any argument is, else float32.  Equal
        responsibilities come in the order of their indices; where more are equal than there is room for, any of them
        come.  A component that is excluded or has weight 0 has 0, and so have all where the density is 0.  A row with
        NaN has NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mixture_log_prob`; top_k is no integer in 1 ... K.

    Equals, holding [M, K, D] numbers::

        a = log_weights + Independent(Normal(mu, (0.5 * logvar).exp()), 1).log_prob(z[..., None, :])
        torch.softmax(a, -1).topk(top_k)
    """
    z, mu, logvar, log_weights, exclude = _checks.mixture(z, mu, logvar, log_weights, exclude)
    K, dtype, shape = len(mu), z.dtype, z.shape[:-1]
    top_k = _checks.positive("top_k", top_k)
    if top_k > K:
        raise ValueError(f"top_k must be at most K = {K}, not {top_k}")
    wide = wide_dtype(z.device)
    mu, logvar = mu.to(wide), logvar.to(wide)
    log_weights = mu.new_full((K,), -math.log(K)) if log_weights is None else log_weights.to(wide)
    z, exclude = _checks.rows(z), None if exclude is None else exclude.reshape(-1)
    exponents = Exponents(mu, logvar, log_weights)
    values = z.new_empty((len(z), top_k))
    indices = torch.empty((len(z), top_k), dtype=torch.int64, device=z.device)
    count = min(K, top_k + SPARE)
    for m in row_slices(z, count * z.shape[1]):
        rows, excluded = z[m].to(wide), None if exclude is None else exclude[m]
        log_prob = F.mixture_log_prob(rows, mu, logvar, log_weights, exclude=excluded, impl=impl)
        candidates = _candidates(rows, exponents, excluded, count).sort(1).values
        a = exponents.of(rows, candidates)
        if excluded is not None:
            a = a.masked_fill(candidates == excluded[:, None], -math.inf)
        a, order = a.sort(dim=1, descending=True, stable=True)  # stable: equal ones stay in the order of their indices
        nowhere = (log_prob == -math.inf)[:, None]
        values[m] = torch.exp(a - log_prob[:, None]).masked_fill(nowhere, 0.0)[:, :top_k].to(dtype)
        indices[m] = candidates.gather(1, order)[:, :top_k]
    return Responsibilities(values.reshape(*shape, top_k), indices.reshape(*shape, top_k))


@torch.no_grad()
def responsibility_sums(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    exclude: Tensor | None = None,
    *,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """The sum over the rows z [..., D] of each component's responsibilities, [K]; arguments as elsewhere.

    That is the gradient of their log densities' sum in the components' log weights.
    """
    z, mu, logvar, log_weights, exclude = _checks.mixture(z, mu, logvar, log_weights, exclude)
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        a = reference.component_log_prob(z, mu, logvar, log_weights, exclude)  # [..., K]
        empty = (a == -math.inf).all(-1, keepdim=True)
        r = torch.softmax(a.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        return r.reshape(-1, len(mu)).sum(0)
    rows, operators = _checks.flat(z, mu, logvar, log_weights, exclude), BACKENDS[backend].operators
    log_prob = operators.mixture_log_prob(*rows)
    ones = torch.ones_like(log_prob)
    need = False, False, False, True  # in z, mu, logvar; in the log weights
    return operators.mixture_log_prob_backward(ones, log_prob, *rows, dense(dense_backward), *need)[3]


class Exponents:
    """a_mk of rows and components, with what they take of the components computed once.

    Components of weight zero have -inf, whatever their parameters are.
    """

    def __init__(self, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> None:
        absent = (log_weights == -math.inf)[:, None]
        logvar = logvar.expand(mu.shape).masked_fill(absent, 0.0)
        self.mu, self.s = mu.masked_fill(absent, 0.0), torch.exp(-0.5 * logvar)
        self.c = log_weights - 0.5 * (logvar.sum(1) + mu.shape[1] * math.log(2 * math.pi))  # [K]
        self.centre = self.mu.mean(0)
        u, precision = self.mu - self.centre, self.s.square()
        self.weights = torch.cat([-0.5 * precision, precision * u], 1)  # [K, 2 D]
        self.constant = self.c - 0.5 * (precision * u.square()).sum(1)  # [K]

    def of_all(self, rows: Tensor, k: slice) -> Tensor:
        """[m, k] of rows [m, D]: a matrix product of [u^2, u], with u the rows about the means' centre.

        Its terms are as large as (|u| + |mu - centre|)^2 / (2 sigma^2).  Where a rounding of these is above ROUNDING,
        which is so for narrow components, the differences take its place.
        """
        u = rows - self.centre
        a = torch.addmm(self.constant[k], torch.cat([u.square(), u], 1), self.weights[k].T)
        reach = u.abs().nan_to_num(nan=0.0).amax(0) + (self.mu[k] - self.centre).abs()  # [k, D]
        terms = 0.5 * (self.s[k] * reach).square().sum(1)
        narrow = (terms * torch.finfo(a.dtype).eps > ROUNDING).nonzero()[:, 0]
        if len(narrow):
            mu, s, c = self.mu[k][narrow], self.s[k][narrow], self.c[k][narrow]
            size = max(1, chunk_on(rows.device, 8) // (8 * mu.numel()))  # so few rows that a CPU's cache holds t
            for part, into in zip(rows.split(size), a.split(size), strict=True):
                t = (part[:, None] - mu).mul_(s)  # [size, narrow, D]
                into[:, narrow] = c - 0.5 * t.square_().sum(2)
        return a

    def of(self, rows: Tensor, components: Tensor) -> Tensor:
        """[m, n] of rows [m, D] and the components [m, n] of each, from the differences."""
        t = (rows[:, None] - self.mu[components]).mul_(self.s[components])
        return self.c[components] - 0.5 * t.square_().sum(2)


def row_slices(z: Tensor, numbers: int) -> Iterator[slice]:
    """Slices of the rows z [M, D], so few rows that a table of so many numbers for each stays small."""
    size = max(1, min(4096, chunk_on(z.device, 8) // numbers))
    return (slice(start, start + size) for start in range(0, len(z), size))


def _candidates(rows: Tensor, exponents: Exponents, exclude: Tensor | None, count: int) -> Tensor:
    """int64 [m, count]: the components with the largest exponents, some components at a time."""
    K, size = len(exponents.c), max(count, chunk_on(rows.device, 8) // len(rows))
    best = index = None
    for start in range(0, K, size):
        a = exponents.of_all(rows, slice(start, start + size))
        if exclude is not None:
            own = torch.arange(start, start + a.shape[1], device=rows.device) == exclude[:, None]
            a = a.masked_fill(own, -math.inf)
        top, at = a.topk(min(count, a.shape[1]), 1)
        at = at + start
        if best is None or index is None:
            best, index = top, at
        else:
            best, kept = torch.cat([best, top], 1).topk(count, 1)
            index = torch.cat([index, at], 1).gather(1, kept)
    assert index is not None
    return index
