"""Components sharded over up to 1,024 ranks in one process: what they exchange, beside what the plan says of it.

    python -m tools.experiments.scaling [--out FILE.json]

Every rank scores all rows against its share of the components.  The group that the ranks exchange their results by
counts the bytes that each of them receives.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.app.planning.cost import bytes_received
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


def simulate(ranks: int, M: int = ROWS, K: int = COMPONENTS, D: int = DIMS) -> dict[str, Any]:
    """Bytes that a rank receives, counted and planned, and how far the result is from that of one rank."""
    rng = torch.Generator().manual_seed(0)
    z, mu = torch.randn(M, D, generator=rng), torch.randn(K, D, generator=rng)
    logvar, log_weights = 0.3 * torch.randn(K, D, generator=rng), torch.randn(K, generator=rng).log_softmax(0)
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
    want, want_score = fastvae.mixture_log_prob_and_score(z, mu, logvar, log_weights)
    return {
        "ranks": ranks,
        "received": max(densities),
        "planned": bytes_received(M, D, ranks),
        "received_with_score": max(group.received),
        "planned_with_score": bytes_received(M, D, ranks, score=True),
        "largest_difference": float((log_prob - want).abs().max()),
        "largest_difference_of_score": float((score - want_score).abs().max()),
    }


def measure() -> dict[str, Any]:
    """The record."""
    return {"M": ROWS, "K": COMPONENTS, "D": DIMS, "rows": [simulate(ranks) for ranks in RANKS]}


def markdown(content: dict[str, Any]) -> str:
    """A line for each number of ranks."""
    rows = [
        [
            f"{row['ranks']:,}",
            f"{row['received']:,}",
            f"{row['planned']:,}",
            f"{row['received_with_score']:,}",
            f"{row['planned_with_score']:,}",
            formatting.error(row["largest_difference"]),
        ]
        for row in content["rows"]
    ]
    job = f"M = {content['M']}, K = {content['K']:,}, D = {content['D']}"
    headings = [f"ranks ({job})", "bytes received", "planned", "with the score", "planned", "largest difference, nats"]
    return formatting.markdown(headings, rows, left=0)


if __name__ == "__main__":
    sys.exit(command.run("scaling", __doc__, measure, markdown))
