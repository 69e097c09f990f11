"""The aggregated posterior of a whole data set, and how far it is from a prior."""

from __future__ import annotations

import math
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae.contracts import encode, evaluate, require_shape, require_tensor
from fastvae.estimate import Estimate
from fastvae.priors.base import Prior
from fastvae.priors.mixture import Mixture, expanded_logvar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class AggregatedPosterior(Mixture):
    """q(z) = 1/N sum_n q(z | x_n), over a data set's N points, as a fixed mixture.

    It is a prior like any other: a trained VAE that is given it samples "ex post", `VAE(encoder, decoder,
    AggregatedPosterior.of(encoder, data))`.  And it measures, over all N points and not over a minibatch,

        E_n KL(q(z|x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))
        KL(q(z) || p(z)) = KL(q(z) || prod_d q(z_d)) + sum_d KL(q(z_d) || p(z_d))     where p(z) = prod_d p(z_d)

    Each estimate is a mean over independent draws n, z ~ q(z | x_n), in memory O(draws + N).

    Args:
        mu: [N, D], the posteriors' means.
        logvar: broadcastable to [N, D].  One dimension is [D], for all points alike, also where N = D; one log
            variance for each point is [N, 1].
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.

    Sources: Hoffman and Johnson, ELBO surgery (NeurIPS workshop 2016), for the first line; Chen, Li, Grosse and
    Duvenaud, Isolating sources of disentanglement in VAEs (NeurIPS 2018), for the second.
    """

    mu: Tensor
    logvar: Tensor

    def __init__(self, mu: Tensor, logvar: Tensor, **backend: Unpack[BackendOptions]) -> None:
        super().__init__(**backend)
        logvar = expanded_logvar(mu, logvar, "N")
        self.register_buffer("mu", mu.detach())
        self.register_buffer("logvar", logvar.detach().contiguous())

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        encoder: nn.Module,
        data: Tensor,
        y: Tensor | None = None,
        *,
        chunk_size: int = 1000,
        **backend: Unpack[BackendOptions],
    ) -> AggregatedPosterior:
        """That of data [N, *input_shape] under an encoder x -> (mu, logvar), encoded `chunk_size` points at a time.

        y: [N, ...], what each point is conditioned on, for an encoder of (x, y).
        """
        if y is not None and (require_tensor("y", y).ndim == 0 or len(y) != len(data)):
            raise ValueError(f"y must be [{len(data)}, ...], a row for each point in data, not {list(y.shape)}")
        parts = zip(data.split(chunk_size), repeat(None) if y is None else y.split(chunk_size), strict=False)
        encoded = (encode(encoder, *part) for part in parts)
        mu, logvar = (torch.cat(part) for part in zip(*encoded, strict=True))
        return cls(mu, logvar, **backend)

    def component_log_weights(self) -> Tensor:
        return self.mu.new_full((len(self.mu),), -math.log(len(self.mu)))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.logvar, self.component_log_weights()

    def mutual_information(self, num_samples: int = 10_000) -> Estimate:
        """I(n; z) = E[log q(z | x_n) - log q(z)]: how much z tells of which point it came from; at most log N."""
        z, log_q = self._draw(num_samples)
        return _mean(log_q - self.log_prob(z))

    def marginal_kl(self, prior: Prior, num_samples: int = 10_000) -> Estimate:
        """KL(q(z) || p(z)): what the ELBO loses to a prior that is not q(z)."""
        z, _ = self._draw(num_samples)
        return _mean(self.log_prob(z) - evaluate("prior.log_prob", prior.log_prob, z).detach())

    def total_correlation(self, num_samples: int = 10_000) -> Estimate:
        """KL(q(z) || prod_d q(z_d)): how far the dimensions are from independent."""
        z, _ = self._draw(num_samples)
        return _mean(self.log_prob(z) - self.marginal_log_prob(z).sum(-1))

    def dimension_wise_kl(self, prior: Prior, num_samples: int = 10_000) -> Estimate:
        """KL(q(z_d) || p(z_d)) of each dimension by itself, [D]; the prior must have `marginal_log_prob`."""
        z, _ = self._draw(num_samples)
        of_prior = require_shape("prior.marginal_log_prob(z)", prior.marginal_log_prob(z), z.shape)
        return _mean(self.marginal_log_prob(z) - of_prior.detach())

    def _draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """(z [num_samples, D], log q(z | x_n) [num_samples]), n uniform."""
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, for a standard error, not {num_samples}")
        n = torch.randint(len(self.mu), (num_samples,), device=self.mu.device)
        return F.gaussian_rsample(*self.component_parameters(n), impl=self.backend_options["impl"])


def _mean(values: Tensor) -> Estimate:
    """Over the first dimension, [S, ...]."""
    values = values.double()
    return Estimate(values.mean(0), values.std(0) / math.sqrt(len(values)))
