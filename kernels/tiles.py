"""Sizes of the tiles, and how work is cut: functions of the shapes alone, so that the same call gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

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


def tile_for(kind: str, precision: str, D: int) -> Tile:
    """The tile of a kind of kernel: "forward", "score" or "parameters"."""
    padded = padded_dimensions(precision, D)
    if precision == "highest":
        dims = min(64, max(16, next_power_of_2(D)))
        sizes = {"forward": (128, 128), "score": (128, 32), "parameters": (32, 128)}[kind]
        return Tile(*sizes, 4, dims, 8, 1)
    chunk = next(c for c in (32, 16) if padded % c == 0)
    dims = min(64, max(16, next_power_of_2(D)))
    if kind == "forward":  # twice the operands: with 128 columns too, an A100 runs out of registers
        return Tile(128, 64 if precision == "high" else 128, chunk, dims, 8, 3)
    sizes = {"score": (128, 32), "parameters": (32, 128)}[kind]
    return Tile(*sizes, chunk, dims, 8, 2)


class Cut(NamedTuple):
    """A dimension of length `count` tiles, of `tile` each, in `parts` of `span`."""

    parts: int
    span: int


def cut(count: int, tile: int, others: int) -> Cut:
    """Split `count` tiles so that with `others` programs beside each there are about PROGRAMS."""
    each = cdiv(count, min(count, cdiv(PROGRAMS, others)))
    return Cut(cdiv(count, each), each * tile)
