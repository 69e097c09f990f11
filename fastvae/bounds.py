"""Multi-sample bounds on log p(x), and the estimators of their gradients.

With w_s = p(x | z_s) [p(z_s) / q(z_s | x)]^beta of S draws z_s ~ q(z | x) = N(mu, sigma^2), and beta = 1:

    ELBO = 1/S sum_s log w_s        IWAE = log 1/S sum_s w_s        ELBO <= IWAE <= log p(x), in expectation

:func:`elbo` and :func:`iwae` return a :class:`Bound`.  Its `objective` is a tensor whose *value* is the bound and whose
*gradient* is the estimator: there is no surrogate that could be taken for it.  With v_s = w_s / sum w (or 1/S, for the
ELBO) its gradient in the parameters of p(x, z) is sum_s v_s d log w_s, and in those of q it is one of

    plain   sum_s v_s (d log w_s / dz_s dz_s - beta d log q(z_s | x) at fixed z_s)
    stl     sum_s v_s  d log w_s / dz_s dz_s                                 sticking the landing
    dreg    sum_s v_s (1 - beta + beta v_s) d log w_s / dz_s dz_s            doubly reparameterised

The second term of `plain` has mean zero for the ELBO, so `stl` leaves it out and has no variance where q is the
posterior.  For IWAE its mean is not zero, so `stl` is biased; `dreg` puts in its place what it is in expectation:
E[v_s d log q(z_s | x)] = E[dv_s / dz_s dz_s] with dv_s / dz_s = v_s (1 - v_s) d log w_s / dz_s.

Few of the IWAE bound's S samples have nearly all of the weight, so few need a backward pass.  `backward_samples=m` puts
in the place of v_s a random weight whose mean is v_s and which is 0 for all but m of the samples.

Sources: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders (ICLR 2016); Roeder, Wu and Duvenaud,
Sticking the landing (NeurIPS 2017); Tucker, Lawson, Gu and Maddison, Doubly reparameterized gradient estimators for
Monte Carlo objectives (ICLR 2019), whose beta is 1.  That one sample, drawn by its weight, is enough for an unbiased
gradient is in Burda et al.; which m to take, in Fearnhead and Clifford, On-line inference for hidden Markov models via
particle filters (JRSS B 2003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastvae import _checks
from fastvae import functional as F
from fastvae._few import forget_casts, resampled, samples_on
from fastvae._noise import part_of_batch, rows_of_batch
from fastvae.backends import BackendOptions, choice
from fastvae.contracts import evaluate
from fastvae.priors import Density

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_GRADIENTS = {"elbo": "plain", "iwae": "dreg"}
BOUNDS = tuple(DEFAULT_GRADIENTS)
GRADIENTS = ("plain", "stl", "dreg")

# (mu [B, D], logvar [B, D], s, path_derivative) -> (z [s, B, ...], log q(z | x) [s, B]).  With path_derivative the
# gradient of log q flows through z alone, as of :func:`fastvae.gaussian_rsample`.
Sampler = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


class Bound(NamedTuple):
    """A bound on log p(x) of each x, and the draws that it was made from.

    Attributes:
        objective: [B], nats, differentiable: the bound with the KL term weighed by beta; with beta = 1, the bound.
            The estimator is its gradient alone.
        z: [S, B, D], the draws, differentiable in mu and logvar as any reparameterised sample, whatever the estimator
            is: another loss of z may be added to the objective.
        log_likelihood: [S, B], log p(x | z), differentiable for the ELBO; for the IWAE bound a constant.
        kl: [S, B], log q(z | x) - log p(z); likewise, for the ELBO with the gradient of its estimator.
    """

    objective: Tensor
    z: Tensor
    log_likelihood: Tensor
    kl: Tensor

    @property
    def log_weights(self) -> Tensor:
        """[S, B], log p(x, z) / q(z | x); no gradient."""
        return (self.log_likelihood - self.kl).detach()

    @property
    def effective_sample_size(self) -> Tensor:
        """[B], 1 / sum_s v_s^2 of the normalised weights v: between 1 and S."""
        return effective_sample_size(self.log_weights)


def elbo(
    log_likelihood: Density,
    log_prior: Density,
    mu: Tensor,
    logvar: Tensor,
    num_samples: int = 1,
    *,
    gradient: str | None = None,
    beta: float = 1.0,
    chunk_size: int | None = None,
    **backend: Unpack[BackendOptions],
) -> Bound:
    """The evidence lower bound by S draws: E[log p(x | z) - beta (log q(z | x) - log p(z))].

    Args:
        log_likelihood: z [s, B, D] -> log p(x | z) [s, B], each from its own z alone.  Under "dreg" the gradient in
            this z is scaled; for another loss take z from the Bound.
        log_prior: z [s, B, D] -> log p(z) [s, B], likewise.
        mu, logvar: [B, D], q(z | x).
        num_samples: S.
        gradient: "plain", which None means, or "stl" (which "dreg" would be here too).
        beta: weight of the KL term.
        chunk_size: draw so many samples at a time and compute their activations again in backward, so that memory
            does not grow with S; None keeps those of all S.
        backend: impl, precision, dense_backward, as of :func:`fastvae.use_backend`, for all operations inside.

    Returns:
        A :class:`Bound`; its `objective` [B] is what to maximise.

    Raises:
        TypeError, ValueError: log_likelihood or log_prior does not return [s, B]; num_samples or chunk_size < 1; there
            is no such estimator.
    """
    with choice.with_options(choice.checked("elbo", backend)):
        return estimate("elbo", log_likelihood, log_prior, mu, logvar, gradient, beta, num_samples, chunk_size)


def iwae(
    log_likelihood: Density,
    log_prior: Density,
    mu: Tensor,
    logvar: Tensor,
    num_samples: int,
    *,
    gradient: str | None = None,
    beta: float = 1.0,
    chunk_size: int | None = None,
    backward_samples: int | None = None,
    **backend: Unpack[BackendOptions],
) -> Bound:
    """The importance weighted bound: log 1/S sum_s p(x | z_s) [p(z_s) / q(z_s | x)]^beta.

    Args:
        gradient: "dreg", which None means, "plain" or "stl"; the last is biased for S > 1.
        beta: 0 ... 1, for warm-up; every estimator is that of the objective with this beta.
        backward_samples: how many of the S samples of each x get a gradient, chosen at random by their weights, so that
            its mean is that of all S; None means all.  Both densities are then computed without activations for all
            S, and once more for those chosen.  They must give a z the same value both times: dropout does not, nor does
            batch normalisation in training.
        chunk_size: with `backward_samples`, how many samples at a time are computed without activations; None means
            all for the prior, and for the likelihood as many as a CPU's cache holds.

        The others, Returns, Raises: as :func:`elbo`.
    """
    with choice.with_options(choice.checked("iwae", backend)):
        counts = num_samples, chunk_size, backward_samples
        return estimate("iwae", log_likelihood, log_prior, mu, logvar, gradient, beta, *counts)


def gaussian_sampler(mu: Tensor, logvar: Tensor, count: int, path_derivative: bool) -> tuple[Tensor, Tensor]:
    """The sampler of q(z | x) = N(mu, exp(logvar))."""
    return F.gaussian_rsample(mu, logvar, count, path_derivative=path_derivative)


def estimate(
    bound: str,
    log_likelihood: Density,
    log_prior: Density,
    mu: Tensor,
    logvar: Tensor,
    gradient: str | None,
    beta: float,
    num_samples: int,
    chunk_size: int | None,
    backward_samples: int | None = None,
    sampler: Sampler = gaussian_sampler,
) -> Bound:
    """The bound of this name, of z that the sampler draws.  Others as elsewhere."""
    gradient = gradient_for(bound, gradient)
    if (bound, gradient) == ("elbo", "dreg"):
        raise ValueError("gradient='dreg' is for the IWAE bound; for the ELBO it is gradient='stl'")
    _check_counts(num_samples, chunk_size, backward_samples)
    if bound == "elbo" and backward_samples is not None:
        raise ValueError("backward_samples is for the IWAE bound; the ELBO's samples weigh the same, so draw fewer")
    densities = log_likelihood, log_prior
    if backward_samples is not None and backward_samples < num_samples and torch.is_grad_enabled():
        return _iwae_of_few(*densities, mu, logvar, gradient, beta, num_samples, chunk_size, backward_samples, sampler)
    z, log_x, kl, carrier = _draws(*densities, mu, logvar, gradient, num_samples, chunk_size, sampler)
    log_w = log_x - beta * kl  # [S, B]
    if bound == "elbo":
        return Bound(log_w.mean(0), z, log_x, kl)
    objective = log_mean_exp(log_w)  # its gradient in log w_s is v_s
    if gradient == "dreg":
        v = torch.softmax(log_w.detach(), 0)
        objective = _SendBack.apply(objective, carrier, 1 - beta + beta * v)
    return Bound(objective, z, log_x.detach(), kl.detach())


def _iwae_of_few(
    log_likelihood: Density,
    log_prior: Density,
    mu: Tensor,
    logvar: Tensor,
    gradient: str,
    beta: float,
    num_samples: int,
    chunk_size: int | None,
    backward_samples: int,
    sampler: Sampler,
) -> Bound:
    """The IWAE bound, whose gradient is that of `backward_samples` of the draws."""
    z, log_q = sampler(mu, logvar, num_samples, gradient != "plain")
    with torch.no_grad():
        of_x, of_prior = z.split(chunk_size or _decoded_at_once(z)), z.split(chunk_size or num_samples)
        log_x = torch.cat([evaluate("log_likelihood", log_likelihood, part) for part in of_x])
        kl = log_q - torch.cat([evaluate("log_prior", log_prior, part) for part in of_prior])
        log_w = log_x - beta * kl
        v = torch.softmax(log_w, 0)
        kept, weights = resampled(v, backward_samples)
    forget_casts()

    def draws_kept(*_: object) -> tuple[Tensor, Tensor]:
        return _rows(z, kept), _rows(log_q, kept)

    densities = log_likelihood, log_prior
    _, kept_x, kept_kl, carrier = _draws(*densities, mu, logvar, gradient, backward_samples, None, draws_kept)
    # The compiled backward pass makes anew, with other random numbers, what no output of the forward pass depends on.
    # So the bound must seem to depend on the samples kept.
    value = torch.where(kept[0] >= 0, log_mean_exp(log_w), math.nan)
    objective = _WithGradient.apply(value, kept_x - beta * kept_kl, weights)
    if gradient == "dreg":
        objective = _SendBack.apply(objective, carrier, 1 - beta + beta * _rows(v, kept))
    return Bound(objective, z, log_x, kl)


def _decoded_at_once(z: Tensor) -> int:
    """How many of the samples z [S, B, D]: compiled code takes all, as a number of pieces would tie it to one B."""
    S, B = z.shape[:2]
    return S if torch.compiler.is_compiling() else samples_on(z.device, B)


def _rows(value: Tensor, s: Tensor) -> Tensor:
    """value[s[m, b], b, ...] of value [S, B, ...] and s [M, B]: [M, B, ...]."""
    return value.gather(0, s.reshape(*s.shape, *(1,) * (value.ndim - 2)).expand(*s.shape, *value.shape[2:]))


def gradient_for(bound: str, gradient: str | None) -> str:
    """The estimator's name, or that of the bound's default for None."""
    return DEFAULT_GRADIENTS[bound] if gradient is None else gradient


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log 1/S sum_s w_s, the IWAE bound of these weights: [S, ...] -> [...]."""
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """How many equally weighted samples these are worth: [S, ...] -> [...], (sum w)^2 / sum w^2, in 1 ... S.

    Source: Kong, A note on importance sampling using standardized weights (1992).
    """
    return 1 / torch.softmax(log_weights, 0).square().sum(0)


def _check_counts(num_samples: int, chunk_size: int | None, backward_samples: int | None) -> None:
    _checks.count("num_samples", num_samples)
    for name, count in (("chunk_size", chunk_size), ("backward_samples", backward_samples)):
        if count is not None:
            _checks.count(name, count, " or None")


def _draws(
    log_likelihood: Density,
    log_prior: Density,
    mu: Tensor,
    logvar: Tensor,
    gradient: str,
    num_samples: int,
    chunk_size: int | None,
    sampler: Sampler,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z [S, B, D], log p(x | z), log q(z | x) - log p(z), carrier), the last three [S, B]; see :class:`_Scale`.

    z is what was drawn, not what :class:`_Scale` made of it: the scale is for the objective's gradient alone.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, not {gradient!r}")

    def some(mu: Tensor, logvar: Tensor, count: int) -> tuple[Tensor, ...]:
        z, log_q = sampler(mu, logvar, count, gradient != "plain")
        scaled, carrier = z, log_q.new_empty(0)
        if gradient == "dreg":
            scaled, log_q, carrier = _Scale.apply(z, log_q)
        log_x, log_p = evaluate("log_likelihood", log_likelihood, scaled), evaluate("log_prior", log_prior, scaled)
        return z, log_x, log_q - log_p, carrier

    step = chunk_size or num_samples
    if step >= num_samples:
        z, log_x, kl, carrier = some(mu, logvar, num_samples)
        return z, log_x, kl, carrier
    parts = []
    # called again in backward, whatever is chosen by then, and whichever rows' noise is drawn
    some = rows_of_batch(part_of_batch())(choice.exactly(choice.current())(some))
    for start in range(0, num_samples, step):  # the checkpoint restores the generator, so the draws are the same
        parts.append(checkpoint(some, mu, logvar, min(step, num_samples - start), use_reentrant=False))
    z, log_x, kl, carrier = (torch.cat(part) for part in zip(*parts, strict=True))
    return z, log_x, kl, carrier


class _Scale(torch.autograd.Function):
    """Returns z [s, B, D] and log q [s, B] unchanged, and a third output, whose gradient scales theirs in backward.

    v_s is known only when all weights are.  :class:`_SendBack` sends it to the third output, through whatever cuts the
    samples into chunks or computes them again, and so it reaches the gradient in z_s.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return z.view_as(z), log_q.view_as(log_q), torch.zeros_like(log_q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return grad_z * scale[..., None], grad_log_q * scale


class _SendBack(torch.autograd.Function):
    """Passes the objective [B] on; backward gives `scale` [S, B] to the carrier, whatever arrives."""

    @staticmethod
    def forward(ctx: Any, objective: Tensor, carrier: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return objective.view_as(objective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, *ctx.saved_tensors, None


class _WithGradient(torch.autograd.Function):
    """Passes the objective [B] on; what arrives for it goes on to log_weights [M, B], times `scale` [M, B]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(objective: Tensor, log_weights: Tensor, scale: Tensor) -> Tensor:
        return objective.view_as(objective)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return None, scale * grad, None
