"""Which component a draw comes from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.contracts import is_readable


def draw_components(log_weights: Tensor, n: int) -> Tensor:
    """n indices from each mixture, int64 [..., n], each k with probability w_k / sum w; log_weights [..., K].

    By the inverse of the distribution function, in float64: torch.multinomial takes 2^24 weights and no more.
    """
    device = log_weights.device
    if device.type == "mps":
        log_weights = log_weights.cpu()  # where there is float64
    log_weights = log_weights.double()
    cumulative = torch.exp(log_weights - log_weights.amax(-1, keepdim=True)).cumsum(-1)
    total = cumulative[..., -1:]
    if is_readable(total) and not bool(((total > 0) & (total < math.inf)).all()):
        raise ValueError("the mixture's log weights must hold no NaN, and one at least above -inf, to draw from it")
    u = total * torch.rand(*total.shape[:-1], n, dtype=torch.float64, device=log_weights.device)
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # a product may be rounded up to the total
    # right: the first k with u < cumulative_k, which is never one of weight 0
    return torch.searchsorted(cumulative, u, right=True).to(device)
