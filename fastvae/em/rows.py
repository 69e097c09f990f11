"""The rows that a mixture is fitted to: a tensor, an array that may be a memory map, or batches one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae import _checks
from fastvae.contracts import describe
from fastvae.em.statistics import ROWS


class Batch(NamedTuple):
    """z [B, D], contiguous, float32 or float64, all finite; row_weights [B], all > 0, in that dtype; None, 1 each."""

    z: Tensor
    row_weights: Tensor | None


class StoredRows:
    """Rows that can be read in any order: a tensor or a NumPy array [N, D]."""

    def __init__(self, z: Any, sample_weight: Any, device: torch.device | str | None) -> None:
        if z.ndim != 2 or 0 in z.shape:
            raise ValueError(f"z must be [N, D] with N >= 1 and D >= 1, not {list(z.shape)}")
        self.z, self.device = z, device
        self._finite = False  # once all rows were read
        self.row_weights: Tensor | None = None
        if sample_weight is not None:
            self.row_weights = _checked_weights(_tensor("sample_weight", sample_weight), len(z)).cpu()
            if not bool((self.row_weights > 0).any()):
                raise ValueError("sample_weight must be above 0 for one row at least")

    def __len__(self) -> int:
        return len(self.z)

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """n rows of positive weight at random, all where there are no more."""
        if self.row_weights is None:
            usable = torch.arange(len(self)) if len(self) <= n else torch.randperm(len(self), generator=generator)
        else:
            usable = self.row_weights.nonzero()[:, 0]
            usable = usable[torch.randperm(len(usable), generator=generator)]
        return self._read(usable[:n].sort().values)

    def in_order(self) -> Iterator[Batch]:
        """All rows, some at a time."""
        for start in range(0, len(self), ROWS):
            yield self._read(slice(start, start + ROWS))
        self._finite = True

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """All rows in batches of rows drawn at random."""
        for index in torch.randperm(len(self), generator=generator).split(batch_size):
            yield self._read(index.sort().values)
        self._finite = True

    def _read(self, rows: slice | Tensor) -> Batch:
        if isinstance(self.z, Tensor):
            z = self.z[rows.to(self.z.device) if isinstance(rows, Tensor) else rows]
        else:
            z = _tensor("z", self.z[rows.numpy() if isinstance(rows, Tensor) else rows])
        weights = None if self.row_weights is None else self.row_weights[rows]
        return _batch(z, weights, self.device, check=not self._finite)


class Stream:
    """Batches in the order in which an iterable gives them: tensors [B, D], or tuples (z,) or (z, sample_weight)."""

    def __init__(self, batches: Iterable[Any], device: torch.device | str | None) -> None:
        self.batches, self.device = batches, device
        self.once = iter(batches) is batches  # an iterator, whose batches come once
        self._read_ahead: list[Batch] = []
        self._first: Batch | None = None

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """The first n rows, or somewhat more: whole batches."""
        taken: list[Batch] = []
        for batch in self.in_order():
            taken.append(batch)
            if sum(len(b.z) for b in taken) >= n:
                break
        if not taken:
            raise ValueError("z must give at least one batch, and has none")
        if self.once:
            self._read_ahead = taken
        z = torch.cat([b.z for b in taken])
        if all(b.row_weights is None for b in taken):
            return Batch(z, None)
        weights = torch.cat([z.new_ones(len(b.z)) if b.row_weights is None else b.row_weights for b in taken])
        return Batch(z, weights)

    def in_order(self) -> Iterator[Batch]:
        """The batches of one pass that have rows."""
        ahead, self._read_ahead = self._read_ahead, []
        batches = (self._read(batch) for batch in self.batches)
        return itertools.chain(ahead, (batch for batch in batches if len(batch.z)))

    def _read(self, batch: Any) -> Batch:
        z, weights = batch, None
        if isinstance(batch, tuple | list):
            if len(batch) not in (1, 2):
                raise TypeError(
                    f"a batch of z must be a tensor [B, D], (z,) or (z, sample_weight), not {describe(batch)}"
                )
            z, weights = batch[0], batch[1] if len(batch) == 2 else None
        z = _tensor("a batch of z", z)
        if z.ndim != 2 or z.shape[1] == 0:
            raise ValueError(f"a batch of z must be [B, D] with D >= 1, not {list(z.shape)}")
        if weights is not None:
            weights = _checked_weights(_tensor("the sample_weight of a batch", weights), len(z))
        read = _batch(z, weights, self.device)
        first = self._first = self._first or read
        if read.z.shape[1] != first.z.shape[1] or read.z.dtype != first.z.dtype:
            raise ValueError(
                f"a batch of z must be {first.z.dtype} [B, {first.z.shape[1]}] as the first, not {read.z.dtype} "
                f"{list(read.z.shape)}"
            )
        return read


def rows_of(z: Any, sample_weight: Any, device: torch.device | str | None) -> StoredRows | Stream:
    """The rows of what a user gives as z.

    Raises:
        TypeError, ValueError: as :func:`fastvae.fit_mixture`.
    """
    if isinstance(z, Tensor) or hasattr(z, "__array__"):
        if isinstance(z, Tensor):
            _checks.result_dtype(z=z)
            if z.is_meta:
                raise ValueError("z must hold values, and a tensor on the meta device has none")
        # of a data frame the array, whose indices are rows; a memory map is its own array
        return StoredRows(z.detach() if isinstance(z, Tensor) else z.__array__(), sample_weight, device)
    if not isinstance(z, Iterable) or isinstance(z, str | bytes | dict):
        raise TypeError(f"z must be a tensor or an array [N, D], or an iterable of batches, not {describe(z)}")
    if sample_weight is not None:
        raise ValueError("sample_weight must be None where z is an iterable: its batches may be (z, sample_weight)")
    return Stream(z, device)


def _tensor(name: str, value: Any) -> Tensor:
    """value as a tensor, by way of NumPy where it is an array."""
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "__array__"):
        array = value.__array__()
        # PyTorch warns of an array that may not be written to, and takes none with negative strides
        try:
            return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} must be of a dtype that PyTorch has, in this machine's byte order, not {array.dtype}: "
                f'{name}.astype("float64") converts it'
            ) from None
    raise TypeError(f"{name} must be a tensor or an array, not {describe(value)}")


def _checked_weights(weights: Tensor, n: int) -> Tensor:
    if not weights.is_floating_point():
        raise TypeError(f"sample_weight must be floating, not {weights.dtype}")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight must be [{n}], a weight for each row, not {list(weights.shape)}")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("sample_weight must be finite and >= 0")
    return weights


def _batch(z: Tensor, row_weights: Tensor | None, device: torch.device | str | None, check: bool = True) -> Batch:
    dtype = _checks.compute_dtype(_checks.result_dtype(z=z))
    z = z.to(device or z.device, dtype).contiguous()
    if check:
        bad = ~torch.isfinite(z).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"z must be finite, but {int(bad.sum())} of {len(z)} rows hold NaN or infinity: leave them out, "
                "z[torch.isfinite(z).all(1)]"
            )
    if row_weights is None:
        return Batch(z, None)
    row_weights = row_weights.to(z)
    # Rows of weight 0 are left out: 0 times the log density of one that lies too far away, -inf, would be NaN.
    counted = row_weights > 0
    return Batch(z, row_weights) if bool(counted.all()) else Batch(z[counted], row_weights[counted])
