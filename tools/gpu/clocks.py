"""Two clocks for a GPU: what the device takes for a call, and what the caller does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastvae.benchmarks.timing import cpu_clock

Run = Callable[[], object]
Clock = Callable[[Run, int], float]


class Times(NamedTuple):
    """Of one call, in seconds.

    Attributes:
        kernel: from the first kernel's begin to the last one's end, behind a queue that is full.
        call: by the host's clock, of calls in a row: the launches where kernels are short, else the kernels.
    """

    kernel: float
    call: float


class KernelClock:
    """(run, calls) -> mean seconds on the device; its L2 cache is overwritten before each call.

    The device sleeps until the whole call is in its queue, so that no launch is waited for between the events.
    """

    LONGEST = 1 << 28  # cycles, about an eighth of a second: a call that itself waits for the device is never queued

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2
        self._cycles = 1 << 21  # about a millisecond

    def __call__(self, run: Run, calls: int) -> float:
        return sum(self._once(run) for _ in range(calls)) / calls

    def _once(self, run: Run) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self._cycles)
            self._flush.zero_()
            start.record()
            run()
            end.record()
            queued = not start.query()  # the device was still asleep
            torch.cuda.synchronize()
            if queued or self._cycles >= self.LONGEST:
                return start.elapsed_time(end) / 1000
            self._cycles *= 2


def call_clock(run: Run, calls: int) -> float:
    """Mean seconds of calls in a row, by the host's clock, until the device has done the last one."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def clocks(device: str) -> tuple[Clock, Clock]:
    """(kernel, call) for a device; on the CPU, where a call is its kernels, one clock is both."""
    return (KernelClock(), call_clock) if device == "cuda" else (cpu_clock, cpu_clock)
