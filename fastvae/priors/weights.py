"""Log weights from weights, with the right gradient where a weight is 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvae.contracts import is_readable, require_tensor


def log_weights_of(probs: Tensor) -> Tensor:
    """log w of weights w for :func:`fastvae.mixture_log_prob`, with a finite gradient also where a weight is 0.

    A component of weight 0 is not there: its log weight is -inf, and it gets a gradient of 0.  `probs.log()` has the
    same values, but autograd makes NaN of such a weight's gradient, 0 / 0.

    Of the derivative d log p / d w_k = N_k / p only as much comes back as goes by way of log w_k:

    - w_k > 0: N_k / p, as the gradient r_k in log w_k, divided by w_k.  By default the compiled kernels leave out
      responsibilities r_k below a rounding (see `dense_backward`), and r_k / w_k of a small w_k is not small: a
      gradient of 0 comes back where w_k is about 1e-10 or less.  With `dense_backward=True` it is N_k / p.
    - w_k = 0: N_k / p is not 0 there, but r_k is, so it cannot be had.  The gradient is 0, and a step along it leaves
      the component out of the mixture.  A component that training may bring in needs a weight above 0 to start from.

    Args:
        probs: weights >= 0, any shape.  They are not normalised.

    Returns:
        Their logarithms, in the same shape; -inf for a weight of 0.

    Raises:
        TypeError: probs is not a floating tensor.
        ValueError: a weight is negative (on the CPU; elsewhere, and in a compiled function, its logarithm is NaN).
    """
    if not require_tensor("probs", probs).is_floating_point():
        raise TypeError(f"probs must be a floating tensor, not {probs.dtype}")
    if probs.device.type == "cpu" and is_readable(probs) and bool((probs < 0).any()):
        raise ValueError(f"probs must be >= 0, but the smallest is {float(probs.detach().min()):.4g}")
    absent = probs == 0
    return probs.masked_fill(absent, 1.0).log().masked_fill(absent, -math.inf)


def weight_logits(like: Tensor, probs: Tensor | None, learn: bool) -> Tensor:
    """Logits of these weights, [K] or [L, K], or of K equal ones: a parameter, or a buffer where they are fixed."""
    K = like.shape[0]
    if probs is None:
        logits = like.new_full((K,), -math.log(K))
    else:
        if require_tensor("probs", probs).shape[-1:] != (K,) or probs.ndim > 2 or 0 in probs.shape:
            raise ValueError(
                f"probs must be [{K}], a weight for each component, not {list(probs.shape)}; weights by label would be "
                f"[L, {K}]"
            )
        total = probs.detach().sum(-1, keepdim=True, dtype=torch.float64)
        if is_readable(probs) and not bool((probs >= 0).all() & (total > 0).all() & (total < math.inf).all()):
            raise ValueError("probs must be finite weights >= 0, and not all 0")
        logits = log_weights_of(probs.detach().double() / total).to(like)
    return nn.Parameter(logits) if learn else nn.Buffer(logits)


def log_weights_within(labels: Tensor, log_weights: Tensor) -> Tensor:
    """log w_k less the log of what all components with the label of k weigh together, [K] of [K]; float32 at least."""
    # Labels are below K, so that no number of labels need be read: torch.compile and torch.export go through.
    given = log_weights if log_weights.dtype == torch.float64 else log_weights.float()
    largest = given.new_full(given.shape, -math.inf).scatter_reduce(0, labels, given.detach(), "amax")[labels]
    total = torch.zeros_like(given).index_add(0, labels, (given - largest).exp())[labels]
    return given - (largest + total.log())
