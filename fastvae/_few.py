"""Two passes: many things without activations, then few of them again with a gradient.

The bound of many samples (:mod:`fastvae.bounds`) and the density of many encoded components
(:class:`fastvae.priors.encoded.EncodedMixture`) share what is here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvae._noise import part_of_batch

# Rows that a network is given at once without gradients: so many that a CPU's cache holds the activations, or that a
# GPU is kept busy.
_ROWS, _DEVICE_ROWS = 1_000, 50_000


def rows_on(device: torch.device) -> int:
    """How many rows a device takes at once where no activations are kept."""
    return _ROWS if device.type == "cpu" else _DEVICE_ROWS


def samples_on(device: torch.device, points: int) -> int:
    """How many samples of `points` points each, or points of so many samples, make these rows; one at least."""
    return max(1, rows_on(device) // max(1, points))


def forget_casts() -> None:
    """Between the passes: older versions of PyTorch keep, for the second one, a weight that autocast cast in the first,
    without a gradient.  Compiled code casts weights wherever it uses them.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def resampled(v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of the weights v [S, B], none below 0, `count` of each column that stand for all: (s, weight), [count, B].

    Weights above a threshold c are kept as they are.  Of the others each is kept with probability v / c, and then
    weighs c; c is such that `count` are kept.  So the mean of what a sample weighs, 0 if it is not kept, is v.  No
    other choice of `count` samples with this mean has a smaller variance, summed over the samples.

    Where fewer than `count` weights are above 0, these are kept as they are, and what fills their number weighs 0.

    Source: Fearnhead and Clifford, On-line inference for hidden Markov models via particle filters (JRSS B 2003).
    """
    v, order = v.T.sort(-1, descending=True)  # [B, S]
    place = torch.arange(v.shape[-1], device=v.device)
    first = place[:count]
    rest = v.flip(-1).cumsum(-1).flip(-1)[:, :count]  # [B, count]: the sum of the weights from this one on
    thresholds = rest / (count - first)  # c, if those before this one are kept as they are
    as_they_are = (v[:, :count] > thresholds).sum(-1, keepdim=True)  # [B, 1]; where it is no longer true, it stays so
    c = thresholds.gather(-1, as_they_are)
    # The others share count - as_they_are places: one in each stretch of length c of their weights, laid end to end.
    laid = v.masked_fill(place < as_they_are, 0.0).cumsum(-1)
    start = 1 - _uniform(v)[:, None]  # in (0, 1]: a point at 0 would lie before all of them
    points = torch.minimum((first - as_they_are + start) * c, laid[:, -1:])
    drawn = torch.searchsorted(laid, points).clamp(max=v.shape[-1] - 1)  # beyond the last one if v is NaN
    s = torch.where(first < as_they_are, first, drawn)
    weights = torch.where(first < as_they_are, v[:, :count], c)
    return order.gather(-1, s).T, weights.T


def _uniform(v: Tensor) -> Tensor:
    """Numbers in [0, 1), one for each row of v [B, ...]: [B], those of its part of a batch."""
    part = part_of_batch()
    if part is None:
        return torch.rand(len(v), dtype=v.dtype, device=v.device)
    return part.own(torch.rand(part.of, dtype=v.dtype, device=v.device), 0)


def require_repeatable(why: str, network: nn.Module) -> None:
    """ValueError if its output for a row differs from call to call, or with the other rows; why: it is called twice."""
    for module in network.modules():
        if not _repeats_itself(module):
            how = "in training mode" if module.training else "without running statistics"
            raise ValueError(f"{why}, which must give the same output: not so with a {type(module).__name__} {how}")


def _repeats_itself(module: nn.Module) -> bool:
    """Whether PyTorch's module gives a row the same output in each call and whatever the other rows are."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not module.training and module.running_mean is not None
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return not module.training or module.p == 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return not module.training or module.dropout == 0
    return not (module.training and isinstance(module, nn.RReLU))
