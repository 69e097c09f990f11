"""How much memory one call takes beyond what is there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

MIN_BYTES = 1_000_000  # below it nothing can be told, because threads report in steps of some hundred kilobytes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_peak(run: Callable[[], object], device: str) -> int | None:
    """The highest memory use during `run()` less that before it, bytes; its result counts.  None if unknown.

    On the CPU this is resident memory, by Linux's high-water mark, which is set back first.  See MIN_BYTES.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_free_memory()
    try:
        _CLEAR.write_text("5")  # 5: the high-water mark becomes what is resident now
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:  # not Linux, or a sandbox without /proc
        run()
        return None


def memory_limit(device: str) -> int:
    """What a contender may be expected to take: 70 % of what is free, bytes."""
    if device.startswith("cuda"):
        return int(0.7 * torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = 8 << 30  # a guess that a small machine survives
    return int(0.7 * available)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _return_free_memory() -> None:
    """Make the C library give back what it keeps, so that a call cannot live on what an earlier one left."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
