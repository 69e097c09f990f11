"""The autograd.Functions: which operator runs forward, what is kept, which runs backward.

They take checked, flattened input (see `ops.py`); the last argument names the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastvae.ops import operators

Gradients = tuple[Tensor | None, ...]


class _Once(torch.autograd.Function):
    """A gradient that depends on `inputs` but cannot be differentiated by them."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError("fastvae's operations can be differentiated once; their gradients have no gradients")


def _differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
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


class MixtureLogProb(torch.autograd.Function):
    """(log p(z) [M], score [M, D]); the score is empty unless it was asked for, and is never differentiable.

    The score is dl/dz.  Where z alone needs a gradient, forward computes it on the way and backward is one product.
    With Triton so it is wherever z needs one: its kernels compute the gradients of z and of the parameters apart.
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
        with_score: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        op = operators[backend]
        need_z, *need_parameters = ctx.needs_input_grad[:4]
        apart = backend.startswith("triton") or not any(need_parameters)
        if with_score or (need_z and apart):
            log_prob, score = op.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude)
        else:
            log_prob, score = op.mixture_log_prob(z, mu, logvar, log_weights, exclude), z.new_empty(0)
        ctx.save_for_backward(log_prob, score, z, mu, logvar, log_weights, exclude)
        ctx.mark_non_differentiable(score)
        ctx.dense, ctx.backend = dense, backend
        return log_prob, score

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Gradients:
        log_prob, score, *saved = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:4])
        from_score = need[0] and score.numel() > 0
        grads: list[Tensor | None] = [None] * 4
        if from_score:
            grads[0], need[0] = grad[:, None] * score, False
        if any(need):
            computed = operators[ctx.backend].mixture_log_prob_backward(
                grad.contiguous(), log_prob, *saved, ctx.dense, *need
            )
            grads = [new if needed else old for old, new, needed in zip(grads, computed, need, strict=True)]
        return (*grads, None, None, None, None)


class GaussianRsample(torch.autograd.Function):
    """(z [S, M, D], log q [S, M]); backward draws the noise again from the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        num_samples: int,
        path_derivative: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logvar, seed)
        ctx.path_derivative, ctx.backend = path_derivative, backend
        return operators[backend].gaussian_rsample(mu, logvar, seed, num_samples)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_q: Tensor) -> Gradients:
        logvar, seed = ctx.saved_tensors
        dmu, dlogvar = operators[ctx.backend].gaussian_rsample_backward(
            grad_z.contiguous(), grad_log_q.contiguous(), logvar, seed, ctx.path_derivative
        )
        return dmu, dlogvar, None, None, None, None


class GaussianKL(torch.autograd.Function):
    """KL(N(mu, exp(logvar)) || N(0, I)), [M]."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(mu, logvar)
        ctx.backend = backend
        return operators[backend].gaussian_kl(mu, logvar)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return (*operators[ctx.backend].gaussian_kl_backward(grad.contiguous(), *ctx.saved_tensors), None)
