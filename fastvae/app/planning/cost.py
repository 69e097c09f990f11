"""What scoring M rows against K components on N devices takes: time, memory, bytes read, bytes received.

A device scores its share as `fastvae.streaming` does, in blocks.  The devices form a mesh of R x C, each with M / R
rows and K / C components, and the C devices that have the same rows gather each other's partial logsumexp of these.  If
the rows alone are sharded, C is 1 and nothing is exchanged; if the components alone are, R is 1.  Or the devices form a
ring, each with M / N rows and K / N components in its memory, and the components travel round it while the devices
compute.  The seconds of one thread, or of a GPU, are

    M K (pair + D number) + calls K D component_number

for a call for each block of rows; the three rates are fitted to records, see tools/tables/cost_rates.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from math import ceil
from typing import Any

from fastvae.streaming import Blocks, blocks

_NUMBER = 4  # bytes of a float32
_LEAST_EFFICIENCY = 0.5  # below it, another device is said to gain little


@dataclass(frozen=True)
class Rates:
    """Seconds of one thread, or of a GPU, by device.

    Attributes:
        source: the record under benchmarks/results/; machine: what it was made on.
        pair, number, component_number: of a pair, of each number of a pair, and of each number of the components in a
            call.
        deviation: the largest relative distance of the fit from a measured time; None where it is one measurement.
        fewest_rows: the record says nothing of calls with fewer.
        multiply_add_rate: floating-point operations a second of one thread that were probed beside; None for a GPU.
    """

    source: str
    machine: str
    pair: float
    number: float
    component_number: float
    deviation: float | None
    fewest_rows: int
    multiply_add_rate: float | None = None


def all_rates() -> dict[str, Rates]:
    """By the name of the device."""
    content: dict[str, Any] = json.loads(files(__package__).joinpath("rates.json").read_text())
    return {name: Rates(**entry) for name, entry in content.items()}


@dataclass(frozen=True)
class Work:
    """What is to be done, and with what.

    Attributes:
        rows, components, dims: M, K, D.
        devices: N.
        threads: of each device, where that is a CPU.
        score: whether the score is computed too.
        memory: bytes for the blocks of one device.
        network: bytes a second that a device receives; None if not known.
    """

    rows: int
    components: int
    dims: int
    devices: int = 1
    threads: int = 1
    score: bool = False
    memory: int = 2**28
    network: float | None = None


@dataclass(frozen=True)
class Cost:
    """Of the device that has most to do, with the rows and components of its share.

    Attributes:
        rows, components: of its share.
        compute_seconds: in the kernels.
        bytes_read: from files, while the kernels run.
        bytes_received: from other devices.
        network_seconds: for these; None where the network's rate is not known.
        memory: bytes of the blocks and of what was received.
        overlap: whether the devices compute while they exchange.
    """

    rows: int
    components: int
    compute_seconds: float
    bytes_read: int
    bytes_received: int
    network_seconds: float | None
    memory: int
    overlap: bool = False

    @property
    def seconds(self) -> float:
        """In all."""
        network = self.network_seconds or 0.0
        return max(self.compute_seconds, network) if self.overlap else self.compute_seconds + network


LAYOUTS = ("rows", "components", "mesh", "ring")
_MOST_COLUMNS = 4096  # of a mesh that are looked at


def mesh_of(work: Work, layout: str) -> tuple[int, int]:
    """(R, C): among how many devices the rows, and the components, are sharded.

    In a mesh, C is the smallest divisor of N with which a device's components stay in memory, to be read once.
    """
    N = work.devices
    if layout == "ring":
        return N, N
    if layout == "rows":
        return N, 1
    if layout == "components":
        return 1, N
    for C in range(1, min(N, _MOST_COLUMNS) + 1):
        rows, components = ceil(work.rows * C / N), ceil(work.components / C)
        if N % C == 0 and _cut(work, rows, components).components >= components:
            return N // C, C
    return 1, N


def _cut(work: Work, rows: int, components: int) -> Blocks:
    return blocks(rows, components, work.dims, score=work.score, memory=work.memory)


def cost(work: Work, rates: Rates, layout: str) -> Cost:
    """The cost of a device, in one of LAYOUTS."""
    R, C = mesh_of(work, layout)
    D, rows, components = work.dims, ceil(work.rows / R), ceil(work.components / C)
    of_component = (2 * D + 1) * _NUMBER
    if layout == "ring":
        pairs, packed = rows * work.components, work.components
        received = bytes_received_in_ring(work.components, D, C)
        read = rows * D * _NUMBER + components * of_component
        # the rank's own components, those that are here and those that arrive, each packed for the kernels once
        memory = Blocks(rows, components).bytes_held(D, score=work.score) + components * of_component
    else:
        cut = _cut(work, rows, components)
        pairs, packed = rows * components, ceil(rows / cut.rows) * components
        received = bytes_received(rows, D, C, score=work.score)
        read = cut.bytes_read(rows, components, D * _NUMBER, of_component)
        memory = cut.bytes_held(D, score=work.score) + (C * cut.rows * _NUMBER if C > 1 else 0)
    seconds = pairs * (rates.pair + D * rates.number) + packed * D * rates.component_number
    network = None if work.network is None else received / work.network
    return Cost(rows, components, seconds / work.threads, read, received, network, memory, overlap=layout == "ring")


def bytes_received(M: int, D: int, N: int, *, score: bool = False) -> int:
    """By each of N devices that share the components.

    Every other device's partial logsumexp, M numbers; and for the score a sum over all devices of M D numbers, by a
    ring, where a device receives 2 (N - 1) / N of them.
    """
    return (N - 1) * M * _NUMBER + (ceil(2 * (N - 1) * M * D / N) * _NUMBER if score else 0)


def bytes_received_in_ring(K: int, D: int, N: int) -> int:
    """By each of N devices past which all components travel: those of the others, with the score or without."""
    return (K - K // N) * (2 * D + 1) * _NUMBER


def efficiency(work: Work, rates: Rates, layout: str) -> float:
    """The time on one device over N times that on N devices; 1 where all devices are of full use."""
    alone = cost(replace(work, devices=1), rates, layout)
    return alone.seconds / (work.devices * cost(work, rates, layout).seconds)


def growth(work: Work, rates: Rates, layout: str, most: int) -> Iterator[tuple[int, Cost]]:
    """The costs of 1, 2, 4, ... devices, `most` at most."""
    devices = 1
    while devices <= most:
        yield devices, cost(replace(work, devices=devices), rates, layout)
        devices *= 2


_WHY = {
    "rows": "every device reads and packs all components, and no number of devices makes that less",
    "components": "a device receives M numbers from every other, which grows with N while its share of the computing "
    "shrinks",
    "mesh": "a device receives M / R numbers from each of the C - 1 others that have its rows, and C need not grow "
    "once the components fit",
    "ring": "all components but its own travel past every device, which takes as long for every N, while the computing "
    "shrinks",
}


def limit(work: Work, rates: Rates, layout: str) -> str:
    """Where more devices stop to help, and why, in a sentence or two."""
    why = _WHY[layout]
    last = work.components if layout == "components" else max(1, work.rows // rates.fewest_rows)
    if layout == "rows" and rates.fewest_rows > 1:
        return (
            f"{why}. The record has no call of fewer than {rates.fewest_rows:,} rows, so that nothing is known of "
            f"more than {last:,} devices"
        )
    here = cost(work, rates, layout)
    if layout != "rows" and work.network is None:
        if here.bytes_received == 0:
            return why
        even = here.bytes_received / here.compute_seconds
        return (
            f"{why}. The records have no network: one that gives a device {even / 1e9:.3g} GB/s takes as long as "
            f"{work.devices:,} devices compute"
        )
    half = _half(work, rates, layout, last)
    if layout != "components":
        return f"{why}. {half}"
    best, least = min(growth(work, rates, layout, last), key=lambda each: each[1].seconds)
    return f"{why}. {half}; the least time, {least.seconds:.3g} s, is that of {best:,}"


def _half(work: Work, rates: Rates, layout: str, most: int) -> str:
    last = 1
    for devices, _ in growth(work, rates, layout, most):
        if efficiency(replace(work, devices=devices), rates, layout) < _LEAST_EFFICIENCY:
            break
        last = devices
    else:
        if last == 1:
            return "There is work for one device alone"
        return f"Up to {last:,} devices are of more than {_LEAST_EFFICIENCY:.0%} use, the most that can share"
    if last == 1:
        return f"One device is of more than {_LEAST_EFFICIENCY:.0%} use, two are not"
    return f"Up to {last:,} devices are of more than {_LEAST_EFFICIENCY:.0%} use, {2 * last:,} are not"
