"""What scoring M rows against K components on N devices takes: time, memory, bytes read, bytes received.

A device scores its share as `fastvae.streaming` does, in blocks.  Rows are sharded, so that each device has all
components and nothing is exchanged; or components are, so that each device has all rows and the devices gather each
other's partial logsumexp, M numbers.  The seconds of one thread, or of a GPU, are

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
    """

    rows: int
    components: int
    compute_seconds: float
    bytes_read: int
    bytes_received: int
    network_seconds: float | None
    memory: int

    @property
    def seconds(self) -> float:
        """In all; computing and exchanging do not overlap."""
        return self.compute_seconds + (self.network_seconds or 0.0)


LAYOUTS = ("rows", "components")


def cost(work: Work, rates: Rates, sharded: str) -> Cost:
    """The cost of a device, with "rows" or "components" sharded."""
    N, D = work.devices, work.dims
    rows = ceil(work.rows / N) if sharded == "rows" else work.rows
    components = ceil(work.components / N) if sharded == "components" else work.components
    cut: Blocks = blocks(rows, components, D, score=work.score, memory=work.memory)
    pairs = rows * components * (rates.pair + D * rates.number)
    packing = ceil(rows / cut.rows) * components * D * rates.component_number
    received = bytes_received(work.rows, D, N, score=work.score) if sharded == "components" else 0
    gathered = N * cut.rows * _NUMBER if sharded == "components" and N > 1 else 0
    return Cost(
        rows,
        components,
        (pairs + packing) / work.threads,
        cut.bytes_read(rows, components, D * _NUMBER, (2 * D + 1) * _NUMBER),
        received,
        None if work.network is None else received / work.network,
        cut.bytes_held(D, score=work.score) + gathered,
    )


def bytes_received(M: int, D: int, N: int, *, score: bool = False) -> int:
    """By each of N devices that share the components.

    Every other device's partial logsumexp, M numbers; and for the score a sum over all devices of M D numbers, by a
    ring, where a device receives 2 (N - 1) / N of them.
    """
    return (N - 1) * M * _NUMBER + (ceil(2 * (N - 1) * M * D / N) * _NUMBER if score else 0)


def efficiency(work: Work, rates: Rates, sharded: str) -> float:
    """The time on one device over N times that on N devices; 1 where all devices are of full use."""
    alone = cost(replace(work, devices=1), rates, sharded)
    return alone.seconds / (work.devices * cost(work, rates, sharded).seconds)


def growth(work: Work, rates: Rates, sharded: str, most: int) -> Iterator[tuple[int, Cost]]:
    """The costs of 1, 2, 4, ... devices, `most` at most."""
    devices = 1
    while devices <= most:
        yield devices, cost(replace(work, devices=devices), rates, sharded)
        devices *= 2


def limit(work: Work, rates: Rates, sharded: str) -> str:
    """Where more devices stop to help, and why, in a sentence or two."""
    if sharded == "rows":
        why = "every device reads and packs all components, and no number of devices makes that less"
        last = max(1, work.rows // rates.fewest_rows)
        if rates.fewest_rows > 1:
            return (
                f"{why}. The record has no call of fewer than {rates.fewest_rows:,} rows, so that nothing is known of "
                f"more than {last:,} devices"
            )
        return f"{why}. {_half(work, rates, sharded, last)}"
    why = "a device receives M numbers from every other, which grows with N while its share of the computing shrinks"
    if work.network is None:
        if work.devices == 1:
            return why
        here = cost(work, rates, sharded)
        even = here.bytes_received / here.compute_seconds
        return (
            f"{why}. The records have no network: one that gives a device {even / 1e9:.3g} GB/s takes as long as "
            f"{work.devices:,} devices compute"
        )
    best, least = min(growth(work, rates, sharded, work.components), key=lambda each: each[1].seconds)
    half = _half(work, rates, sharded, work.components)
    return f"{why}. {half}; the least time, {least.seconds:.3g} s, is that of {best:,}"


def _half(work: Work, rates: Rates, sharded: str, most: int) -> str:
    last = 1
    for devices, _ in growth(work, rates, sharded, most):
        if efficiency(replace(work, devices=devices), rates, sharded) < _LEAST_EFFICIENCY:
            break
        last = devices
    else:
        return f"Up to {last:,} devices are of more than {_LEAST_EFFICIENCY:.0%} use, the most that can share"
    return f"Up to {last:,} devices are of more than {_LEAST_EFFICIENCY:.0%} use, {2 * last:,} are not"
