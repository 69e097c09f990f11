"""torch.distributions, which holds M x K x D."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ..peer import Peer


def log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """The density of a MixtureSameFamily, [M]."""
    components = Independent(Normal(mu, (0.5 * logvar).exp(), validate_args=False), 1)
    weights = Categorical(logits=log_weights, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False).log_prob(z)


PEER = Peer("mixture-same-family", log_prob, normalizes=True, full_arrays=(2, 6), pair_arrays=(3, 5))
