"""Likelihoods p(x | z): what a decoder's output means.

A likelihood is made from the decoder's output and scores x: `log_prob(output, x) -> [...]`, summed over the event
dimensions of x; `mean(output)` and `sample(output)` are images.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import logsigmoid

LEVELS = 256


class Likelihood(Protocol):
    """What a VAE asks of its likelihood; `output` is whatever the decoder returns, [..., *x_shape] each."""

    def log_prob(self, output: Any, x: Tensor) -> Tensor:
        """Nats of each element, [..., *x_shape]; x broadcasts against the output."""
        ...

    def mean(self, output: Any) -> Tensor:
        """E[x | z], [..., *x_shape]."""
        ...

    def sample(self, output: Any) -> Tensor:
        """A draw of x, [..., *x_shape]."""
        ...


class BernoulliLikelihood:
    """Binary x, or grey levels in [0, 1] as probabilities; the decoder returns logits."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return Bernoulli(logits=output, validate_args=False).log_prob(x)

    def mean(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        return Bernoulli(logits=output, validate_args=False).sample()


class GaussianLikelihood:
    """Real x; the decoder returns (mean, logvar), or the mean alone for a variance of 1."""

    def _normal(self, output: Tensor | tuple[Tensor, Tensor]) -> Normal:
        mean, logvar = output if isinstance(output, tuple) else (output, torch.zeros_like(output))
        return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)

    def log_prob(self, output: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return self._normal(output).log_prob(x)

    def mean(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self._normal(output).mean

    def sample(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self._normal(output).sample()


class DiscretizedLogisticLikelihood:
    """x on 256 grey levels in [0, 1); the decoder returns (mean, logscale) of a logistic distribution.

    The probability of level i is the logistic's mass between i / 256 and (i + 1) / 256, as in the VampPrior's code,
    whose 1e-7 added against underflow is not needed here:

        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b))

    Source: Kingma et al., Improved variational inference with inverse autoregressive flow (NIPS 2016).
    """

    def log_prob(self, output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        mean, logscale = output
        inverse = torch.exp(-logscale)
        a = (torch.floor(x * LEVELS) / LEVELS - mean) * inverse
        width = inverse / LEVELS  # b - a
        return logsigmoid(a + width) + logsigmoid(-a) + torch.log(-torch.expm1(-width))

    def mean(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0]

    def sample(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """A draw on the 256 levels, at the middle of each."""
        mean, logscale = output
        u = torch.rand_like(mean).clamp(1e-6, 1 - 1e-6)
        x = mean + torch.exp(logscale) * torch.logit(u)
        return (torch.floor(x * LEVELS).clamp(0, LEVELS - 1) + 0.5) / LEVELS


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized_logistic": DiscretizedLogisticLikelihood,
}
