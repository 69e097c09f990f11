"""Sizes of the tiles, and how work is cut: functions of the shapes alone, so that the same call gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

PROGRAMS = 264  # as many as fill a large GPU twice over; of fewer, one long dimension is split


class Tile(NamedTuple):
    """What a program works on at a time."""

    rows: int
    columns: int
    chunk: int  # features in a step of a product; unused by the difference form
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
    """D as the packed operands have it."""
    return round_up(D, 4 if precision == "highest" else 16)


def capability(device: torch.device) -> int:
    """Ten times the compute capability; 90 where no GPU is asked."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_for(kind: str, precision: str, D: int, arch: int, dtype: torch.dtype = torch.float32) -> Tile:
    """The tile of a kind of kernel, "forward", "score" or "parameters".

    Each was chosen by what `tools.static_report` says: as large as leaves no register spilled, and its operands in
    shared memory; none was timed on a GPU.  Hopper and data-centre Blackwell have room for more, float64 for less.
    """
    dims = min(64, max(16, next_power_of_2(D)))
    if dtype == torch.float64:
        sizes = {"forward": (64, 32), "score": (64, 32), "parameters": (32, 64)}[kind]
        return Tile(*sizes, 4, dims, 8, 1)
    if precision == "highest":
        sizes = {"forward": (128, 128), "score": (128, 64), "parameters": (32, 128)}[kind]
        return Tile(*sizes, 4, dims, 8, 1)
    chunk = 32 if padded_dimensions(precision, D) % 32 == 0 else 16
    if kind == "forward":  # with twice the operands, 128 columns spill on an A100
        return Tile(128, 64 if precision == "high" else 128, chunk, dims, 8, 3)
    inner = 32 if arch in (90, 100, 103) or precision == "medium" or kind == "parameters" else 16
    sizes = {"score": (128, inner), "parameters": (inner, 128)}[kind]
    return Tile(*sizes, chunk, dims, 8, 2)


class Offer(NamedTuple):
    """A tile to be timed, its chunk and dims those of the table's; `where`, by generation, it spills no register."""

    rows: int
    columns: int
    warps: int
    stages: int
    where: tuple[int, ...] = (80, 90, 100)


# Beside the table's.  Which spill is what `tools.static_report` says, at 64 dimensions.
OFFERED: dict[tuple[str, str], list[Offer]] = {
    ("highest", "forward"): [
        Offer(128, 64, 8, 1),  # half the registers: two blocks at once, one computes while the other loads
        Offer(64, 64, 4, 1),  # five, and less padding of few rows
        Offer(32, 128, 4, 1),  # still less
    ],
    ("highest", "score"): [
        Offer(64, 128, 8, 1),  # longer sums within a thread
        Offer(128, 128, 8, 1),  # more arithmetic for each load, all registers
        Offer(32, 64, 4, 1),  # five blocks at once, and less padding of few rows
    ],
    ("highest", "parameters"): [
        Offer(64, 128, 8, 1),  # longer sums within a thread
        Offer(64, 64, 8, 1),  # two blocks at once
        Offer(32, 64, 4, 1),  # three, and less padding of few components
    ],
    ("high", "forward"): [
        Offer(128, 64, 8, 2),  # less shared memory: two blocks at once
        Offer(128, 64, 8, 4),  # more of the operands on their way
        Offer(128, 128, 8, 2, where=(90,)),  # fewer bytes from L2 for each product
        Offer(64, 64, 8, 3),  # two blocks at once, and less padding of few rows
    ],
    ("high", "score"): [
        Offer(128, 16, 8, 3, where=(80,)),  # more of the operands on their way
        Offer(128, 32, 8, 3, where=(90, 100)),
        Offer(64, 32, 4, 2, where=(90, 100)),  # two or three blocks at once
    ],
    ("high", "parameters"): [
        Offer(32, 128, 8, 3),  # more of the operands on their way
        Offer(32, 64, 4, 2),  # two or three blocks at once
    ],
    ("medium", "forward"): [
        Offer(128, 128, 8, 4),  # more of the operands on their way
        Offer(128, 64, 8, 3),  # up to three blocks at once, so that exponentials and products overlap
        Offer(64, 64, 4, 3),  # four, and less padding of few rows
    ],
    ("medium", "score"): [
        Offer(128, 32, 8, 3),  # more of the operands on their way
        Offer(128, 64, 8, 2, where=(90, 100)),  # fewer bytes from L2 for each product
        Offer(64, 32, 4, 2),  # two or three blocks at once
    ],
    ("medium", "parameters"): [
        Offer(32, 128, 8, 3),  # more of the operands on their way
        Offer(64, 64, 8, 2),  # up to two blocks at once
        Offer(32, 64, 4, 2),  # two or three
    ],
    ("float64", "forward"): [
        Offer(32, 64, 8, 1),  # the other way round
        Offer(32, 32, 8, 1),  # four blocks at once
    ],
    ("float64", "score"): [
        Offer(32, 64, 8, 1),  # the other way round
        Offer(32, 32, 4, 1),  # two blocks at once
    ],
    ("float64", "parameters"): [
        Offer(64, 32, 8, 1),  # two blocks at once
    ],
}


def candidates(kind: str, precision: str, D: int, arch: int, dtype: torch.dtype = torch.float32) -> list[Tile]:
    """What `autotune.py` times: the table's tile, which stands first, and others that may be faster."""
    first = tile_for(kind, precision, D, arch, dtype)
    generation = 100 if arch in (100, 103) else 90 if arch == 90 else 80  # of others, what fits the least
    offers = OFFERED["float64" if dtype == torch.float64 else precision, kind]
    sizes = (offer for offer in offers if generation in offer.where)
    return [first, *(first._replace(rows=o.rows, columns=o.columns, warps=o.warps, stages=o.stages) for o in sizes)]


class Cut(NamedTuple):
    """A dimension of length `count` tiles, of `tile` each, in `parts` of `span`."""

    parts: int
    span: int


def cut(count: int, tile: int, others: int) -> Cut:
    """Split `count` tiles so that with `others` programs beside each there are about PROGRAMS."""
    each = cdiv(count, min(count, cdiv(PROGRAMS, others)))
    return Cut(cdiv(count, each), each * tile)
