"""Time of several contenders, measured in turn so that a busy machine treats them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: measure each contender for about so long.
        min_rounds, max_rounds: bounds on the number of rounds.
        sample_seconds: a sample is the mean of as many calls as take about so long.
    """

    seconds: float = 1.0
    min_rounds: int = 3
    max_rounds: int = 60
    sample_seconds: float = 0.005


FULL, QUICK = Settings(), Settings(seconds=0.1, max_rounds=5)
WARM_BELOW = 0.05  # seconds; if a call is shorter, a sample is preceded by as many calls untimed: caches are warm


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": median(samples), "low": low, "high": high, "rounds": len(samples)}


def clock_for(device: str) -> Callable[[Run, int], float]:
    """The clock of a device: (run, calls) -> mean seconds of a call."""
    return CudaClock() if device.startswith("cuda") else cpu_clock


def cpu_clock(run: Run, calls: int) -> float:
    """Mean wall-clock seconds of `calls` calls; what a call returns is freed within its time."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class CudaClock:
    """CUDA events around each call, the L2 cache overwritten before it."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2

    def __call__(self, run: Run, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            total += start.elapsed_time(end) / 1000
        return total / calls


def interleave(
    runs: Mapping[str, Run],
    clock: Callable[[Run, int], float],
    settings: Settings,
    *,
    meters: Mapping[str, Callable[[], float]] | None = None,
    already: Mapping[str, Sequence[float]] | None = None,
    watch: Callable[[str, int], None] = lambda name, samples: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run all contenders in turn, round after round, until each has its time and its rounds.

    Args:
        runs: what to time, each already warm.
        clock: see :func:`clock_for`.
        meters: limits of the machine to probe once a round, each returning a rate.
        already: samples that a contender has from before; they count as rounds.
        watch: told who is next, and how many samples it has.

    Returns:
        (seconds of a call, by contender; rates, by meter), a value for each round.
    """
    meters, already = meters or {}, already or {}
    samples = {name: list(already.get(name, ())) for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in meters}
    calls = {name: 1 for name in runs}
    spent = {name: sum(samples[name]) for name in runs}
    turn = list(runs)

    def unfinished(name: str) -> bool:
        count = len(samples[name])
        return count < settings.min_rounds or (count < settings.max_rounds and spent[name] < settings.seconds)

    gc.disable()  # a collection would fall on whoever is running
    try:
        while turn := [name for name in turn if unfinished(name)]:
            for name in turn:
                watch(name, len(samples[name]))
                if not samples[name]:
                    calls[name] = max(1, round(settings.sample_seconds / max(clock(runs[name], 1), 1e-7)))
                elif samples[name][-1] < WARM_BELOW:
                    time.sleep(0.002)  # threads of whoever ran before may still spin, waiting for work
                    clock(runs[name], calls[name])
                seconds = clock(runs[name], calls[name])
                samples[name].append(seconds)
                spent[name] += seconds * calls[name]
            for meter, probe in meters.items():
                rates[meter].append(probe())
            turn.append(turn.pop(0))  # another contender begins, so that no one always follows the same
    finally:
        gc.enable()
    return samples, rates
