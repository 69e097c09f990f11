"""Total correlation over a whole data set and by minibatches, where it is known; and what it costs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from fastvae import mixture_log_prob, mixture_marginal_log_prob, total_correlation

POINTS, BATCH, BATCHES = 60_000, 128, 20
DIMENSIONS = (2, 5, 8)
CORRELATION, VARIANCE = 0.5, 0.1  # of the posteriors' means, in each pair of dimensions; of the posteriors


def study() -> dict[str, Any]:
    """q(z | x_n) = N(m_n, VARIANCE I), m_n ~ N(0, C): for many points q(z) is normal, and its total correlation known.

    All estimates are means over the same draws.  `whole` is over all posteriors, `batch` takes those of the batch for
    all, `weighted` and `stratified` are minibatch weighted and stratified sampling of Chen et al. (NeurIPS 2018).
    `cost` is the time of the marginal densities over that of the joint one, forward, on the machine that ran it.
    """
    rows = []
    for D in DIMENSIONS:
        torch.manual_seed(0)
        C = (1 - CORRELATION) * torch.eye(D) + CORRELATION
        mu, logvar = torch.randn(POINTS, D) @ torch.linalg.cholesky(C).T, torch.full((D,), math.log(VARIANCE))
        covariance = (C + VARIANCE * torch.eye(D)).double()
        found: dict[str, list[Tensor]] = {"whole": [], "batch": [], "weighted": [], "stratified": []}
        for _ in range(BATCHES):
            of_batch = mu[torch.randperm(POINTS)[:BATCH]]
            z = of_batch + torch.exp(0.5 * logvar) * torch.randn(BATCH, D)
            found["whole"].append(total_correlation(z, mu, logvar))
            for name, weights in (
                ("batch", torch.full((BATCH, BATCH), 1 / BATCH)),
                ("weighted", torch.full((BATCH, BATCH), 1 / BATCH / POINTS)),
                ("stratified", _stratified_weights()),
            ):
                found[name].append(_by_minibatch(z, of_batch, logvar, weights))
        rows.append(
            {"D": D, "known": float(0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance)))}
            | {name: float(torch.cat(values).mean()) for name, values in found.items()}
            | {"standard_error": float(torch.cat(found["whole"]).std()) / math.sqrt(BATCH * BATCHES)}
            | {"cost": _cost(z, mu)}
        )
        print(rows[-1], flush=True)
    return {"rows": rows, "points": POINTS, "batch": BATCH, "batches": BATCHES}


def _by_minibatch(z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor) -> Tensor:
    """log q(z) - sum_d log q(z_d) with the batch's posteriors for all, weights [B, B] of each for each row."""
    each = Normal(mu, torch.exp(0.5 * logvar)).log_prob(z[:, None])  # [B, B, D]
    joint = (each.sum(-1) + weights.log()).logsumexp(1)
    return joint - (each + weights.log()[..., None]).logsumexp(1).sum(-1)


def _stratified_weights() -> Tensor:
    """A row's own posterior weighs 1 / N, one other what makes the sum 1."""
    others = BATCH - 1
    weights = torch.full((BATCH, BATCH), 1 / others)
    rows = torch.arange(BATCH)
    weights[rows, rows] = 1 / POINTS
    weights[rows, (rows + 1) % BATCH] = (POINTS - others) / (POINTS * others)
    return weights


def _cost(z: Tensor, mu: Tensor) -> float:
    """The ratio of the least times of fifteen, in turn."""
    logvar = torch.full(mu.shape, math.log(VARIANCE))
    least = [math.inf, math.inf]
    for _ in range(15):
        for i, density in enumerate((mixture_log_prob, mixture_marginal_log_prob)):
            started = time.perf_counter()
            density(z, mu, logvar)
            least[i] = min(least[i], time.perf_counter() - started)
    return least[1] / least[0]
