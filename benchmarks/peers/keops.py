"""KeOps: the formula as a lazy tensor, reduced in one compiled pass without an array of M x K."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..peer import Peer


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """A logsumexp reduction over k of c_k - 1/2 sum_d ((z_d - mu_kd) s_kd)^2, [M]."""
    os.environ.setdefault("KEOPS_VERBOSE", "0")  # it would write into the progress bar
    from pykeops.torch import LazyTensor

    s = torch.exp(-0.5 * logvar).expand_as(mu).contiguous()
    c = log_weights - 0.5 * (logvar.sum(-1) + mu.shape[1] * math.log(2 * math.pi))  # [K]
    t = (LazyTensor(z[:, None, :]) - LazyTensor(mu[None])) * LazyTensor(s[None])
    a = LazyTensor(c[None, :, None]) - 0.5 * (t**2).sum(-1)  # [M, K, 1], never computed as a whole
    return a.logsumexp(dim=1).squeeze(-1)


PEER = Peer("keops", log_prob, needs=("pykeops",), needs_compiler=True)
