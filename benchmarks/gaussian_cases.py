"""Sampling a diagonal Gaussian with its log density, and its KL to N(0, I), each forward and with backward.

The noise of contenders differs, so a sample is verified by what must hold whatever the noise: log q is the density
of the very z, the noise (z - mu) / sigma has the moments of N(0, I), and the gradients follow from z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import fastvae

from .case import Case, Contender, Errors, Prepared, WrongResultError
from .mixture_cases import BACKWARD, FORWARD
from .probe import copy_meter

RSAMPLE, KL = "gaussian_rsample", "gaussian_kl"
ALLOWED = 1e-4  # of log q or KL: nats for each dimension; of a gradient: a fraction of its largest element
LOG_2PI = math.log(2 * math.pi)

Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Divergence = Callable[[Tensor, Tensor], Tensor]


def eager_rsample(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(z [M, D], log q [M]) as most VAEs are written."""
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, -0.5 * (eps.square() + logvar + LOG_2PI).sum(-1)


def distribution_rsample(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch.distributions."""
    q = Independent(Normal(mu, (0.5 * logvar).exp(), validate_args=False), 1)
    z = q.rsample()
    return z, q.log_prob(z)


def eager_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)), [M]."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def distribution_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """The same by torch.distributions."""
    q = Normal(mu, (0.5 * logvar).exp(), validate_args=False)
    return kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)).sum(-1)


SAMPLERS: Mapping[str, Sampler] = {
    "fastvae": fastvae.gaussian_rsample,
    "eager": eager_rsample,
    "torch-distributions": distribution_rsample,
}
DIVERGENCES: Mapping[str, Divergence] = {
    "fastvae": fastvae.gaussian_kl,
    "eager": eager_kl,
    "torch-distributions": distribution_kl,
}
NAMES = tuple(SAMPLERS)

# Arrays of M x D that must be read or written: mu, logvar -> z; and back, d z, logvar, and z or the noise
# drawn anew -> d mu, d logvar.  KL: mu, logvar -> and back the same two -> d mu, d logvar.
ARRAYS = {(RSAMPLE, FORWARD): 3, (RSAMPLE, BACKWARD): 7, (KL, FORWARD): 2, (KL, BACKWARD): 6}


def cases(shapes: Sequence[tuple[int, int]], names: Sequence[str] = NAMES, *, device: str = "cpu") -> Iterator[Case]:
    """All four works on each (M, D)."""
    for M, D in shapes:
        for operation in (RSAMPLE, KL):
            for work in (FORWARD, BACKWARD):
                yield _case(operation, work, M, D, names, device)


def _case(operation: str, work: str, M: int, D: int, names: Sequence[str], device: str) -> Case:
    facts = {"suite": "gaussian", "work": f"{operation} {work}", "M": M, "D": D}

    def prepare(earlier: Mapping[str, Any]) -> Prepared:
        rng = torch.Generator().manual_seed(0)
        mu = torch.randn(M, D, generator=rng)
        logvar = 0.5 * torch.randn(M, D, generator=rng) - 1.0
        upstream = (torch.randn(M, D, generator=rng) / M, torch.randn(M, generator=rng) / M)
        make = _sampling if operation == RSAMPLE else _divergence
        contenders = [
            make(name, work == BACKWARD, mu.to(device), logvar.to(device), *(u.to(device) for u in upstream))
            for name in names
        ]
        meter = copy_meter() if device == "cpu" else None
        bytes_moved = 4 * M * D * ARRAYS[operation, work]
        return Prepared(contenders, meters={"copy": meter} if meter else {}, facts={"bytes_moved": bytes_moved})

    return Case(facts, tuple(names), prepare)


def _sampling(name: str, backward: bool, mu: Tensor, logvar: Tensor, g_z: Tensor, g_q: Tensor) -> Contender:
    sample, leaves = SAMPLERS[name], (mu.clone().requires_grad_(), logvar.clone().requires_grad_())

    def run() -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return sample(mu, logvar)
        z, log_q = sample(*leaves)
        return z, log_q, *torch.autograd.grad((z, log_q), leaves, (g_z, g_q))

    def verify(result: tuple[Tensor, ...]) -> Errors:
        z, log_q, *gradients = (part.detach().double() for part in result)
        exact_mu, exact_logvar = mu.double(), logvar.double()
        eps = (z - exact_mu) * torch.exp(-0.5 * exact_logvar)
        # Five standard errors of the mean and of the variance of M D standard normal numbers.
        for moment, want, room in ((eps.mean(), 0.0, 1.0), (eps.var(correction=0), 1.0, 2**0.5)):
            if not abs(float(moment) - want) < 5 * room / eps.numel() ** 0.5:
                raise WrongResultError(f"the noise should have a moment {want}, it has {float(moment):.4f}")
        want_q = -0.5 * (eps.square() + exact_logvar + LOG_2PI).sum(-1)
        errors = {"log_q": float((log_q - want_q).abs().max())}
        _demand("log q", errors["log_q"], ALLOWED * mu.shape[1])
        if backward:
            want_mu = g_z.double()
            want_logvar = 0.5 * (g_z.double() * (z - exact_mu) - g_q.double()[:, None])
            errors |= _gradient_errors(gradients, (want_mu, want_logvar))
        return errors

    return Contender(name, run, verify)


def _divergence(name: str, backward: bool, mu: Tensor, logvar: Tensor, _: Tensor, g: Tensor) -> Contender:
    divergence, leaves = DIVERGENCES[name], (mu.clone().requires_grad_(), logvar.clone().requires_grad_())

    def run() -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (divergence(mu, logvar),)
        value = divergence(*leaves)
        return value, *torch.autograd.grad(value, leaves, g)

    def verify(result: tuple[Tensor, ...]) -> Errors:
        value, *gradients = (part.detach().double() for part in result)
        exact_mu, exact_logvar = mu.double(), logvar.double()
        want = fastvae.reference.gaussian_kl(exact_mu, exact_logvar)
        errors = {"kl": float((value - want).abs().max())}
        _demand("the KL", errors["kl"], ALLOWED * mu.shape[1])
        if backward:
            scale = g.double()[:, None]
            errors |= _gradient_errors(gradients, (scale * exact_mu, scale * 0.5 * torch.expm1(exact_logvar)))
        return errors

    return Contender(name, run, verify)


def _gradient_errors(gradients: Sequence[Tensor], wanted: Sequence[Tensor]) -> Errors:
    errors = {}
    for name, got, want in zip(("mu", "logvar"), gradients, wanted, strict=True):
        errors[name] = float((got - want).abs().max() / want.abs().max())
        _demand(f"the gradient in {name}", errors[name], ALLOWED)
    return errors


def _demand(what: str, error: float, room: float) -> None:
    if not error <= room:
        raise WrongResultError(f"{what} is off by {error:.3g}, more than the {room:.3g} that is allowed it")
