"""log p(x) of a VAE by annealed importance sampling, between a lower and an upper bound.

From a start f_0 that can be drawn from, q(z | x) or p(z), to p(x, z), by temperatures 0 = t_0 < ... < t_T = 1:

    log f_t(z) = log f_0(z) + t (log p(x, z) - log f_0(z))
    z_0 ~ f_0;  z_k ~ T_k(z_(k-1)), which leaves f_(t_k) as it is
    log w = sum_k (t_k - t_(k-1)) (log p(x, z_(k-1)) - log f_0(z_(k-1)))

E[w] = p(x).  So log w, and the log of a mean over chains, are lower bounds in expectation, and tighter with a larger T.
T = 1 is importance sampling.  The same chain backward, from a draw of p(z | x) to f_0, has E[1 / w] = 1 / p(x), which
gives an upper bound.  Such a draw is known for an x that the model made itself, from a z that is kept.

T_k is a step of Hamiltonian Monte Carlo (:mod:`fastvae.hmc`).  A step size that follows a chain's own past would leave
f_t not quite as it is, and the bounds would be none.  So the step sizes come from a pilot run of a few chains, one for
each x and temperature, and the chains that count take them as given, forward and backward.

Sources: Neal, Annealed importance sampling (Statistics and computing 2001); Wu, Burda, Salakhutdinov and Grosse, On the
quantitative analysis of decoder-based generative models (ICLR 2017), for VAEs and the spacing of the temperatures;
Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015), for the upper
bound.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import _checks, bounds
from fastvae.backends import choice
from fastvae.hmc import Point, Progress, Target, batches, check_chains, check_vae, ticker, transition
from fastvae.vae import VAE

_PILOT_CHAINS = 4
_ADAPTATION = 0.2  # of log step size, per acceptance probability too many


class AnnealedEstimate(NamedTuple):
    """log p(x) of each x, and the chains it comes from.

    Attributes:
        log_likelihood: [B], nats, log 1/C sum_c w_c: a lower bound in expectation.
        log_weights: [C, B], log w of each chain.
        z: [C, B, D], where the chains ended: with the weights w, importance samples of p(z | x).
        acceptance: [B], the mean acceptance probability of the chains' steps; NaN where there are none, T = 1.
    """

    log_likelihood: Tensor
    log_weights: Tensor
    z: Tensor
    acceptance: Tensor

    @property
    def effective_sample_size(self) -> Tensor:
        """[B], how many of the C chains their weights are worth; near 1, the estimate rests on a single chain."""
        return bounds.effective_sample_size(self.log_weights)

    @property
    def standard_error(self) -> Tensor:
        """[B], of log_likelihood by the chance of the chains: that of the mean weight over the mean weight.

        It is too small where the effective sample size is.
        """
        C = len(self.log_weights)
        return ((C / self.effective_sample_size - 1).clamp(min=0) / (C - 1)).sqrt()


class BidirectionalBounds(NamedTuple):
    """Bounds of log p(x) for x of the model's own, nats.

    Attributes:
        lower, upper: [B]; in expectation, lower <= log p(x) <= upper.
        x: [B, *x_shape], the simulated points.
        forward: the :class:`AnnealedEstimate` that `lower` comes from.
        backward: the one that `upper` comes from.  It estimates 1 / p(x): its log_likelihood is -upper, and its
            log_weights are log 1 / w.  All its chains begin at the one z that x was drawn from, so its standard_error
            and effective_sample_size are those for this z, and too good for log p(x): the error of a mean bound is to
            be taken over the points.
    """

    lower: Tensor
    upper: Tensor
    x: Tensor
    forward: AnnealedEstimate
    backward: AnnealedEstimate


def log_likelihood(
    vae: VAE,
    x: Tensor,
    *,
    num_chains: int = 16,
    temperatures: int | Tensor = 500,
    leapfrog_steps: int = 10,
    start: str = "posterior",
    acceptance: float = 0.65,
    progress: Progress | None = None,
) -> AnnealedEstimate:
    """log p(x) by annealed importance sampling, in memory bounded whatever the number of x and of chains is.

    Each x costs about (num_chains + 4) T L decoder passes and gradients, 4 of them for the pilot run, where
    :meth:`fastvae.VAE.log_likelihood` costs num_samples passes.  It is worth that where q(z | x) is far from p(z | x):
    there importance sampling gives much too low a bound, and says nothing of it.

    Args:
        vae: in evaluation mode, where that makes a difference: a decoder that drops units at random has no density.
        x: [B, *x_shape].
        num_chains: C independent chains for each x.
        temperatures: T, spaced by :func:`spaced_temperatures`; or the temperatures themselves, [T + 1], from 0 to 1 and
            increasing.
        leapfrog_steps: L, of each of the T - 1 steps of a chain.
        start: "posterior", f_0 = q(z | x), with its standard deviations as the scale of the steps; or "prior",
            f_0 = p(z), with the prior's.  The prior needs more temperatures, and no encoder that can be trusted.
        acceptance: the mean acceptance probability that the pilot run adapts the step sizes to.
        progress: called with (steps done, steps in all) after each step of all chains.

    Returns:
        An :class:`AnnealedEstimate`.  The same seed of PyTorch's generator gives the same numbers.

    Raises:
        TypeError, ValueError: a count is not an integer of at least 1, temperatures are not as above, there is no such
            start, acceptance is not in (0, 1), log p(x | z) has no gradient in z, or vae has two levels of latents.

    Sources: Neal (2001); Wu et al. (2017); see :mod:`fastvae.annealing`.
    """
    check_chains(vae, x, num_chains, leapfrog_steps, start, acceptance)
    schedule = _schedule(temperatures)
    parts = batches(x, num_chains)
    tick = ticker(progress, len(parts) * 2 * (len(schedule) - 2))
    estimates = []
    with torch.inference_mode(False), torch.no_grad(), choice.with_options(vae.backend_options):
        for part in parts:
            target = Target(vae, part, start)
            steps = _pilot(target, schedule, leapfrog_steps, acceptance, tick)
            estimates.append(_anneal(target, target.begin(num_chains), schedule, steps, leapfrog_steps, tick))
    return _joined(estimates)


def bidirectional_bounds(
    vae: VAE,
    num_points: int,
    *,
    num_chains: int = 16,
    temperatures: int | Tensor = 500,
    leapfrog_steps: int = 10,
    start: str = "posterior",
    acceptance: float = 0.65,
    progress: Progress | None = None,
) -> BidirectionalBounds:
    """A lower and an upper bound of log p(x) for points that the model draws: how far the estimates can be trusted.

    z ~ p(z) and x ~ p(x | z) are drawn.  The forward chains estimate log p(x) as :func:`log_likelihood` does, and the
    backward chains begin at z.  For other data, such as a test set, there is no upper bound; but where the bounds of
    simulated points are close, so is, as a rule, the lower bound of data like them to log p(x).

    Args:
        num_points: B, how many x are drawn.

        The others, Raises: as :func:`log_likelihood`.

    Returns:
        :class:`BidirectionalBounds`.

    Source: Grosse, Ghahramani and Adams (2015), see :mod:`fastvae.annealing`.
    """
    check_vae(vae)
    _checks.count("num_points", num_points)
    with torch.inference_mode(False), torch.no_grad(), choice.with_options(vae.backend_options):
        z = vae.prior.sample(num_points)
        x = vae.likelihood.sample(vae.decoder(z))
    check_chains(vae, x, num_chains, leapfrog_steps, start, acceptance)
    schedule = _schedule(temperatures)
    parts = batches(x, num_chains)
    tick = ticker(progress, len(parts) * 3 * (len(schedule) - 2))
    forward, backward = [], []
    with torch.inference_mode(False), torch.no_grad(), choice.with_options(vae.backend_options):
        for part, true_z in zip(parts, z.split(len(parts[0])), strict=True):
            target = Target(vae, part, start)
            steps = _pilot(target, schedule, leapfrog_steps, acceptance, tick)
            forward.append(_anneal(target, target.begin(num_chains), schedule, steps, leapfrog_steps, tick))
            known = target(true_z.to(target.scale).expand(num_chains, *true_z.shape))
            backward.append(_anneal(target, known, schedule.flip(0), steps.flip(0), leapfrog_steps, tick))
    up, down = _joined(forward), _joined(backward)
    return BidirectionalBounds(up.log_likelihood, -down.log_likelihood, x, up, down)


def spaced_temperatures(count: int) -> Tensor:
    """T + 1 temperatures from 0 to 1, densest at both ends, float64: a logistic curve between -4 and 4, scaled.

    Source: Wu, Burda, Salakhutdinov and Grosse (2017), section 4.
    """
    _checks.count("temperatures", count)
    curve = torch.sigmoid(torch.linspace(-4, 4, count + 1, dtype=torch.float64))
    return (curve - curve[0]) / (curve[-1] - curve[0])


def _schedule(temperatures: int | Tensor) -> Tensor:
    """[T + 1], on the CPU, whose values are read one by one."""
    if not isinstance(temperatures, Tensor):
        return spaced_temperatures(temperatures)
    if temperatures.ndim != 1 or len(temperatures) < 2 or not temperatures.is_floating_point():
        raise ValueError(
            "temperatures must be an integer T, or floating [T + 1] with T >= 1, "
            f"not {temperatures.dtype} {list(temperatures.shape)}"
        )
    schedule = temperatures.detach().cpu().double()
    if schedule[0] != 0 or schedule[-1] != 1 or not bool((schedule.diff() > 0).all()):
        raise ValueError(
            "temperatures must increase from 0 to 1, each above the one before, not "
            f"{schedule[0]:.4g}, {schedule[1]:.4g} ... {schedule[-1]:.4g}"
        )
    return schedule


def _pilot(
    target: Target, schedule: Tensor, leapfrog_steps: int, acceptance: float, tick: Callable[[], None]
) -> Tensor:
    """Step sizes [T - 1, 1, B], adapted along the way by a few chains that serve nothing else."""
    point = target.begin(_PILOT_CHAINS)
    log_step = torch.zeros_like(point.log_joint[:1])  # [1, B]
    steps = log_step.new_empty(len(schedule) - 2, *log_step.shape)
    for step, t in zip(steps, schedule[1:-1].tolist(), strict=True):
        step.copy_(log_step.exp())
        point, probability = transition(target, point, t, step, target.scale, leapfrog_steps)
        log_step = log_step + _ADAPTATION * (probability.mean(0, keepdim=True) - acceptance)
        tick()
    return steps


def _anneal(
    target: Target, point: Point, schedule: Tensor, steps: Tensor, leapfrog_steps: int, tick: Callable[[], None]
) -> AnnealedEstimate:
    """Chains from one end of the schedule to the other, with weights of that end over the one they begin at."""
    log_w, accepted = torch.zeros_like(point.log_joint), torch.zeros_like(point.log_joint)
    for k, (before, t) in enumerate(pairwise(schedule.tolist())):
        log_w += (t - before) * (point.log_joint - point.log_start)
        if k < len(steps):
            point, probability = transition(target, point, t, steps[k], target.scale, leapfrog_steps)
            accepted += probability
            tick()
    return AnnealedEstimate(bounds.log_mean_exp(log_w), log_w, point.z, (accepted / len(steps)).mean(0))


def _joined(parts: list[AnnealedEstimate]) -> AnnealedEstimate:
    log_likelihood, log_weights, z, acceptance = zip(*parts, strict=True)
    return AnnealedEstimate(
        torch.cat(log_likelihood), torch.cat(log_weights, 1), torch.cat(z, 1), torch.cat(acceptance)
    )
