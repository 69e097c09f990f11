"""Flash-GMM's E-step for diagonal covariances on H100 (IBM/Flash-GMM, `flash_gmm_diag_h100.py` on the path).

It computes the expansion in bfloat16, and with log p the sums that an EM step needs, which are those of the parameters'
gradients: more than a forward, and no gradient.
"""

from __future__ import annotations

from torch import Tensor

from ..peer import Peer


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """The log-normaliser of the E-step, [M]."""
    from flash_gmm_diag_h100 import flash_gmm_estep_diag

    log_normaliser, *_ = flash_gmm_estep_diag(z, mu, logvar.expand_as(mu).contiguous(), log_weights)
    return log_normaliser


PEER = Peer(
    "flash-gmm",
    log_prob,
    needs=("flash_gmm_diag_h100",),
    devices=("cuda",),
    differentiable=False,
    allowed_error=5.0,  # bfloat16 has 8 bits; the error that it did have is in the record
    on_request=True,
)
