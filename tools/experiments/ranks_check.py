"""What two processes exchange and how long they take, beside `fastvae plan` and beside the kernels alone.

    OMP_NUM_THREADS=1 python -m tools.experiments.ranks_check [--out FILE.json]

Times are of the processor: both of a call, with the handshake, the exchange and the kernels, and of the same kernels
called without a group.  What the former takes more is what could be hidden behind the kernels at most.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import fastvae
import fastvae.distributed
from fastvae.app.planning.cost import Work, all_rates, cost
from fastvae.benchmarks import formatting
from fastvae.benchmarks.probe import has_isa, multiply_add_meter
from fastvae.benchmarks.record import machine, versions
from fastvae.distributed.link import Link

from . import command

PROCESSES = 2
LAYOUTS = "components", "ring"
SHAPES = ((16_384, 10_000, 16), (2_000, 100_000, 16), (4_096, 10_000, 64), (100_000, 1_000, 16))
ROUNDS = 5


def measure(shapes: Sequence[tuple[int, int, int]] = SHAPES, rounds: int = ROUNDS) -> dict[str, Any]:
    """The record; each process on one thread.

    Raises:
        RuntimeError: there is no compiler for the probe.
    """
    if _meter() is None:
        raise RuntimeError("the probe of multiply-adds cannot be compiled")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure_on, (folder, shapes, rounds), nprocs=PROCESSES)
        rows = json.loads(Path(folder, "rows.json").read_text())
    return {"machine": machine("cpu"), "versions": versions(), "rounds": rounds, "rows": rows}


def _device() -> str:
    return "cpu" if has_isa("avx512") else "cpu-avx2"


def _meter() -> Callable[[], float] | None:
    return multiply_add_meter("avx512" if _device() == "cpu" else "avx2")


def _measure_on(rank: int, folder: str, shapes: Sequence[tuple[int, int, int]], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    rows = [_check(rank, M, K, D, layout, rounds) for M, K, D in shapes for layout in LAYOUTS]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _check(rank: int, M: int, K: int, D: int, layout: str, rounds: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    z, mu, logvar = (torch.randn(n, D, generator=rng) for n in (M, K, K))
    whole = mu, 0.1 * logvar, torch.full((K,), -math.log(K))
    shares = [list(parts) for parts in zip(*(value.tensor_split(PROCESSES) for value in whole), strict=True)]
    ring = layout == "ring"
    if ring:
        z = z.tensor_split(PROCESSES)[rank]

    def call(z: Tensor) -> Tensor:
        options: dict[str, Any] = {"rows": "sharded", "exchange": "ring"} if ring else {}
        return fastvae.distributed.mixture_log_prob(z, *shares[rank], **options)

    def kernels(z: Tensor) -> Tensor:
        passing = shares if ring else [shares[rank]]
        return torch.stack([fastvae.mixture_log_prob(z, *components) for components in passing])

    def with_gradients(function: Callable[[Tensor], Tensor]) -> None:
        for leaf in (z, *(value for components in shares for value in components)):
            leaf.requires_grad_()
        function(z).sum().backward()
        for leaf in (z, *(value for components in shares for value in components)):
            leaf.requires_grad_(False).grad = None

    meter, rates = _meter(), all_rates()[_device()]
    assert meter is not None and rates.multiply_add_rate is not None
    planned = cost(Work(M, K, D, PROCESSES), rates, layout)
    received = received_by(lambda: call(z))  # and the first call of each function, which takes longer
    with_gradients(kernels)
    taken, beside, beside_with_gradients = [], [], []
    for _ in range(rounds):
        started, before = time.perf_counter(), time.process_time()
        rate = meter()
        # A probe that shares its core tells less by the clock than its core gave it.
        rate *= (time.perf_counter() - started) / (time.process_time() - before)
        seconds = _seconds(lambda: call(z))
        taken.append(seconds * rate / rates.multiply_add_rate / planned.compute_seconds)
        beside.append(seconds / _seconds(lambda: kernels(z)))
        seconds = _seconds(lambda: with_gradients(call))
        beside_with_gradients.append(seconds / _seconds(lambda: with_gradients(kernels)))
    return {
        "M": M,
        "K": K,
        "D": D,
        "layout": layout,
        "received": received,
        "planned_received": planned.bytes_received,
        "planned_seconds": planned.compute_seconds,
        "taken_by_planned": median(taken),
        "call_by_kernels": median(beside),
        "call_by_kernels_with_gradients": median(beside_with_gradients),
    }


def _seconds(function: Callable[[], object]) -> float:
    """Of the processor, those of the threads that communicate among them."""
    before = time.process_time()
    function()
    return time.process_time() - before


def received_by(function: Callable[[], object]) -> int:
    """Bytes of floating numbers that come from the other processes in a call; the handshake's are integers."""
    received, all_gather, start_shift = [0], Link.all_gather, Link.start_shift

    def counting_gather(self: Link, value: Tensor) -> Tensor:
        received[0] += (self.size - 1) * value.nbytes * value.is_floating_point()
        return all_gather(self, value)

    def counting_shift(self: Link, sent: Tensor, arriving: Tensor) -> list[dist.Work]:
        received[0] += arriving.nbytes
        return start_shift(self, sent, arriving)

    with mock.patch.multiple(Link, all_gather=counting_gather, start_shift=counting_shift):
        function()
    return received[0]


def markdown(content: dict[str, Any]) -> str:
    """A line for each job and layout."""
    names = {"components": "components sharded", "ring": "a ring"}
    rows = [
        [
            f"{row['M']:,} x {row['K']:,}, D = {row['D']}",
            names[row["layout"]],
            f"{row['received']:,} / {row['planned_received']:,}",
            formatting.duration(row["planned_seconds"]),
            f"{row['taken_by_planned']:.2f}",
            f"{row['call_by_kernels']:.2f}",
            f"{row['call_by_kernels_with_gradients']:.2f}",
        ]
        for row in content["rows"]
    ]
    headings = [
        f"job, {PROCESSES} processes",
        "layout",
        "bytes received / planned",
        "planned",
        "taken / planned",
        "call / kernels alone",
        "with gradients",
    ]
    return formatting.markdown(headings, rows, left=2)


if __name__ == "__main__":
    sys.exit(command.run("ranks_check", __doc__, measure, markdown))
