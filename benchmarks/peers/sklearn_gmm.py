"""scikit-learn's diagonal GaussianMixture with these parameters: the expansion in NumPy, forward alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..peer import Peer


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """GaussianMixture.score_samples, [M]."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(len(mu), covariance_type="diag")
    mixture.weights_ = log_weights.exp().numpy()
    mixture.means_ = mu.numpy()
    mixture.covariances_ = logvar.exp().expand_as(mu).numpy()
    mixture.precisions_cholesky_ = torch.exp(-0.5 * logvar).expand_as(mu).numpy()
    return torch.from_numpy(mixture.score_samples(z.numpy()))


PEER = Peer(
    "scikit-learn",
    log_prob,
    needs=("sklearn",),
    devices=("cpu",),
    differentiable=False,
    allowed_error=0.5,
    pair_arrays=(5, 0),
)
