"""What `fastvae plan` says of jobs of one process, beside what they take here.

    OMP_NUM_THREADS=1 python -m tools.experiments.plan_check [--out FILE.json]

The plan is for the machine of the record.  What it says is scaled by the multiply-adds a second that are probed beside
each job, over those that were probed beside the record; both times are of the processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from fastvae.app.planning.cost import Rates, Work, all_rates, cost
from fastvae.benchmarks import formatting
from fastvae.benchmarks.probe import has_isa, multiply_add_meter
from fastvae.benchmarks.record import machine, versions
from fastvae.streaming import streamed_log_prob

from . import command

SHAPES = ((65_536, 10_000, 16), (16_384, 10_000, 64), (20_000, 50_000, 4), (2_000, 100_000, 16), (200, 100_000, 64))
MEMORIES = (2**28, 2**24)
ROUNDS = 5


def measure(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> dict[str, Any]:
    """The record; on one thread.

    Raises:
        RuntimeError: there is no compiler for the probe, or more than one thread.
    """
    if torch.get_num_threads() != 1:
        raise RuntimeError("the plan is checked on one thread: set OMP_NUM_THREADS=1")
    device = "cpu" if has_isa("avx512") else "cpu-avx2"
    meter = multiply_add_meter("avx512" if device == "cpu" else "avx2")
    if meter is None:
        raise RuntimeError("the probe of multiply-adds cannot be compiled")
    rates = all_rates()[device]
    rows = [_check(M, K, D, memory, rates, meter) for M, K, D in shapes for memory in MEMORIES]
    return {"device": device, "machine": machine("cpu"), "versions": versions(), "rounds": ROUNDS, "rows": rows}


def _check(M: int, K: int, D: int, memory: int, rates: Rates, meter: Callable[[], float]) -> dict[str, Any]:
    z, mu, logvar = torch.randn(M, D), torch.randn(K, D), 0.1 * torch.randn(K, D)
    planned = cost(Work(M, K, D, memory=memory), rates, "rows").compute_seconds
    assert rates.multiply_add_rate is not None
    ratios = []
    for _ in range(ROUNDS):
        started, before = time.perf_counter(), time.process_time()
        rate = meter()
        # A probe that shares its core tells less by the clock than its core gave it.
        rate *= (time.perf_counter() - started) / (time.process_time() - before)
        before = time.process_time()
        streamed_log_prob(z, mu, logvar, memory=memory)
        seconds = time.process_time() - before
        ratios.append((seconds * rate / rates.multiply_add_rate) / planned)
    return {"M": M, "K": K, "D": D, "memory": memory, "planned_seconds": planned, "taken_by_planned": median(ratios)}


def markdown(content: dict[str, Any]) -> str:
    """A line for each job."""
    rows = [
        [
            f"{row['M']:,} x {row['K']:,}, D = {row['D']}",
            f"{row['memory'] >> 20} MiB",
            formatting.duration(row["planned_seconds"]),
            f"{row['taken_by_planned']:.2f}",
        ]
        for row in content["rows"]
    ]
    return formatting.markdown(["job", "memory", "planned", "taken / planned"], rows)


if __name__ == "__main__":
    sys.exit(command.run("plan_check", __doc__, measure, markdown))
