"""A batch of mixtures in one form, whatever its batch shape and whichever parameters its mixtures share.

B is the number of mixtures that really differ, R the number of points that each of them meets:

    value [B, R, D],  locs [B, K, D],  scale [B, K, D],  log_weights [B, K]

A parameter that all mixtures share has 1 in the place of B, a scale that all components share 1 in the place of K.
What is shared shows: it has no such dimension, one of size 1, or one of stride 0, which `expand` makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvae import _torch_compat
from fastvae.backends.composite import chunk_on


class Mixtures(NamedTuple):
    """The mixtures that differ, and how a batch of points is sorted by them."""

    locs: Tensor  # [1 or B, K, D]
    scale: Tensor  # [1 or B, 1 or K, D]
    log_weights: Tensor  # [1 or B, K]
    batch_shape: tuple[int, ...]
    differing: tuple[int, ...]  # the dimensions of batch_shape along which the mixtures differ

    @property
    def number(self) -> int:
        """B."""
        return math.prod([self.batch_shape[i] for i in self.differing])

    def rows(self, sample_shape: tuple[int, ...]) -> int:
        """R, of sample_shape points for each mixture of the batch."""
        alike = [size for i, size in enumerate(self.batch_shape) if i not in self.differing]
        return math.prod(sample_shape) * math.prod(alike)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.locs, self.scale, self.log_weights

    def sorted(self, value: Tensor) -> Tensor:
        """[*S, *batch_shape, D] as [B, R, D]."""
        value = value.movedim(self._places(value.ndim - 1), tuple(range(len(self.differing))))
        R = math.prod(value.shape[len(self.differing) : -1])  # spelt out: -1 is ambiguous for an empty batch
        return value.reshape(self.number, R, value.shape[-1])

    def unsorted(self, result: Tensor, sample_shape: tuple[int, ...]) -> Tensor:
        """[B, R, ...] as [*sample_shape, *batch_shape, ...]."""
        lead = (*sample_shape, *self.batch_shape)
        places = self._places(len(lead))
        rest = [size for i, size in enumerate(lead) if i not in places]
        result = result.reshape((*(lead[i] for i in places), *rest, *result.shape[2:]))
        return result.movedim(tuple(range(len(places))), places)

    def _places(self, ndim: int) -> tuple[int, ...]:
        """Where the differing dimensions are among `ndim`, of which batch_shape is the last."""
        return tuple(ndim - len(self.batch_shape) + i for i in self.differing)


def mixtures(locs: Tensor, scale: Tensor, logits: Tensor, batch_shape: tuple[int, ...], dtype: torch.dtype) -> Mixtures:
    """The one form of locs [..., K, D], scale [..., 1 or K, D] and logits [..., K], in `dtype`.

    What comes before K broadcasts to batch_shape.  It had better not be expanded to it: the gradient of an expanded
    tensor is held in full.
    """
    n = len(batch_shape)
    locs, scale, logits = _aligned(locs, n, 2), _aligned(scale, n, 2), _aligned(logits, n, 1)
    differing = tuple(i for i in range(n) if any(p.shape[i] != 1 for p in (locs, scale, logits)))
    shape = [batch_shape[i] for i in differing]

    def joined(parameter: Tensor) -> Tensor:
        own = parameter.shape[n:]
        if all(size == 1 for size in parameter.shape[:n]):
            return parameter.reshape(1, *own).to(dtype)
        kept = parameter.reshape(*(parameter.shape[i] for i in differing), *own)
        return kept.expand(*shape, *own).reshape(math.prod(shape), *own).to(dtype)

    log_weights = joined(logits).log_softmax(-1)
    scale = scale if _differs(scale, n) else scale.narrow(n, 0, 1)
    return Mixtures(joined(locs), joined(scale), log_weights, batch_shape, differing)


def _aligned(parameter: Tensor, n: int, own: int) -> Tensor:
    """parameter with n dimensions before its `own` last ones, and 1 in the place of each that was expanded."""
    parameter = parameter.reshape((1,) * (n + own - parameter.ndim) + parameter.shape)
    for i in range(n):
        if not _differs(parameter, i):
            parameter = parameter.narrow(i, 0, 1)
    return parameter


def _differs(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor may hold different things along a dimension."""
    size = tensor.shape[dim]
    return size == 0 or (size > 1 and tensor.stride(dim) != 0)


def without_absent(locs: Tensor, scale: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parameters of mixtures with those of the components of weight 0 replaced by 0 and 1.

    A component of weight 0 is not there, but 0 times its parameters would be NaN where these are not finite.
    """
    absent = log_weights == -math.inf  # [1 or B, K]
    if locs.shape[0] == 1:
        absent = absent.all(0, keepdim=True)
    locs = locs.masked_fill(absent[..., None], 0.0)
    if scale.shape[1] == locs.shape[1]:
        absent = absent.all(0, keepdim=True) if scale.shape[0] == 1 else absent
        scale = scale.masked_fill(absent[..., None], 1.0)
    return locs, scale, log_weights


def blocks(value: Tensor, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the mixtures and of their points, so that `numbers` for each point make arrays of a chunk at most.

    All points of several mixtures, or some points of one: one block after the other is the order of value [B, R, D].
    """
    B, R, _ = value.shape
    rows = max(1, chunk_on(value.device, value.element_size()) // numbers)
    if rows >= R:
        step = rows // max(1, R)
        yield from ((slice(b, min(b + step, B)), slice(0, R)) for b in range(0, B, step))
    else:
        yield from ((slice(b, b + 1), slice(r, min(r + rows, R))) for b in range(B) for r in range(0, R, rows))


def of_mixture(parameter: Tensor, b: slice) -> Tensor:
    """What the mixtures b have of a parameter [1 or B, ...]."""
    return parameter if parameter.shape[0] == 1 else parameter[b]


def by_blocks(function: Callable[..., Tensor], value: Tensor, *parameters: Tensor) -> Tensor:
    """function(value, locs, ...), [B, R, ...], in blocks; what a block holds is computed again in backward.

    Within torch.func's transforms, which know no checkpoints, all blocks are kept for backward.
    """
    pieces = list(blocks(value, math.prod(parameters[0].shape[1:])))
    if len(pieces) < 2:
        return function(value, *parameters)
    if not _torch_compat.in_functorch_transform():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = [function(value[b, r], *(of_mixture(p, b) for p in parameters)) for b, r in pieces]
    return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, value.shape[:2])
