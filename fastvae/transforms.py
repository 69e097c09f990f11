"""The operations under torch.func: `grad` and `vmap`, in any order, and one clear error for what they cannot do.

torch.func wants Functions whose forward knows no ctx.  They take ten times as long to call as those of `autograd.py`,
so they stand apart from these and are called within a transform alone.  Each is the operators and nothing else: no
exponents are kept, and `mixture_kl`, the groups and the marginals are made of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae import autograd, labelled_operators
from fastvae.autograd import NO_SECOND_DERIVATIVE
from fastvae.backends import BACKENDS

Results = tuple[Tensor | None, ...]

NO_FORWARD_MODE = "fastvae's kernels have no forward mode (jvp); impl='reference' has it, in plain PyTorch"


class _ReverseMode(torch.autograd.Function):
    """A Function with rules for grad and vmap, that says what to do where forward mode is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)


class _Once(_ReverseMode):
    """A gradient that depends on `inputs` but cannot be differentiated by them."""

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Results:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def once_differentiable(gradients: tuple[Tensor, ...], need: tuple[bool, ...], *inputs: Tensor | None) -> Results:
    """The gradients that are needed, None for the others; whoever differentiates one is told that it cannot be."""
    floating = [t for t in inputs if t is not None and t.is_floating_point()]
    return tuple(_Once.apply(g, *floating) if n else None for g, n in zip(gradients, need, strict=True))


class MixtureLogProbAndScore(_ReverseMode):
    """(log p(z) [M], score [M, D]); the score is never differentiable."""

    @staticmethod
    def forward(z, mu, logvar, log_weights, exclude, dense: bool, backend: str) -> tuple[Tensor, Tensor]:
        return BACKENDS[backend].operators.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *mixture, ctx.dense, ctx.backend = inputs
        log_prob, score = output
        ctx.mark_non_differentiable(score)
        ctx.save_for_backward(log_prob, *mixture)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Results:
        return _mixture_gradients(ctx, grad)


class MixtureLogProb(_ReverseMode):
    """log p(z) [M]."""

    @staticmethod
    def forward(z, mu, logvar, log_weights, exclude, dense: bool, backend: str) -> Tensor:
        return BACKENDS[backend].operators.mixture_log_prob(z, mu, logvar, log_weights, exclude)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *mixture, ctx.dense, ctx.backend = inputs
        ctx.save_for_backward(output, *mixture)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Results:
        return _mixture_gradients(ctx, grad)


def _mixture_gradients(ctx: Any, grad: Tensor) -> Results:
    log_prob, *mixture = ctx.saved_tensors
    need = ctx.needs_input_grad[:4]
    backward = BACKENDS[ctx.backend].operators.mixture_log_prob_backward
    gradients = backward(grad.contiguous(), log_prob, *mixture, ctx.dense, *need)
    return (*once_differentiable(gradients, need, grad, *mixture), None, None, None)


class LabelledMixtureLogProb(_ReverseMode):
    """(log p(z | label) [M], score [M, D], or nothing); the score is never differentiable."""

    @staticmethod
    def forward(
        z,
        mu,
        logvar,
        log_weights,
        exclude,
        labels,
        groups,
        num_labels: int,
        with_score: bool,
        dense: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        mixture = z, mu, logvar, log_weights, exclude, labels, groups, num_labels
        return labelled_operators.mixture_log_prob(*mixture, with_score, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *mixture, ctx.num_labels, _, ctx.dense, ctx.backend = inputs
        log_prob, score = output
        ctx.mark_non_differentiable(score)
        ctx.save_for_backward(log_prob, *mixture)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Results:
        log_prob, *mixture = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        gradients = labelled_operators.mixture_log_prob_backward(
            grad.contiguous(), log_prob, *mixture, ctx.num_labels, ctx.dense, *need, ctx.backend
        )
        return (*once_differentiable(gradients, need, grad, *mixture), *[None] * 7)


class GaussianRsample(_ReverseMode):
    """(z [S, M, D], log q [S, M])."""

    @staticmethod
    def forward(mu, logvar, seed, num_samples: int, path_derivative: bool, backend: str) -> tuple[Tensor, Tensor]:
        return BACKENDS[backend].operators.gaussian_rsample(mu, logvar, seed, num_samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, logvar, seed, _, ctx.path_derivative, ctx.backend = inputs
        ctx.save_for_backward(logvar, seed)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log_q: Tensor) -> Results:
        logvar, seed = ctx.saved_tensors
        backward = BACKENDS[ctx.backend].operators.gaussian_rsample_backward
        gradients = backward(grad_z.contiguous(), grad_log_q.contiguous(), logvar, seed, ctx.path_derivative)
        return (
            *once_differentiable(gradients, ctx.needs_input_grad[:2], grad_z, grad_log_q, logvar),
            None,
            None,
            None,
            None,
        )


class GaussianKL(_ReverseMode):
    """KL(N(mu, exp(logvar)) || N(0, I)), [M]."""

    @staticmethod
    def forward(mu: Tensor, logvar: Tensor, backend: str) -> Tensor:
        return BACKENDS[backend].operators.gaussian_kl(mu, logvar)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mu, logvar, ctx.backend = inputs
        ctx.save_for_backward(mu, logvar)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Results:
        mu, logvar = ctx.saved_tensors
        gradients = BACKENDS[ctx.backend].operators.gaussian_kl_backward(grad.contiguous(), mu, logvar)
        return (*once_differentiable(gradients, ctx.needs_input_grad[:2], grad, mu, logvar), None)


def _gaussian_rsample(mu, logvar, seed, num_samples: int | None, path_derivative: bool, backend: str) -> Any:
    z, log_q = GaussianRsample.apply(mu, logvar, seed, num_samples or 1, path_derivative, backend)
    return (z[0], log_q[0]) if num_samples is None else (z, log_q)


def _mixture_kl(
    mu, logvar, prior_mu, prior_logvar, log_weights, exclude, seed, num_samples, path_derivative, dense, backend
) -> tuple[Tensor, Tensor]:
    z, log_q = GaussianRsample.apply(mu, logvar, seed, num_samples or 1, path_derivative, backend)
    prior = prior_mu, prior_logvar, log_weights, exclude
    kl = log_q - MixtureLogProb.apply(z.flatten(0, 1), *prior, dense, backend).view_as(log_q)
    return (z[0], kl[0]) if num_samples is None else (z, kl)


def _grouped_mixture_log_prob(z, mu, logvar, log_weights, starts: tuple[int, ...], dense: bool, backend: str) -> Tensor:
    groups = autograd.groups(mu, logvar, log_weights, starts)
    rows = [
        z.new_full(z.shape[:1], -torch.inf)
        if components is None
        else MixtureLogProb.apply(z, *components, None, dense, backend)
        for components in groups
    ]
    return torch.stack(rows)


def _marginal_mixture_log_prob(z, mu, logvar, log_weights, exclude, dense: bool, backend: str) -> Tensor:
    dimensions = zip(z, mu, logvar, strict=True)
    return torch.stack([MixtureLogProb.apply(*part, log_weights, exclude, dense, backend) for part in dimensions])


_UNDER_TRANSFORMS: dict[type[torch.autograd.Function], Callable[..., Any]] = {
    autograd.MixtureLogProb: MixtureLogProb.apply,
    autograd.MixtureLogProbAndScore: MixtureLogProbAndScore.apply,
    autograd.GroupedMixtureLogProb: _grouped_mixture_log_prob,
    autograd.LabelledMixtureLogProb: LabelledMixtureLogProb.apply,
    autograd.MarginalMixtureLogProb: _marginal_mixture_log_prob,
    autograd.GaussianRsample: _gaussian_rsample,
    autograd.MixtureKL: _mixture_kl,
    autograd.GaussianKL: GaussianKL.apply,
}


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What function.apply(*arguments) is within a transform."""
    return _UNDER_TRANSFORMS[function](*arguments)
