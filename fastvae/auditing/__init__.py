"""An audit of somebody's mixture prior: which of the known mistakes it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributions, nn

from fastvae.auditing.claim import claim_of
from fastvae.auditing.density import audit_density, audit_gradient_in_z, audit_gradient_of_parameters, points
from fastvae.auditing.divergence import audit_kl
from fastvae.auditing.observed import Observed
from fastvae.auditing.report import AuditError, AuditReport, Finding
from fastvae.auditing.sampler import audit_sampler, number_of_draws
from fastvae.contracts import describe
from fastvae.priors import Prior

__all__ = ["AuditError", "AuditReport", "Finding", "audit"]


def audit(
    prior: Any,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    log_weights: Tensor | None = None,
    probs: Tensor | None = None,
    sample: Callable[[int], Tensor] | None = None,
    kl: Callable[[Tensor, Tensor], Any] | None = None,
    false_alarm: float = 1e-6,
    seed: int = 0,
) -> AuditReport:
    """Look for the known mistakes in somebody's mixture of diagonal Gaussians, and say in words what is wrong.

    The density is evaluated at points that tell right and wrong formulas apart, in float64; the wrong formula, or the
    two together, that give the observed numbers are named.  Draws are tested against the components by bounds that hold
    for any number of draws.  docs/guides/audit.md lists the mistakes.

    Args:
        prior: z [M, D] -> log p(z) [M], or an object with `log_prob`, and perhaps `sample`, `kl` and `components`:
            a :class:`fastvae.Mixture`, a `torch.distributions.MixtureSameFamily`, or one's own.
        mu, logvar: [K, D] and broadcastable to [K, D], the components that the prior claims to have, in the dtype and
            on the device with which it computes.  None: what `prior.components()` returns.
        scale: the standard deviations, in the place of logvar.
        log_weights: [K]; None means equal weights.
        probs: [K], the weights themselves, in the place of log_weights.
        sample: n -> [n, D]; None: `prior.sample`, if there is one.
        kl: (mu [M, D], logvar [M, D]) -> (z [M, D], kl [M]) of posteriors; None: `prior.kl` of a
            :class:`fastvae.Prior`, else the KL term is not looked at.
        false_alarm: a bound on the probability that the draws of a right sampler are called wrong.
        seed: decides all points and, inside the audit, PyTorch's global generators, which are left as they were.

    Returns:
        A report: true if nothing was found.  `print(report)` tells all; `report.raise_if_wrong()` raises.

    Raises:
        TypeError: no components are known, arguments contradict each other, or log_prob returns no floating tensor.
        ValueError: components that cannot be, or false_alarm not between 0 and 1.

    Example::

        report = fastvae.audit(prior.log_prob, mu, logvar)
        assert report, report
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm must be between 0 and 1, not {false_alarm}")
    density = _density(prior)
    claim = claim_of(prior, mu, logvar, scale, log_weights, probs)
    if sample is None:
        sample = _sampler(prior)
    if kl is None and isinstance(prior, Prior):
        kl = prior.kl
    parameters = _parameters(prior, {"mu": mu, "logvar": logvar, "scale": scale, "log_weights": log_weights})
    fixed = claim.detach()
    generator = torch.Generator().manual_seed(seed)
    checked = ["log_prob"]
    devices = [claim.device] if claim.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False):
        torch.manual_seed(seed)
        z = points(fixed, generator)
        with torch.no_grad():
            observed = Observed(density, fixed, z)
            found = audit_density(observed, fixed, z)
        findings, untested = found.findings, found.untested
        if "nondeterministic" in [finding.name for finding in findings]:
            untested.append("gradients: log_prob is another function at each call")
        else:
            checked.append("its gradients")
            findings += audit_gradient_in_z(found, observed, fixed)
            findings += audit_gradient_of_parameters(found, observed, claim, parameters)
        if sample is None:
            untested.append("draws: give sample, n -> [n, D]")
        else:
            n = number_of_draws(fixed)
            checked.append(f"{n} draws")
            with torch.no_grad():
                draws = audit_sampler(sample, fixed, n, false_alarm / 2, generator)
            findings += draws.findings
            untested += draws.untested
        if kl is None:
            untested.append("the KL term: give kl, (mu, logvar) -> (z, kl)")
        else:
            checked.append("the KL term")
            with torch.no_grad():
                more, reasons = audit_kl(kl, fixed, found.formula, false_alarm / 2, generator)
            findings += more
            untested += reasons
    return AuditReport(tuple(findings), tuple(checked), tuple(untested))


def _density(prior: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(prior, type):
        raise TypeError(f"prior must be an object or a function, not the class {prior.__name__} itself")
    density = getattr(prior, "log_prob", prior)
    if not callable(density):
        raise TypeError(f"prior must be a function z -> log p(z) or have log_prob, not {describe(prior)}")
    return density  # type: ignore[no-any-return]


def _sampler(prior: Any) -> Callable[[int], Tensor] | None:
    if isinstance(prior, distributions.Distribution):
        return lambda n: prior.sample(torch.Size([n]))
    return getattr(prior, "sample", None)


def _parameters(prior: Any, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What the components are made of and wants a gradient: a module's parameters, or leaves that were given."""
    module = prior if isinstance(prior, nn.Module) else getattr(prior, "__self__", None)
    parameters: dict[str, Tensor] = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    parameters |= {name: value for name, value in given.items() if value is not None and value.is_leaf}
    if isinstance(prior, distributions.MixtureSameFamily):
        inner = getattr(prior.component_distribution, "base_dist", None)
        parameters |= {name: getattr(inner, name) for name in ("loc", "scale") if hasattr(inner, name)}
    return {name: value for name, value in parameters.items() if value.requires_grad}
