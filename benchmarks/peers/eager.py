"""The mathematics as one writes it down: an array of M x K x D."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..peer import Peer


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """logsumexp_k [log w_k + sum_d log N(z_d; mu_kd, exp(logvar_kd))], [M]."""
    t = (z[:, None] - mu) * torch.exp(-0.5 * logvar)  # [M, K, D]
    a = log_weights - 0.5 * (t.square().sum(-1) + logvar.sum(-1) + mu.shape[1] * math.log(2 * math.pi))
    return torch.logsumexp(a, -1)


PEER = Peer("eager", log_prob, full_arrays=(2, 5), pair_arrays=(3, 5))
