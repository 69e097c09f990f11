"""Pyro: any of fastvae's priors as a distribution for `pyro.sample`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from fastvae import Prior

try:
    from pyro.distributions import TorchDistribution
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'fastvae.adapters.pyro needs {error.name}; pip install "fastvae-kernels[pyro]"', name=error.name
    ) from error


class PriorDistribution(TorchDistribution):  # type: ignore[misc]
    """p(z) of a prior, with the event shape [D], for a model's `pyro.sample("z", PriorDistribution(prior))`.

    Register the prior's parameters with `pyro.module`.  Draws have no gradient; in a guide, z comes from the encoder's
    normal distribution.

    Args:
        prior: a :class:`fastvae.Prior`.
        batch_shape: how many independent z there are, as of :meth:`expand`.
        validate_args: as of `torch.distributions.Distribution`.
    """

    support = constraints.real_vector
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, prior: Prior, batch_shape: Size = Size(()), validate_args: bool | None = None) -> None:  # noqa: B008
        if not isinstance(prior, Prior):
            raise TypeError(f"prior must be a fastvae.Prior, not a {type(prior).__name__}")
        self.prior = prior
        self._example = prior.sample(1)[0]
        super().__init__(Size(batch_shape), self._example.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: PriorDistribution | None = None) -> PriorDistribution:
        """The same prior for that many independent z, as `pyro.plate` asks for."""
        return PriorDistribution(self.prior, Size(batch_shape), validate_args=self._validate_args)

    def sample(self, sample_shape: Size = Size(())) -> Tensor:  # noqa: B008
        """Independent draws, [*sample_shape, *batch_shape, D]."""
        shape = self._extended_shape(Size(sample_shape))
        return self.prior.sample(math.prod(shape[:-1])).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), [...] of [..., D]; nats."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.prior.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
