"""The autograd.Functions: which operator runs forward, what is kept, which runs backward.

They take checked, flattened input (see `operators.py`).  Their last argument is the name of a backend in the registry,
whose traits they ask and whose name means nothing to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastvae import labelled_operators
from fastvae.backends import BACKENDS
from fastvae.operators import ExponentOperators, exponents_per_row

NO_SECOND_DERIVATIVE = (
    "fastvae's operations can be differentiated once: their gradients have no gradients; impl='reference' has them, in "
    "plain PyTorch"
)

Gradients = tuple[Tensor | None, ...]


class _Once(torch.autograd.Function):
    """A gradient that depends on `inputs` but cannot be differentiated by them."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Like torch's once_differentiable, but it raises whatever the upstream gradient is.

    torch's takes a result whose upstream gradient is a constant for a constant too: a penalty on d log p / dz would
    silently have no gradient.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> Gradients:
        if not torch.is_grad_enabled():  # enabled here by create_graph=True
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if torch.compiler.is_compiling():
            return gradients
        inputs = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.is_floating_point()]
        return tuple(None if g is None else _Once.apply(g, *inputs) for g in gradients)

    return wrapper


MAX_EXPONENT_BYTES = 2**24


def _exponents(backend: str, M: int, mu: Tensor) -> ExponentOperators | None:
    """The operators that keep the exponents of M rows, if the backend has them and there are not too many of them.

    An exported program keeps none: its M may be any, and a program cannot ask how large it is.
    """
    operators = BACKENDS[backend].exponents
    if operators is None or torch.compiler.is_exporting():
        return None
    size = M * exponents_per_row(mu.shape[0]) * mu.element_size()
    return operators if 0 < size <= MAX_EXPONENT_BYTES else None


def _score_in_forward(backend: str, need_z: bool, need_parameters: bool, dense: bool) -> bool:
    """Whether forward computes the score dl/dz, so that backward's gradient in z is one product.

    It does so where z alone needs a gradient, and with a backend that has `score_in_forward` wherever z needs one.  The
    score leaves out what backward may leave out, so that where `dense` asks for every term backward computes it.
    """
    return need_z and not dense and (BACKENDS[backend].score_in_forward or not need_parameters)


class MixtureLogProb(torch.autograd.Function):
    """log p(z) [M].

    A backend with `exponents` keeps those of a small problem from forward for the gradients of the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        dense: bool,
        backend: str,
    ) -> Tensor:
        need_z, *need_parameters = ctx.needs_input_grad[:4]
        mixture, score, exponents = (z, mu, logvar, log_weights, exclude), None, None
        if _score_in_forward(backend, need_z, any(need_parameters), dense):
            log_prob, score = BACKENDS[backend].operators.mixture_log_prob_and_score(*mixture)
        elif any(need_parameters) and not dense and (keeping := _exponents(backend, z.shape[0], mu)):
            log_prob, exponents = keeping.mixture_log_prob(*mixture, need_z, exponents_per_row(mu.shape[0]))
        else:
            log_prob = BACKENDS[backend].operators.mixture_log_prob(*mixture)
        ctx.save_for_backward(log_prob, score, exponents, *mixture)
        ctx.dense, ctx.backend = dense, backend
        return log_prob

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return _mixture_gradients(ctx, grad)


class MixtureLogProbAndScore(torch.autograd.Function):
    """(log p(z) [M], score [M, D]); the score is never differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        dense: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        mixture = z, mu, logvar, log_weights, exclude
        log_prob, score = BACKENDS[backend].operators.mixture_log_prob_and_score(*mixture)
        ctx.save_for_backward(log_prob, score, None, *mixture)
        ctx.mark_non_differentiable(score)
        ctx.dense, ctx.backend = dense, backend
        return log_prob, score

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Gradients:
        return _mixture_gradients(ctx, grad)


def _mixture_gradients(ctx: Any, grad: Tensor) -> Gradients:
    log_prob, score, exponents, *mixture = ctx.saved_tensors
    backend = BACKENDS[ctx.backend]
    need = list(ctx.needs_input_grad[:4])
    grads: list[Tensor | None] = [None] * 4
    if need[0] and score is not None and not ctx.dense:
        grads[0], need[0] = grad[:, None] * score, False
    if any(need):
        arriving = grad.contiguous(), log_prob
        if backend.exponents and exponents is not None:
            computed = backend.exponents.mixture_log_prob_backward(*arriving, exponents, *mixture, *need)
        else:
            computed = backend.operators.mixture_log_prob_backward(*arriving, *mixture, ctx.dense, *need)
        grads = [new if needed else old for old, new, needed in zip(grads, computed, need, strict=True)]
    return (*grads, None, None, None)


class GroupedMixtureLogProb(torch.autograd.Function):
    """log p(z | g) [G, M]; group g is the components from starts[g] up to starts[g + 1].

    One call of the operator for each group, on a slice: what goes from one call to the next is z alone, which is
    small beside the work.  A score would be [G, M, D], so backward computes the gradient in z here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        starts: tuple[int, ...],
        dense: bool,
        backend: str,
    ) -> Tensor:
        log_prob = z.new_full((len(starts) - 1, z.shape[0]), -math.inf)
        for row, components in zip(log_prob, groups(mu, logvar, log_weights, starts), strict=True):
            if components is not None:
                row.copy_(BACKENDS[backend].operators.mixture_log_prob(z, *components, None))
        ctx.save_for_backward(log_prob, z, mu, logvar, log_weights)
        ctx.starts, ctx.dense, ctx.backend = starts, dense, backend
        return log_prob

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        log_prob, z, mu, logvar, log_weights = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        totals = [torch.zeros_like(t) if n else None for t, n in zip((z, mu, logvar, log_weights), need, strict=True)]
        backward = BACKENDS[ctx.backend].operators.mixture_log_prob_backward
        mixtures = groups(mu, logvar, log_weights, ctx.starts)
        slices = (slice(*pair) for pair in pairwise(ctx.starts))
        for g, log_p, components, k in zip(grad.contiguous(), log_prob, mixtures, slices, strict=True):
            if components is None:
                continue
            places = slice(None), k, k if len(logvar) == len(mu) else slice(None), k
            parts = backward(g, log_p, z, *components, None, ctx.dense, *need)
            for total, place, part in zip(totals, places, parts, strict=True):
                if total is not None:
                    total[place] += part
        return (*totals, None, None, None)


def groups(
    mu: Tensor, logvar: Tensor, log_weights: Tensor | None, starts: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None] | None]:
    """Each group's (mu, logvar, log_weights), None for one without components; logvar is [K, D] or shared [1, D]."""
    for start, stop in pairwise(starts):
        k = slice(start, stop)
        own_logvar = logvar[k] if len(logvar) == len(mu) else logvar
        yield (mu[k], own_logvar, None if log_weights is None else log_weights[k]) if stop > start else None


class MarginalMixtureLogProb(torch.autograd.Function):
    """log p(z_d) [D, M] of each dimension by itself: D mixtures of K one-dimensional components.

    z [D, M, 1], mu [D, K, 1], logvar [D, K, 1] or shared [D, 1, 1].  One call of the operator for each dimension, on
    a slice.  No exponents are kept: those of D small problems together would not be small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        dense: bool,
        backend: str,
    ) -> Tensor:
        need_z, *need_parameters = ctx.needs_input_grad[:4]
        operators, score = BACKENDS[backend].operators, None
        log_prob = z.new_empty(z.shape[:2])
        with_score = _score_in_forward(backend, need_z, any(need_parameters), dense)
        if with_score:
            score = torch.empty_like(z)
        for d, components in enumerate(zip(z, mu, logvar, strict=True)):
            mixture = *components, log_weights, exclude
            if score is None:
                log_prob[d] = operators.mixture_log_prob(*mixture)
            else:
                log_prob[d], score[d] = operators.mixture_log_prob_and_score(*mixture)
        ctx.save_for_backward(log_prob, score, z, mu, logvar, log_weights, exclude)
        ctx.dense, ctx.backend = dense, backend
        return log_prob

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        log_prob, score, z, mu, logvar, log_weights, exclude = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:4])
        grads = [torch.zeros_like(t) if n else None for t, n in zip((z, mu, logvar, log_weights), need, strict=True)]
        if score is not None:
            grads[0], need[0] = grad[..., None] * score, False
        if any(need):
            backward = BACKENDS[ctx.backend].operators.mixture_log_prob_backward
            for d, g in enumerate(grad.contiguous()):
                mixture = z[d], mu[d], logvar[d], log_weights, exclude
                parts = backward(g, log_prob[d], *mixture, ctx.dense, *need)
                for total, part, needed in zip(grads[:3], parts, need, strict=False):
                    if total is not None and needed:
                        total[d] = part
                if grads[3] is not None:
                    grads[3] += parts[3]  # the dimensions share the weights
        return (*grads, None, None, None)


class LabelledMixtureLogProb(torch.autograd.Function):
    """(log p(z | label) [M], score [M, D], or nothing where it is not asked for); see `labelled_operators`."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        labels: Tensor,
        groups: Tensor | None,
        num_labels: int,
        with_score: bool,
        dense: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        need_z, *need_parameters = ctx.needs_input_grad[:4]
        at_once = _score_in_forward(backend, need_z, any(need_parameters), dense)
        mixture = z, mu, logvar, log_weights, exclude, labels, groups, num_labels
        log_prob, score = labelled_operators.mixture_log_prob(*mixture, with_score or at_once, backend)
        ctx.save_for_backward(log_prob, score, z, mu, logvar, log_weights, exclude, labels, groups)
        ctx.mark_non_differentiable(score)
        ctx.num_labels, ctx.dense, ctx.backend = num_labels, dense, backend
        return log_prob, score

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Gradients:
        log_prob, score, *mixture = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:4])
        from_score = need[0] and score.numel() > 0 and not ctx.dense
        need[0] = need[0] and not from_score
        grads: list[Tensor | None] = [None] * 4
        if any(need):
            computed = labelled_operators.mixture_log_prob_backward(
                grad.contiguous(), log_prob, *mixture, ctx.num_labels, ctx.dense, *need, ctx.backend
            )
            grads = [new if needed else None for new, needed in zip(computed, need, strict=True)]
        if from_score:
            grads[0] = grad[:, None] * score
        return (*grads, *[None] * 7)


def _without_samples(result: Tensor) -> Tensor:
    """A result [1, ...] as [...]: itself, not a view, which could not be changed in place."""
    if torch.compiler.is_compiling():  # PyTorch 2.11 compiles squeeze_ here to wrong gradients
        return result.squeeze(0)
    return result.squeeze_(0)


class GaussianRsample(torch.autograd.Function):
    """(z [S, M, D], log q [S, M]), or without the S where num_samples is None; backward draws the noise again."""

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        num_samples: int | None,
        path_derivative: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logvar, seed)
        ctx.path_derivative, ctx.backend, ctx.one = path_derivative, backend, num_samples is None
        z, log_q = BACKENDS[backend].operators.gaussian_rsample(mu, logvar, seed, num_samples or 1)
        return (_without_samples(z), _without_samples(log_q)) if ctx.one else (z, log_q)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_q: Tensor) -> Gradients:
        logvar, seed = ctx.saved_tensors
        if ctx.one:
            grad_z, grad_log_q = grad_z.unsqueeze(0), grad_log_q.unsqueeze(0)
        dmu, dlogvar = BACKENDS[ctx.backend].operators.gaussian_rsample_backward(
            grad_z.contiguous(), grad_log_q.contiguous(), logvar, seed, ctx.path_derivative
        )
        return dmu, dlogvar, None, None, None, None


class MixtureKL(torch.autograd.Function):
    """(z [S, M, D], log q(z) - log p(z) [S, M]), or without the S where num_samples is None.

    Sampling and density as above, in one node of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Tensor,
        prior_logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        seed: Tensor,
        num_samples: int | None,
        path_derivative: bool,
        dense: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        need_q, need_prior = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:5])
        S, prior = num_samples or 1, (prior_mu, prior_logvar, log_weights, exclude)
        arguments, score, exponents = (mu, logvar, seed, S, *prior), None, None
        if need_prior and not dense and (keeping := _exponents(backend, S * mu.shape[0], prior_mu)):
            per_row = exponents_per_row(prior_mu.shape[0])
            z, kl, log_prob, exponents = keeping.mixture_kl(*arguments, need_q, per_row)
        else:
            with_score = _score_in_forward(backend, need_q, need_prior, dense)
            z, kl, log_prob, score = BACKENDS[backend].operators.mixture_kl(*arguments, with_score)
        ctx.one = num_samples is None
        if ctx.one:
            z, kl = _without_samples(z), _without_samples(kl)
        ctx.save_for_backward(logvar, seed, z, log_prob, score, exponents, *prior)
        ctx.path_derivative, ctx.dense, ctx.backend = path_derivative, dense, backend
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Gradients:
        logvar, seed, z, log_prob, score, exponents, *prior = ctx.saved_tensors
        if grad_kl is None:
            grad_kl = z.new_zeros(z.shape[:-1])
        if ctx.one:
            z, grad_kl = z.unsqueeze(0), grad_kl.unsqueeze(0)
            grad_z = None if grad_z is None else grad_z.unsqueeze(0)
        need = ctx.needs_input_grad
        need_q = need[0] or need[1]
        backend, sampled = BACKENDS[ctx.backend], (logvar, seed, ctx.path_derivative, z, log_prob)
        arriving = None if grad_z is None else grad_z.contiguous(), grad_kl.contiguous()
        wanted = need_q, *need[2:5]
        if backend.exponents and exponents is not None:
            computed = backend.exponents.mixture_kl_backward(*arriving, *sampled, exponents, *prior, *wanted)
        else:
            computed = backend.operators.mixture_kl_backward(*arriving, *sampled, score, *prior, ctx.dense, *wanted)
        gradients = (g if needed else None for g, needed in zip(computed, need[:5], strict=True))
        return (*gradients, None, None, None, None, None, None)


class GaussianKL(torch.autograd.Function):
    """KL(N(mu, exp(logvar)) || N(0, I)), [M]."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(mu, logvar)
        ctx.backend = backend
        return BACKENDS[backend].operators.gaussian_kl(mu, logvar)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return (*BACKENDS[ctx.backend].operators.gaussian_kl_backward(grad.contiguous(), *ctx.saved_tensors), None)
