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


def tile_for(kind: str, precision: str, D: int, arch: int) -> Tile:
    """The tile of a kind of kernel, "forward", "score" or "parameters".

    Each was chosen by what `benchmarks.static_report` says: as large as leaves no register spilled, and its operands in
    shared memory; none was timed on a GPU.  Hopper and data-centre Blackwell have room for more.
    """
    dims = min(64, max(16, next_power_of_2(D)))
    if precision == "highest":
        sizes = {"forward": (128, 128), "score": (128, 64), "parameters": (32, 128)}[kind]
        return Tile(*sizes, 4, dims, 8, 1)
    chunk = 32 if padded_dimensions(precision, D) % 32 == 0 else 16
    if kind == "forward":  # with twice the operands, 128 columns spill on an A100
        return Tile(128, 64 if precision == "high" else 128, chunk, dims, 8, 3)
    inner = 32 if arch in (90, 100, 103) or precision == "medium" or kind == "parameters" else 16
    sizes = {"score": (128, inner), "parameters": (inner, 128)}[kind]
    return Tile(*sizes, chunk, dims, 8, 2)


class Cut(NamedTuple):
    """A dimension of length `count` tiles, of `tile` each, in `parts` of `span`."""

    parts: int
    span: int


def cut(count: int, tile: int, others: int) -> Cut:
    """Split `count` tiles so that with `others` programs beside each there are about PROGRAMS."""
    each = cdiv(count, min(count, cdiv(PROGRAMS, others)))
    return Cut(cdiv(count, each), each * tile)
