"""The aggregated posterior of a whole data set, and how far it is from a prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae import _checks
from fastvae import functional as F
from fastvae.contracts import encode, evaluate, require_index, require_shape, require_tensor
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

    @torch.no_grad()
    def update(self, index: Tensor, mu: Tensor, logvar: Tensor) -> None:
        """Put the posteriors of these points in place of those that were kept for them.

        So q(z) follows an encoder in training at the price of its batches: each point's posterior is as old as the
        last batch that held the point.

        Args:
            index: int64 [B], which of the N points they are.
            mu, logvar: [B, D] and broadcastable to it.

        Raises:
            TypeError, ValueError: index is not int64 [B] in 0 ... N - 1, or mu and logvar are not [B, D].
        """
        N, D = self.mu.shape
        require_index(index, N)
        require_shape(f"mu for index {list(index.shape)}", mu, (len(index), D))
        mu, logvar = _checks.gaussian(mu, require_tensor("logvar", logvar), mu.dtype)
        # not in place: a graph may hold the tensors, and so may the caller who gave them
        self.mu = self.mu.index_copy(0, index, mu.to(self.mu))
        self.logvar = self.logvar.index_copy(0, index, logvar.to(self.logvar))

    def marginal(self, dimensions: int | Sequence[int]) -> AggregatedPosterior:
        """q of these dimensions alone, a mixture of the same N points: `marginal(3)`, `marginal([0, 3])`."""
        D = self.mu.shape[1]
        chosen = list(dimensions) if isinstance(dimensions, Sequence) else [dimensions]
        if not chosen or not all(isinstance(d, int) and -D <= d < D for d in chosen):
            raise ValueError(f"dimensions must be one or more of 0 ... {D - 1}, not {dimensions!r}")
        return AggregatedPosterior(self.mu[:, chosen], self.logvar[:, chosen], **self.backend_options)

    @torch.no_grad()
    def sample_marginals(self, n: int) -> Tensor:
        """n draws of prod_d q(z_d), [n, D]: as :meth:`sample`, but with a point n of its own for each dimension."""
        index = torch.randint(len(self.mu), (n, self.mu.shape[1]), device=self.mu.device)
        mu, logvar = self.mu.gather(0, index), self.logvar.gather(0, index)
        return F.gaussian_rsample(mu, logvar, impl=self.backend_options["impl"])[0]

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
        _checks.count("num_samples", num_samples)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, for a standard error, not {num_samples}")
        n = torch.randint(len(self.mu), (num_samples,), device=self.mu.device)
        return F.gaussian_rsample(*self.component_parameters(n), impl=self.backend_options["impl"])


def _mean(values: Tensor) -> Estimate:
    """Over the first dimension, [S, ...]."""
    values = values.double()
    return Estimate(values.mean(0), values.std(0) / math.sqrt(len(values)))
