"""The table of tile sizes, and how work is cut: by the shapes alone, so that the same call gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_DIMS = 64  # of a slice
PROGRAMS = 264  # as many fill a large GPU twice over; where there are fewer, what each goes through is split


class Tile(NamedTuple):
    """What a program works on at a time, and the launch options that go with it."""

    rows: int
    columns: int
    dims: int  # of the score, or of the parameters' gradients, that a program accumulates
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(n: int, to: int) -> int:
    return cdiv(n, to) * to


def padded_dimensions(precision: str, D: int) -> int:
    """D as the packed operands have it: in whole slices for the product form."""
    return round_up(D, 4 if precision == "highest" else _dims(D))


def _dims(D: int) -> int:
    """The dimensions of a slice."""
    return min(MAX_DIMS, max(16, next_power_of_2(D)))


def capability(device: torch.device) -> int:
    """Ten times the compute capability; 90 where no GPU is asked."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_for(kind: str, precision: str, D: int, arch: int, dtype: torch.dtype = torch.float32) -> Tile:
    """The table's tile for a kind of kernel, "forward", "score" or "parameters".

    Each is, by what `tools.static_report` says, the largest whose registers do not spill and whose operands fit shared
    memory; none was timed on a GPU.  Hopper and data-centre Blackwell have room for more, float64 for less.
    """
    dims = _dims(D)
    if dtype == torch.float64:
        sizes = {"forward": (64, 32), "score": (64, 32), "parameters": (32, 64)}[kind]
        return Tile(*sizes, dims, 8, 1)
    if precision == "highest":
        sizes = {"forward": (128, 128), "score": (128, 64), "parameters": (32, 128)}[kind]
        return Tile(*sizes, dims, 8, 1)
    roomy = arch in (90, 100, 103)
    if kind == "forward":
        if precision == "high" and not (roomy and D <= MAX_DIMS):  # 128 columns spill
            return Tile(128, 64, dims, 8, 3)
        return Tile(128, 128, dims, 8, 3 if precision == "medium" else 2)
    if arch == 90 or (roomy and (precision == "medium" or D <= MAX_DIMS)):
        outer, inner, warps = 128, 64, 8
    else:  # half the registers of a multiprocessor, so that two blocks run at once
        outer, inner, warps = 64, 64 if precision == "medium" else 32, 4
    return Tile(*((outer, inner) if kind == "score" else (inner, outer)), dims, warps, 3)


class Candidate(NamedTuple):
    """A tile to be timed, with the dims of the table's; `where`: the generations on which nothing spills."""

    rows: int
    columns: int
    warps: int
    stages: int
    where: tuple[int, ...] = (80, 90, 100)


# Beside the table's tile.  Which of them spill is what `tools.static_report` says, at 64 dimensions.
OTHERS: dict[tuple[str, str], list[Candidate]] = {
    ("highest", "forward"): [
        Candidate(128, 64, 8, 1),  # half the registers: two blocks at once, one computes while the other loads
        Candidate(64, 64, 4, 1),  # five, and less padding of few rows
        Candidate(32, 128, 4, 1),  # still less
    ],
    ("highest", "score"): [
        Candidate(64, 128, 8, 1),  # longer sums within a thread
        Candidate(128, 128, 8, 1),  # more arithmetic for each load, all registers
        Candidate(32, 64, 4, 1),  # five blocks at once, and less padding of few rows
    ],
    ("highest", "parameters"): [
        Candidate(64, 128, 8, 1),  # longer sums within a thread
        Candidate(64, 64, 8, 1),  # two blocks at once
        Candidate(32, 64, 4, 1),  # three, and less padding of few components
    ],
    ("high", "forward"): [
        Candidate(128, 64, 8, 3, where=(90, 100)),  # fewer registers; one more of the operands on its way
        Candidate(64, 64, 4, 3),  # up to two blocks at once, and less padding of few rows
        Candidate(64, 64, 4, 2),  # two, also where shared memory is small
    ],
    ("high", "score"): [
        Candidate(128, 16, 8, 3, where=(80,)),  # fewer bytes from L2 for each product
        Candidate(128, 32, 8, 3, where=(90, 100)),  # fewer registers
        Candidate(64, 64, 4, 2, where=(90, 100)),  # two blocks at once, so that exponentials and products overlap
        Candidate(64, 32, 4, 2),  # two or three, and less padding of few rows
    ],
    ("high", "parameters"): [
        Candidate(32, 128, 8, 3),  # fewer registers, or fewer bytes from L2
        Candidate(64, 64, 4, 2, where=(100,)),  # two blocks at once
        Candidate(32, 64, 4, 2),  # two or three
    ],
    ("medium", "forward"): [
        Candidate(128, 128, 8, 4),  # more of the operands on their way
        Candidate(128, 256, 8, 2, where=(90,)),  # fewer bytes from L2 for each product
        Candidate(128, 64, 8, 3),  # two blocks at once, so that exponentials and products overlap
        Candidate(64, 64, 4, 3),  # three or four, and less padding of few rows
    ],
    ("medium", "score"): [
        Candidate(128, 64, 8, 3, where=(80,)),  # fewer bytes from L2 for each product
        Candidate(64, 64, 4, 3, where=(90, 100)),  # two blocks at once
        Candidate(128, 32, 8, 3),  # fewer registers
        Candidate(64, 32, 4, 3),  # two blocks, and less padding of few rows
    ],
    ("medium", "parameters"): [
        Candidate(64, 128, 8, 3, where=(80,)),  # fewer bytes from L2 for each product
        Candidate(64, 64, 4, 3, where=(90, 100)),  # two blocks at once
        Candidate(32, 128, 8, 3),  # fewer registers
        Candidate(32, 64, 4, 3),  # up to three blocks
    ],
    ("float64", "forward"): [
        Candidate(32, 64, 8, 1),  # the other way round
        Candidate(32, 32, 8, 1),  # four blocks at once
    ],
    ("float64", "score"): [
        Candidate(32, 64, 8, 1),  # the other way round
        Candidate(32, 32, 4, 1),  # two blocks at once
    ],
    ("float64", "parameters"): [
        Candidate(64, 32, 8, 1),  # two blocks at once
    ],
}


def candidates(kind: str, precision: str, D: int, arch: int, dtype: torch.dtype = torch.float32) -> list[Tile]:
    """The tiles that `autotune.py` times: the table's first, then others that may be faster."""
    first = tile_for(kind, precision, D, arch, dtype)
    generation = 100 if arch in (100, 103) else 90 if arch == 90 else 80  # other GPUs have the least room
    others = OTHERS["float64" if dtype == torch.float64 else precision, kind]
    sizes = (other for other in others if generation in other.where)
    return [first, *(first._replace(rows=o.rows, columns=o.columns, warps=o.warps, stages=o.stages) for o in sizes)]


class Cut(NamedTuple):
    """A side of rows or components, in so many parts of `span` each."""

    parts: int
    span: int


def cut(count: int, tile: int, others: int) -> Cut:
    """Cut `count` tiles into parts, so that with `others` programs for each part there are about PROGRAMS."""
    each = cdiv(count, min(count, cdiv(PROGRAMS, others)))
    return Cut(cdiv(count, each), each * tile)
