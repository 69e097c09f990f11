"""The components that a prior claims to have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributions

from fastvae import _checks
from fastvae.contracts import describe, require_tensor


@dataclass(frozen=True)
class Claim:
    """K components, in float64 on the CPU.

    Attributes:
        mu, logvar: [K, D]; of a posterior, whose rows each have one component, [M, 1, D].
        log_weights: [K], normalised.
        given_log_weights: [K], as they were given.
        dtype, device: of the tensors that were given: points are handed to the prior so.
    """

    mu: Tensor
    logvar: Tensor
    log_weights: Tensor
    given_log_weights: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def D(self) -> int:  # noqa: N802
        return self.mu.shape[-1]

    @property
    def K(self) -> int:  # noqa: N802
        return self.mu.shape[-2]

    def detach(self) -> Claim:
        names = ("mu", "logvar", "log_weights", "given_log_weights")
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def rows(self, first: int, last: int) -> Claim:
        """The claim for rows first ... last - 1: a part of a posterior's, all of a mixture's."""
        if self.mu.ndim == 2:
            return self
        return replace(self, mu=self.mu[first:last], logvar=self.logvar[first:last])

    def to_prior(self, z: Tensor) -> Tensor:
        """z as the prior takes it."""
        return z.to(self.device, self.dtype)

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator, widen: float = 1.0) -> Tensor:
        """n points of the mixture, [n, D], with its components' scales times `widen`."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.D, dtype=torch.float64, generator=generator)
        return self.mu[k] + widen * torch.exp(0.5 * self.logvar[k]) * noise


def claim_of(
    prior: object,
    mu: Tensor | None,
    logvar: Tensor | None,
    scale: Tensor | None,
    log_weights: Tensor | None,
    probs: Tensor | None,
) -> Claim:
    """The claim of these arguments, or without any of the prior's own components; it keeps their graph.

    Raises:
        TypeError: there are none, one is no floating tensor, or two contradict each other.
        ValueError: shapes that do not fit, values that no component can have.
    """
    if mu is None:
        others = dict(logvar=logvar, scale=scale, log_weights=log_weights, probs=probs)
        alone = [name for name, value in others.items() if value is not None]
        if alone:
            raise TypeError(f"{alone[0]} was given without mu, the means [K, D]")
        mu, logvar, log_weights = _own_components(prior)
    if logvar is not None and scale is not None:
        raise TypeError("logvar and scale contradict each other; give one of them")
    if log_weights is not None and probs is not None:
        raise TypeError("log_weights and probs contradict each other; give one of them")
    if scale is not None:
        if not bool((require_tensor("scale", scale) > 0).all()):
            raise ValueError("scale must be > 0: standard deviations, in the latent space's units")
        logvar = 2 * scale.double().log()
    if logvar is None:
        raise TypeError("give logvar, log sigma^2, or scale, sigma, with mu")
    if probs is not None:
        if not bool((require_tensor("probs", probs) >= 0).all()):
            raise ValueError("probs must be >= 0")
        log_weights = probs.double().log()
    for name, value in (("mu", mu), ("logvar", logvar), ("log_weights", log_weights)):
        if value is not None:
            _checks.tensor(name, value)
            if not value.is_floating_point():
                raise TypeError(f"{name} must be a floating tensor, not {value.dtype}")
        if value is not None and value.is_meta:
            raise ValueError(f"{name} is on the meta device, where there are no numbers to audit")
    dtype, device = mu.dtype, mu.device
    weights = None if log_weights is None else log_weights.cpu()
    mu, logvar, weights = _checks.components(mu.cpu(), logvar.cpu(), weights, torch.float64)
    given = mu.new_zeros(mu.shape[0]) if weights is None else weights
    if weights is None:
        given = given - torch.log(torch.tensor(float(len(given)), dtype=torch.float64))
    absent = given == -torch.inf
    if not bool((mu.isfinite() & logvar.isfinite())[~absent].all()):
        raise ValueError("mu and logvar must be finite for every component with a weight")
    if bool(absent.all()) or not bool((given.isfinite() | absent).all()):
        raise ValueError("log_weights must hold no NaN and no inf, and one at least above -inf")
    logvar = logvar.expand(mu.shape)
    # A component that is not there may hold anything.
    mu, logvar = (torch.where(absent[:, None], torch.zeros_like(value), value) for value in (mu, logvar))
    return Claim(mu, logvar, torch.log_softmax(given, 0), given, dtype, device)


def _own_components(prior: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mu, logvar, log_weights) of a prior that can tell them."""
    if isinstance(prior, distributions.MixtureSameFamily):
        inner = prior.component_distribution
        if (
            isinstance(inner, distributions.Independent)
            and inner.reinterpreted_batch_ndims == 1
            and isinstance(inner.base_dist, distributions.Normal)
            and len(prior.batch_shape) == 0
        ):
            normal = inner.base_dist
            return normal.loc, 2 * normal.scale.double().log(), prior.mixture_distribution.logits
        raise TypeError(
            "a MixtureSameFamily must be of Independent(Normal(loc [K, D], scale), 1), without a batch shape; "
            f"this one is of {inner}, with the batch shape {list(prior.batch_shape)}: without Independent it is "
            "another density for each dimension.  Give mu and scale to have it audited all the same"
        )
    if all(hasattr(prior, name) for name in ("locs", "coord_scale", "component_logits")):
        return prior.locs, 2 * prior.coord_scale.double().log(), prior.component_logits
    if hasattr(prior, "components"):
        components = prior.components()
        if not isinstance(components, tuple | list) or len(components) != 3:
            raise TypeError(f"components() must return (mu, logvar, log_weights), not {describe(components)}")
        return components[0], components[1], components[2]
    raise TypeError(
        f"the audit needs the components that the prior claims to have; {describe(prior)} has no components(), so "
        "give mu [K, D] and logvar or scale, and the weights as log_weights or probs"
    )
