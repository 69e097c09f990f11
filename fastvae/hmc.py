"""Draws of the true posterior p(z | x) by Hamiltonian Monte Carlo, many chains at once, and how good they are.

A chain's step from z: a momentum r ~ N(0, I), then L leapfrog steps of size eps in the coordinates u = z / scale,

    r += eps/2 scale d log f / dz;   z += eps scale r;   r += eps/2 scale d log f / dz

and the end is accepted with probability min(1, exp(H_end - H_start)), H = log f(z) - r^2 / 2.  `scale` is the square
root of an inverse mass: the standard deviations of a distribution near p(z | x).  Each trajectory's eps is drawn at
random, up to a fifth from what was asked for, so that trajectories do not return to where they began.

A mixture prior's score comes in the same pass over the components as its density: where z alone needs a gradient,
:func:`fastvae.mixture_log_prob` computes it in forward.  The decoder's gradient is autograd's.

Sources: Neal, MCMC using Hamiltonian dynamics (Handbook of Markov chain Monte Carlo, 2011); Gelman et al., Bayesian
data analysis (3rd edition, 2013), section 11.4, for R-hat; Geyer, Practical Markov chain Monte Carlo (1992), for the
effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import _checks
from fastvae import functional as F
from fastvae._few import rows_on, samples_on
from fastvae.backends import choice
from fastvae.contracts import evaluate, require_methods
from fastvae.hierarchical import HierarchicalVAE, gaussian_log_prob
from fastvae.priors import Density
from fastvae.vae import VAE, is_conditional

STARTS = ("posterior", "prior")
Progress = Callable[[int, int], object]  # called with (steps done, steps in all)

_PRIOR_DRAWS = 1000  # from which the prior's standard deviations are taken
_ENOUGH_FOR_SCALE = 50  # draws, of all chains together
_GAIN = 3.0  # of log step size per acceptance probability too many, in the first step of a warm-up
_JITTER = 0.2
_STARTS = 100  # draws, for a chain whose start has no density


class PosteriorSamples(NamedTuple):
    """Draws of p(z | x) of each x, and diagnostics.

    Attributes:
        z: [S, C, B, D], S draws of C chains for each of B points.
        acceptance: [C, B], the mean acceptance probability of each chain after its warm-up.
        step_size: [C, B], what each chain's warm-up found.
    """

    z: Tensor
    acceptance: Tensor
    step_size: Tensor

    @property
    def r_hat(self) -> Tensor:
        """[B, D], see :func:`r_hat`."""
        return r_hat(self.z)

    @property
    def effective_sample_size(self) -> Tensor:
        """[B, D], see :func:`effective_sample_size`."""
        return effective_sample_size(self.z)


def sample_posterior(
    vae: VAE,
    x: Tensor,
    num_samples: int = 500,
    *,
    num_chains: int = 4,
    warmup: int = 500,
    leapfrog_steps: int = 10,
    start: str = "posterior",
    acceptance: float = 0.8,
    progress: Progress | None = None,
) -> PosteriorSamples:
    """Draws of the true posterior p(z | x) of a VAE, by Hamiltonian Monte Carlo.

    In the warm-up each chain adapts its step size towards `acceptance`.  Half-way the scale of each dimension becomes
    the standard deviation of the chains' draws so far, over all chains of the point.  Afterwards both are fixed.

    Args:
        vae: in evaluation mode, where that makes a difference: a decoder that drops units at random has no density.
        x: [B, *x_shape].
        num_samples: S draws of each chain, after the warm-up.
        num_chains: C chains for each point; R-hat compares them.
        warmup: steps of the warm-up.
        leapfrog_steps: L, each a gradient of log p(x, z).
        start: where the chains begin: at draws of "posterior", q(z | x), with its standard deviations as the first
            scale; or of "prior", with the prior's.
        acceptance: the mean acceptance probability that the step sizes are adapted to.
        progress: called with (steps done, steps in all) after each step.

    Returns:
        :class:`PosteriorSamples`.  The same seed of PyTorch's generator gives the same draws.

    Raises:
        TypeError, ValueError: a count is not an integer of at least 1, there is no such start, acceptance is not in
            (0, 1), log p(x | z) has no gradient in z, no draw of the start has a density p(x, z), or vae has two levels
            of latents.
    """
    _checks.count("num_samples", num_samples)
    _checks.count("warmup", warmup)
    check_chains(vae, x, num_chains, leapfrog_steps, start, acceptance)
    parts = batches(x, num_chains)
    tick = ticker(progress, len(parts) * (warmup + num_samples))
    counts = num_samples, num_chains, warmup, leapfrog_steps
    with torch.inference_mode(False), torch.no_grad(), choice.with_options(vae.backend_options):
        drawn = [_chains(Target(vae, part, start), *counts, acceptance, tick) for part in parts]
    z, accepted, step_size = zip(*drawn, strict=True)
    return PosteriorSamples(torch.cat(z, 2), torch.cat(accepted, 1), torch.cat(step_size, 1))


def r_hat(z: Tensor) -> Tensor:
    """Split R-hat of chains [S, C, ...] -> [...]: near 1 where the chains agree, by custom below 1.01.

    Each chain is split in two halves; R-hat is the square root of the variance of all draws, by the means and variances
    of the halves, over the mean variance within them.

    Raises:
        ValueError: S < 4.

    Source: Gelman et al., Bayesian data analysis (3rd edition, 2013), eq. 11.4.
    """
    chains = _halves(z)
    n, within = len(chains), chains.var(0).mean(0)
    between = chains.mean(0).var(0)  # B / n of the source
    return ((n - 1) / n + between / within).sqrt()


def effective_sample_size(z: Tensor) -> Tensor:
    """How many independent draws chains [S, C, ...] are worth for a mean: [...].

    S C / (1 + 2 sum_t rho_t), with the autocorrelations rho_t over all chains' halves, summed in pairs as long as the
    pairs are positive, and none larger than the one before.  Chains that disagree count for less; draws that alternate
    count for more than one, up to a factor of log10(S C).  NaN where the draws are, or where they are all the same.

    Raises:
        ValueError: S < 4.

    Sources: Geyer, Practical Markov chain Monte Carlo (1992), section 3.3; Gelman et al., Bayesian data analysis (3rd
    edition, 2013), eq. 11.7, for several chains; Vehtari et al., Rank-normalization, folding, and localization
    (Bayesian analysis 2021), section 3.2, for the factor.
    """
    chains = _halves(z)  # [n, m, ...]
    n, m = chains.shape[:2]
    spectrum = torch.fft.rfft(chains - chains.mean(0), 2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=0)[:n].mean(1) / n  # [n, ...], of lag 0, 1, ...
    within, between = covariance[0] * n / (n - 1), chains.mean(0).var(0)
    correlation = 1 - (within - covariance) / (covariance[0] + between)
    correlation[0] = 1
    pairs = correlation[: n // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    pairs = torch.where((~(pairs <= 0)).cumprod(0).bool(), pairs, 0.0).cummin(0).values  # NaN stays
    return n * m / (2 * pairs.sum(0) - 1).clamp(min=1 / math.log10(n * m))


def _halves(z: Tensor) -> Tensor:
    """The two halves of each chain as chains of their own: [S, C, ...] -> [S/2, 2C, ...], in float32 at least."""
    _checks.result_dtype(z=z)
    if z.ndim < 2 or z.shape[0] < 4 or z.shape[1] < 1:
        raise ValueError(f"z must be [S, C, ...], at least 4 draws of each of C chains, not {list(z.shape)}")
    half = z.shape[0] // 2
    return torch.cat((z[:half], z[-half:]), 1).to(_checks.compute_dtype(z.dtype))


class Point(NamedTuple):
    """Where the chains are, z [C, B, D], and there log f_0 and log p(x, z) with their gradients in z."""

    z: Tensor
    log_start: Tensor  # [C, B]
    log_joint: Tensor
    start_score: Tensor  # [C, B, D]
    joint_score: Tensor

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """(log f [C, B], gradient [C, B, D]) of log f = (1 - t) log f_0 + t log p(x, z)."""
        if t == 1:  # where f_0 is zero, 0 log f_0 is no number
            return self.log_joint, self.joint_score
        return (
            (1 - t) * self.log_start + t * self.log_joint,
            (1 - t) * self.start_score + t * self.joint_score,
        )


class Target:
    """The densities of B points, as a function z [C, B, D] -> :class:`Point`; f_0 is q(z | x) or p(z).

    Attributes:
        scale: [B, D], standard deviations of the start.
    """

    def __init__(self, vae: VAE, x: Tensor, start: str) -> None:
        self.vae, self.x, self.start = vae, x.clone() if x.is_inference() else x, start
        mu, logvar = vae._posterior(self.x)
        self._dtype = mu.dtype  # of what the decoder takes
        self._mu, self._logvar = (v.to(_checks.compute_dtype(v.dtype)) for v in (mu, logvar))
        self._prior = vae.prior.snapshot()
        self._rows = rows_on(x.device)
        if start == "posterior":
            self.scale = torch.exp(0.5 * self._logvar)
        else:
            self.scale = self._prior.sample(_PRIOR_DRAWS).to(self._mu).std(0).expand(self._mu.shape)

    def begin(self, num_chains: int) -> Point:
        """Draws of the start, of so many chains for each point."""
        if self.start == "posterior":
            return self(F.gaussian_rsample(self._mu, self._logvar, num_chains)[0])
        B, D = self._mu.shape
        return self(self._prior.sample(num_chains * B).to(self._mu).reshape(num_chains, B, D))

    def __call__(self, z: Tensor) -> Point:
        """In memory bounded whatever C and B are."""
        parts = [self._point(part) for part in z.split(max(1, self._rows // max(1, z.shape[1])))]
        return Point(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _point(self, z: Tensor) -> Point:
        log_p, score = _value_and_gradient("the prior's log_prob", self._prior.log_prob, z)
        log_x, gradient = _value_and_gradient("log p(x | z)", self._log_likelihood, z)
        if self.start == "prior":
            return Point(z, log_p, log_p + log_x, score, score + gradient)
        log_q, off = gaussian_log_prob(z, self._mu, self._logvar), z - self._mu
        return Point(z, log_q, log_p + log_x, -off * torch.exp(-self._logvar), score + gradient)

    def _log_likelihood(self, z: Tensor) -> Tensor:
        return self.vae._log_likelihood_of(self.x, z.to(self._dtype))


def _value_and_gradient(what: str, density: Density, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = evaluate(what, density, leaf)
        if not value.requires_grad:
            raise ValueError(f"{what} has no gradient in z, which Hamiltonian Monte Carlo needs")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().to(z.dtype), gradient


def transition(
    target: Target, point: Point, t: float, step_size: Tensor, scale: Tensor, leapfrog_steps: int
) -> tuple[Point, Tensor]:
    """One step of every chain, which leaves f_t as it is.

    Args:
        t: the temperature, see :meth:`Point.at`.
        step_size: broadcastable to [C, B].
        scale: [B, D].

    Returns:
        (the next Point, acceptance probabilities [C, B])
    """
    log_f, gradient = point.at(t)
    jitter = 1 + _JITTER * (2 * torch.rand_like(log_f) - 1)
    step = (step_size * jitter)[..., None] * scale  # [C, B, D]
    momentum = torch.randn_like(point.z)
    before = log_f - 0.5 * momentum.square().sum(-1)
    momentum = momentum + 0.5 * step * gradient
    end = point
    for i in range(leapfrog_steps):
        end = target(end.z + step * momentum)
        log_f, gradient = end.at(t)
        momentum = momentum + (0.5 if i == leapfrog_steps - 1 else 1.0) * step * gradient
    gain = log_f - 0.5 * momentum.square().sum(-1) - before
    probability = torch.where(log_f.isfinite(), gain.clamp(max=0).exp().nan_to_num(0.0), 0.0)
    accepted = torch.rand_like(probability) < probability
    return _where(accepted, end, point), probability


def _where(chosen: Tensor, new: Point, old: Point) -> Point:
    """`new` for the chosen [C, B] of the chains, `old` for the others."""
    return Point(
        *(torch.where(chosen if a.ndim == 2 else chosen[..., None], a, b) for a, b in zip(new, old, strict=True))
    )


def _begin_inside(target: Target, num_chains: int) -> Point:
    """Draws of the start where p(x, z) is above zero: from elsewhere no step size need ever bring a chain there."""
    point = target.begin(num_chains)
    for _ in range(_STARTS):
        outside = ~point.log_joint.isfinite()
        if not outside.any():
            return point
        point = _where(outside, target.begin(num_chains), point)
    lost = int(outside.any(0).sum())
    raise ValueError(
        f"log p(x, z) is not finite at any of {_STARTS} draws of the start {target.start!r}, for {lost} of "
        f"{outside.shape[1]} x decoded together: x or the model has NaN, or the prior has no density there"
    )


def _chains(
    target: Target,
    num_samples: int,
    num_chains: int,
    warmup: int,
    leapfrog_steps: int,
    acceptance: float,
    tick: Callable[[], None],
) -> PosteriorSamples:
    point, scale = _begin_inside(target, num_chains), target.scale
    log_step = torch.zeros_like(point.log_joint)  # [C, B]
    half, seen, late = warmup // 2, [], []
    for i in range(warmup):
        point, probability = transition(target, point, 1.0, log_step.exp(), scale, leapfrog_steps)
        since = i if i < half else i - half
        log_step = log_step + _GAIN * (probability - acceptance) / math.sqrt(1 + since)
        if i >= half // 2 and i < half:
            seen.append(point.z)
        if i == half - 1 and len(seen) * num_chains >= _ENOUGH_FOR_SCALE and point.z.numel():
            spread = torch.cat(seen).std(0)  # [B, D]
            usable = spread.isfinite() & (spread > 0)
            scale, log_step = torch.where(usable, spread, scale), torch.zeros_like(log_step)
        if i >= (half + warmup) // 2:
            late.append(log_step)
        tick()
    step_size = torch.stack(late).mean(0).exp()  # of the last quarter, in which it hardly moves
    drawn, total = [], torch.zeros_like(step_size)
    for _ in range(num_samples):
        point, probability = transition(target, point, 1.0, step_size, scale, leapfrog_steps)
        drawn.append(point.z)
        total += probability
        tick()
    return PosteriorSamples(torch.stack(drawn), total / num_samples, step_size)


def check_vae(vae: VAE) -> None:
    """TypeError for what is no VAE, or one of two levels, or one whose prior takes y."""
    require_methods("vae", vae, ("encoder", "decoder", "prior", "likelihood"), "a fastvae.VAE")
    if isinstance(vae, HierarchicalVAE):
        raise TypeError(
            f"vae must have one level of latents, not two as a {type(vae).__name__}; vae.log_likelihood(x) is its "
            "log-likelihood by importance sampling"
        )
    if is_conditional(vae.prior):
        raise TypeError(
            f"vae must have a prior p(z), not p(z | y) as this {type(vae.prior).__name__}; vae.log_likelihood(x, y=y) "
            "is its log-likelihood by importance sampling"
        )


def check_chains(vae: VAE, x: Tensor, num_chains: int, leapfrog_steps: int, start: str, acceptance: float) -> None:
    """Errors for what all chains take."""
    check_vae(vae)
    _checks.tensor("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [B, *x_shape], not []")
    _checks.count("num_chains", num_chains)
    _checks.count("leapfrog_steps", leapfrog_steps)
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))}, not {start!r}")
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance must be between 0 and 1, a mean probability, not {acceptance}")


def batches(x: Tensor, num_chains: int) -> tuple[Tensor, ...]:
    """x in parts, so that the chains of one are decoded together."""
    return x.split(samples_on(x.device, num_chains))


def ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    """What is called after each step of the chains, and tells how many there were."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick
