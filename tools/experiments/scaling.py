"""Mixtures sharded over up to 1,024 ranks in one process: what they exchange, beside what the plan says of it.

    python -m tools.experiments.scaling [--out FILE.json]

With the components sharded, every rank scores all rows against its share.  On a mesh, a rank scores its share of the
rows against its share of the components.  In a ring, a rank scores its share of the rows against the components that
pass by.  The group that the ranks exchange by counts the bytes that each of them receives.
"""

from __future__ import annotations

import sys
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.app.planning.cost import bytes_received, bytes_received_in_ring
from fastvae.benchmarks import formatting

from . import command

ROWS, COMPONENTS, DIMS = 64, 1500, 8  # components do not divide by the ranks, and the largest group has ranks without
RANKS = tuple(2**power for power in range(11))


class CountingGroup:
    """Ranks in one process; `received` counts the bytes that each receives from others."""

    def __init__(self, ranks: int) -> None:
        self.received = [0] * ranks

    def all_gather(self, of_ranks: list[Tensor]) -> Tensor:
        """[ranks, ...], which every rank then has; each receives what the others have."""
        total = sum(value.nbytes for value in of_ranks)
        for rank, value in enumerate(of_ranks):
            self.received[rank] += total - value.nbytes
        return torch.stack(of_ranks)

    def shift(self, of_ranks: list[Tensor]) -> list[Tensor]:
        """What each rank then has: that of the one before it."""
        shifted = of_ranks[-1:] + of_ranks[:-1]
        for rank, value in enumerate(shifted):
            self.received[rank] += value.nbytes
        return shifted

    def all_reduce(self, of_ranks: list[Tensor]) -> Tensor:
        """The sum, by a ring: each rank receives one part of N at each of its 2 (N - 1) steps."""
        N, flat = len(of_ranks), torch.stack(of_ranks).flatten(1)
        parts = list(flat.double().sum(0).tensor_split(N))
        for rank in range(N):
            for step in range(N - 1):  # parts are summed on their way around
                self.received[rank] += parts[(rank - step - 1) % N].numel() * flat.element_size()
            for step in range(N - 1):  # and sent around once more
                self.received[rank] += parts[(rank - step) % N].numel() * flat.element_size()
        return torch.cat(parts).reshape(of_ranks[0].shape)


class Mixture(NamedTuple):
    """The rows and components of a simulation."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor

    @staticmethod
    def of(M: int, K: int, D: int) -> Mixture:
        rng = torch.Generator().manual_seed(0)
        z, mu = torch.randn(M, D, generator=rng), torch.randn(K, D, generator=rng)
        logvar, log_weights = 0.3 * torch.randn(K, D, generator=rng), torch.randn(K, generator=rng).log_softmax(0)
        return Mixture(z, mu, logvar, log_weights)


def simulate(ranks: int, M: int = ROWS, K: int = COMPONENTS, D: int = DIMS) -> dict[str, Any]:
    """Bytes that a rank receives, counted and planned, and how far the result is from that of one rank."""
    mixture = z, mu, logvar, log_weights = Mixture.of(M, K, D)
    group, shares = CountingGroup(ranks), torch.arange(K).tensor_split(ranks)
    found = [
        fastvae.mixture_log_prob_and_score(z, mu[own], logvar[own], log_weights[own])
        if len(own)
        else (z.new_full((M,), -torch.inf), torch.zeros_like(z))
        for own in shares
    ]
    log_prob = torch.logsumexp(group.all_gather([each for each, _ in found]).double(), 0)
    densities = group.received.copy()
    score = group.all_reduce([(each - log_prob).exp()[:, None].float() * own for each, own in found])
    want, want_score = fastvae.mixture_log_prob_and_score(*mixture)
    return {
        "ranks": ranks,
        "received": max(densities),
        "planned": bytes_received(M, D, ranks),
        "received_with_score": max(group.received),
        "planned_with_score": bytes_received(M, D, ranks, score=True),
        "largest_difference": float((log_prob - want).abs().max()),
        "largest_difference_of_score": float((score - want_score).abs().max()),
    }


def simulate_mesh(ranks: int, M: int = ROWS, K: int = COMPONENTS, D: int = DIMS) -> dict[str, Any]:
    """As `simulate`, on a mesh with half of the factors of two in each dimension."""
    columns = 2 ** (ranks.bit_length() // 2)
    found = simulate(columns, ceil(M / (ranks // columns)), K, D)  # of the ranks that have the first rows
    return {"mesh": [ranks // columns, columns], **{name: found[name] for name in ("received", "planned")}}


def simulate_ring(ranks: int, M: int = ROWS, K: int = COMPONENTS, D: int = DIMS) -> dict[str, Any]:
    """As `simulate`, with rows and components sharded, and the components travelling."""
    mixture = z, mu, logvar, log_weights = Mixture.of(M, K, D)
    group, counts = CountingGroup(ranks), [len(own) for own in torch.arange(K).tensor_split(ranks)]
    packed = torch.cat([mu, logvar, log_weights[:, None]], 1)
    here, rows = list(packed.split(counts)), z.tensor_split(ranks)
    of_steps = []
    for step in range(ranks):
        of_steps.append(torch.cat([_density(own, part) for own, part in zip(rows, here, strict=True)]))
        if step < ranks - 1:
            here = group.shift(here)
    log_prob = torch.logsumexp(torch.stack(of_steps).double(), 0)
    return {
        "received": max(group.received),
        "planned": bytes_received_in_ring(K, D, ranks),
        "largest_difference": float((log_prob - fastvae.mixture_log_prob(*mixture)).abs().max()),
    }


def _density(z: Tensor, packed: Tensor) -> Tensor:
    if not len(z) or not len(packed):
        return z.new_full((len(z),), -torch.inf)
    D = z.shape[1]
    return fastvae.mixture_log_prob(z, packed[:, :D], packed[:, D : 2 * D], packed[:, -1])


def measure() -> dict[str, Any]:
    """The record."""
    rows = [{**simulate(ranks), "mesh": simulate_mesh(ranks), "ring": simulate_ring(ranks)} for ranks in RANKS]
    return {"M": ROWS, "K": COMPONENTS, "D": DIMS, "rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """A line for each number of ranks."""
    rows = [
        [
            f"{row['ranks']:,}",
            f"{row['received']:,} / {row['planned']:,}",
            f"{row['received_with_score']:,} / {row['planned_with_score']:,}",
            "{} x {}: {received:,} / {planned:,}".format(*row["mesh"]["mesh"], **row["mesh"]),
            "{received:,} / {planned:,}".format(**row["ring"]),
            formatting.error(max(row["largest_difference"], row["ring"]["largest_difference"])),
        ]
        for row in content["rows"]
    ]
    job = f"M = {content['M']}, K = {content['K']:,}, D = {content['D']}"
    headings = [
        f"ranks ({job})",
        "components sharded: bytes received / planned",
        "with the score",
        "on a mesh",
        "in a ring",
        "largest difference, nats",
    ]
    return formatting.markdown(headings, rows, left=0)


if __name__ == "__main__":
    sys.exit(command.run("scaling", __doc__, measure, markdown))
