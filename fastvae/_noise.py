"""The standard normal numbers that the samplers draw: one 64-bit seed a call, Philox4x32-10, Box-Muller.

`reference.py` states the same sequence in code of its own; the compiled kernels and Triton have theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)  # -1/2 of it is log N(0; 0, 1)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of the counter's words 0 and 2
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # what the two words of the key grow by from round to round


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One 64-bit seed, int64 [1], from `generator` or from the default generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


class PartOfBatch(NamedTuple):
    """Rows of a batch whose other rows other processes have.

    A number of the noise belongs to a place in the batch.  So this process draws the noise of the whole batch, from the
    seed that the others have too, and takes the part of its own rows.  One process with the whole batch does the same.
    """

    first: int  # the place of this process's first row in the batch
    rows: int  # how many it has
    of: int  # the rows of the whole batch

    def widened(self, value: Tensor) -> Tensor:
        """[..., rows, D] -> [..., of, D], with zeros for the rows of others."""
        if value.ndim < 2 or value.shape[-2] != self.rows:
            raise ValueError(f"mu must be [..., {self.rows}, D], the rows of this process, not {list(value.shape)}")
        return torch.nn.functional.pad(value, (0, 0, self.first, self.of - self.first - self.rows))

    def own(self, value: Tensor, dim: int) -> Tensor:
        """Of a result for the whole batch, the part of this process's rows."""
        return value.narrow(dim, self.first, self.rows)


_part: PartOfBatch | None = None  # for the whole process, as `use_backend` is


def part_of_batch() -> PartOfBatch | None:
    """The part of a batch that the rows of the samplers are, inside `rows_of_batch`; None elsewhere."""
    return _part


@contextmanager
def rows_of_batch(part: PartOfBatch | None) -> Iterator[None]:
    """Have the samplers draw the noise that these rows of a batch have; None: the rows are a whole batch."""
    global _part
    before, _part = _part, part
    try:
        yield
    finally:
        _part = before


def normal(seed: Tensor, start: int, count: int) -> Tensor:
    """Numbers `start` ... `start + count - 1` of the sequence of a seed [1]: float64 [count], float32 on mps.

    Block j of Philox gives the numbers 4j ... 4j + 3, a cosine and a sine from each pair (w, w') of its words:
    sqrt(-2 log u) cos(2 pi u') and sqrt(-2 log u) sin(2 pi u'), with u = (w + 1/2) / 2^32 and u' = w' / 2^32.
    """
    dtype = torch.float32 if seed.device.type == "mps" else torch.float64
    first, end = start // 4, (start + count + 3) // 4
    words = torch.stack(_philox(torch.arange(first, end, device=seed.device), seed.reshape(())), -1)  # [blocks, 4]
    w, angle = words[:, 0::2], words[:, 1::2].to(dtype) * (2 * math.pi / 2**32)  # [blocks, 2]
    # u and 1 - u are exact, each in its half of (0, 1); the logarithm of the smaller one loses no digits
    from_zero, from_one = (w.to(dtype) + 0.5) / 2**32, ((_WORD - w).to(dtype) + 0.5) / 2**32
    radius = torch.sqrt(-2 * torch.where(w <= _WORD // 2, torch.log(from_zero), torch.log1p(-from_one)))
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)  # [blocks, 2, 2]
    return pairs.flatten()[start - 4 * first :][:count]


def _philox(block: Tensor, seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 of the 128-bit counters `block` under the 64-bit key `seed`: four words, int64 [blocks] each.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    zero = torch.zeros_like(block)
    counter = [block & _WORD, block >> 32, zero, zero]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        # a product of two words fits 64 bits; int64 wraps around, but its bits are those of the product
        even, odd = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            ((odd >> 32) & _WORD) ^ counter[1] ^ key[0],
            odd & _WORD,
            ((even >> 32) & _WORD) ^ counter[3] ^ key[1],
            even & _WORD,
        ]
        key = [(word + step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True)]
    return counter
