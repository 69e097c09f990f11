"""The expansion under torch.compile, its products in TF32: what one gets by PyTorch's setting."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..peer import MixtureLogProb, Peer
from . import expansion


@cache
def _compiled() -> MixtureLogProb:
    return torch.compile(expansion.log_prob, dynamic=False)


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """The expansion, [M]; backward is compiled with forward, under the same setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _compiled()(z, mu, logvar, log_weights)
    finally:
        torch.set_float32_matmul_precision(before)


PEER = Peer("expansion-tf32", log_prob, devices=("cuda",), allowed_error=50.0, pair_arrays=(2, 3), on_request=True)
