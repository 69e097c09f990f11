"""The choice of tiles by time, with FASTVAE_AUTOTUNE=1: made once for each kind of problem, and kept in a file.

A tile size decides the order of a sum, so another choice gives other bits.  The choice is therefore made once: the
first call with a key times the candidates of `tiles.py`, and every later call, in this process or another, takes the
choice from the file (`tuned_tiles.py`).  docs/developers/triton-kernels.md describes the key and the file.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import tiles, tuned_tiles
from .launch import INTERPRETED
from .tiles import Tile
from .tuned_tiles import Timed

Run = Callable[[Tile], object]
Clock = Callable[[Callable[[], object]], float]
ENOUGH_MILLISECONDS = 5.0  # for each candidate, once it is compiled
MIN_CALLS, MAX_CALLS = 3, 20

_known: dict[Key, Tile] = {}
_one_at_a_time = threading.Lock()  # backward runs in threads of its own, and timings must not overlap


class Key(NamedTuple):
    """What the best tile depends on, as far as the shapes and the machine decide."""

    device: str
    capability: int  # ten times
    triton: str
    kind: str  # with the sums that are wanted, and whether tiles may be skipped
    precision: str
    dtype: str
    D: int  # padded
    shared: bool  # whether all components have one variance
    M: int  # rounded up to a power of two, as is K, so that a changing batch is not timed again and again
    K: int

    def __str__(self) -> str:
        variance = "one variance" if self.shared else "a variance each"
        return (
            f"{self.device}, sm_{self.capability}, Triton {self.triton}, {self.kind}, {self.precision}, {self.dtype}, "
            f"D {self.D}, {variance}, M {self.M}, K {self.K}"
        )


def key_of(kind: str, precision: str, z: Tensor, mu: Tensor, logvar: Tensor, detail: str) -> Key:
    (M, D), K = z.shape, len(mu)
    return Key(
        _name(z.device), tiles.capability(z.device), triton.__version__, f"{kind}{detail}", precision,
        str(z.dtype).removeprefix("torch."), tiles.padded_dimensions(precision, D), len(logvar) != K,
        tiles.next_power_of_2(M), tiles.next_power_of_2(K),
    )  # fmt: skip


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def milliseconds(run: Callable[[], object]) -> float:
    """The median of some calls on the current stream, launches included."""
    run()  # compiles
    times: list[float] = []
    while len(times) < MIN_CALLS or (len(times) < MAX_CALLS and sum(times) < ENOUGH_MILLISECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def clock_of(device: torch.device) -> Clock | None:
    """What times calls on a device; None where times say nothing, as in the interpreter."""
    return None if INTERPRETED or device.type != "cuda" else milliseconds


def choose(kind: str, precision: str, z: Tensor, mu: Tensor, logvar: Tensor, run: Run, detail: str = "") -> Tile:
    """The tile for a call: the table's, or with FASTVAE_AUTOTUNE=1 the fastest candidate.

    run: the call itself with a given tile, which may run any number of times.
    detail: what else of the call decides its time, for the key.
    """
    call = kind, precision, z.shape[1], tiles.capability(z.device), z.dtype
    if os.environ.get("FASTVAE_AUTOTUNE") != "1" or (clock := clock_of(z.device)) is None:
        return tiles.tile_for(*call)
    key = key_of(kind, precision, z, mu, logvar, detail)
    if (tile := _known.get(key)) is not None:
        return tile
    candidates = tiles.candidates(*call)
    if _capturing():
        return tuned_tiles.find(str(key), candidates) or candidates[0]
    with _one_at_a_time:
        if (tile := _known.get(key) or tuned_tiles.find(str(key), candidates)) is None:
            timed = time_all(candidates, run, clock)
            if timed[0].milliseconds is None:
                return candidates[0]  # the caller sees its failure
            tile = tuned_tiles.keep(str(key), timed, candidates)
        _known[key] = tile
    return tile


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: meanwhile nothing can be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def time_all(candidates: list[Tile], run: Run, clock: Clock) -> list[Timed]:
    """Every candidate: the fastest first, those that failed last."""
    timed = []
    for tile in candidates:
        try:
            timed.append(Timed(tile, clock(functools.partial(run, tile))))
        except Exception as error:  # out of shared memory, or any of the compiler's
            timed.append(Timed(tile, None, f"{type(error).__name__}: {error}".splitlines()[0]))
    return sorted(timed, key=lambda one: math.inf if one.milliseconds is None else one.milliseconds)
