"""Score every cell of an atlas against the aggregated posterior of every donor: log p(z | group), cells x groups.

    python examples/score_groups.py [--record groups.json]

An encoder gives each cell a posterior N(mu, sigma^2) of its state z; a donor's aggregated posterior is the mixture of
its cells' posteriors.  Which donors a state is typical of is then a density for each cell and donor, which is often
computed by a loop over donors and minibatches with `torch.distributions.MixtureSameFamily`.  Here both are run on made
up cells, checked against each other, and timed in turn: after every tenth of the loop, the one call that does it all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastvae


def cells(count: int, groups: int, latent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, mu, logvar [count, latent], donor [count]): cell types that all donors have, shifted a little in each."""
    torch.manual_seed(0)
    donor = torch.arange(count) * groups // count
    types, shift = 2.0 * torch.randn(12, latent), 0.3 * torch.randn(groups, latent)
    mu = types[torch.randint(12, (count,))] + shift[donor] + 0.4 * torch.randn(count, latent)
    logvar = -2.0 + 0.5 * torch.randn(count, latent)
    z, _ = fastvae.gaussian_rsample(mu, logvar)
    return z, mu, logvar, donor


def by_loop(z: Tensor, mu: Tensor, logvar: Tensor, batch: int) -> Tensor:
    """log p(z | one group), [M], as it is usually written: holds [batch, K_g, D] numbers."""
    weights = Categorical(logits=torch.zeros(len(mu)))
    mixture = MixtureSameFamily(weights, Independent(Normal(mu, torch.exp(0.5 * logvar)), 1))
    return torch.cat([mixture.log_prob(part) for part in z.split(batch)])


class Clock:
    """Adds up the seconds of its blocks: those on the wall, and those of all CPUs."""

    wall = cpu = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self.started[0]
        self.cpu += time.process_time() - self.started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--latent", type=int, default=30)
    parser.add_argument("--batch", type=int, default=512, help="cells at a time in the loop; 512 was its fastest")
    parser.add_argument("--record", type=Path, help="write what was measured to this JSON file")
    asked = parser.parse_args()
    z, mu, logvar, donor = cells(asked.cells, asked.groups, asked.latent)

    fastvae.grouped_mixture_log_prob(z[:100], mu, logvar, donor)  # the first call is not like the others
    loop, calls, columns = Clock(), [], []
    with torch.no_grad():
        for g in range(asked.groups):
            with loop:
                columns.append(by_loop(z, mu[donor == g], logvar[donor == g], asked.batch))
            if (g + 1) % max(1, asked.groups // 10) == 0:
                calls.append(Clock())
                with calls[-1]:
                    scores = fastvae.grouped_mixture_log_prob(z, mu, logvar, donor)  # [cells, groups]
    error = float((scores - torch.stack(columns, -1)).abs().max())
    if not error < 1e-3:  # both are float32, of densities of tens of nats
        raise SystemExit(f"the two do not agree: {error} nats")
    wall, cpu = (statistics.median(getattr(call, name) for call in calls) for name in ("wall", "cpu"))
    print(f"{asked.cells} cells x {asked.groups} groups, {asked.latent} dimensions, {torch.get_num_threads()} threads")
    print(f"loop of MixtureSameFamily  {loop.wall:8.2f} s")
    print(f"grouped_mixture_log_prob   {wall:8.2f} s: {loop.wall / wall:.0f} times faster")
    print(f"largest difference         {error:8.0e} nats")
    if asked.record:
        from fastvae._files import write_json

        found = {
            "cells": asked.cells,
            "groups": asked.groups,
            "latent": asked.latent,
            "batch": asked.batch,
            "loop_seconds": loop.wall,
            "loop_cpu_seconds": loop.cpu,
            "call_seconds": wall,
            "call_cpu_seconds": cpu,
            "largest_difference": error,
            "own_group_scores_highest": float((scores.argmax(1) == donor).double().mean()),
            "threads": torch.get_num_threads(),
            "backend": fastvae.info()["impl='cpu'"],
            "torch": torch.__version__,
        }
        write_json(asked.record, found)


if __name__ == "__main__":
    main()
