"""The operators of the mixture density and its gradients: by the kernels for small problems, or with tiles.

    l_m = logsumexp_k a_mk     score_md = dl_m / dz_md     dL/dmu, dL/dlogvar, dL/dlog w

Input is checked and contiguous; logvar is [K, D] or [1, D].  Nothing of size M x K exists.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import autotune, mixture_forward, mixture_parameters, small
from .launch import on_device_of
from .mixture_operands import Problem
from .mixture_parameters import Gradients


@on_device_of(1)
def mixture_log_prob(
    precision: str, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> Tensor:
    log_prob = z.new_empty(len(z))
    if len(z):
        _forward(Problem(precision, z, mu, logvar, log_weights, exclude), log_prob=log_prob)
    return log_prob


@on_device_of(1)
def mixture_log_prob_and_score(
    precision: str, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_prob, score = z.new_empty(len(z)), torch.empty_like(z)
    if len(z):
        _forward(Problem(precision, z, mu, logvar, log_weights, exclude), log_prob=log_prob, score=score)
    return log_prob, score


@on_device_of(1)
def mixture_log_prob_backward(
    precision: str,
    grad: Tensor,
    log_prob: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    dense: bool,
    need_z: bool,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
) -> tuple[Tensor, ...]:
    """The gradients in z, mu, logvar and log_weights; one that is not needed has no elements."""
    problem = Problem(precision, z, mu, logvar, log_weights, exclude)
    dz = torch.empty_like(z) if need_z else z.new_empty(0)
    if not len(z):
        zeros = [torch.zeros_like(t) if need else z.new_empty(0)
                 for t, need in ((mu, need_mu), (logvar, need_logvar), (mu[:, 0], need_log_weights))]  # fmt: skip
        return dz, *zeros
    if need_z:
        _forward(problem, score=dz, grad=grad, dense=dense)
    need = need_mu, need_logvar, need_log_weights
    if small.is_small(*problem.shape):
        return dz, *small.backward(grad, log_prob, *problem[1:], *need)
    wanted = Gradients(
        *(torch.empty_like(t) if needed else None for t, needed in zip((mu, mu, mu[:, 0]), need, strict=True))
    )
    if any(need):
        _parameters(problem, grad, log_prob, dense, wanted)
    if wanted.logvar is not None and problem.shared_logvar is not None:
        wanted = wanted._replace(logvar=wanted.logvar.sum(0, keepdim=True))
    return dz, *(z.new_empty(0) if d is None else d for d in wanted)


def _forward(
    problem: Problem,
    *,
    log_prob: Tensor | None = None,
    score: Tensor | None = None,
    grad: Tensor | None = None,
    dense: bool = False,
) -> None:
    """Fill log_prob [M] and score [M, D], of which either may be None; the score times grad [M], if that is given."""
    if small.is_small(*problem.shape):
        small.forward(*problem[1:], log_prob=log_prob, score=score, grad=grad)
        return
    run = partial(mixture_forward.launch, problem, log_prob, score, grad, dense)
    kind, detail = "forward" if score is None else "score", " dense" * (dense and score is not None)
    run(autotune.choose(kind, *problem[:4], run, detail))


def _parameters(problem: Problem, grad: Tensor, log_prob: Tensor, dense: bool, wanted: Gradients) -> None:
    """Fill the gradients that are wanted."""
    run = partial(mixture_parameters.launch, problem, grad, log_prob, dense, wanted)
    sums = " S0 S1 S2" if wanted.logvar is not None else " S0 S1" if wanted.mu is not None else " S0"
    run(autotune.choose("parameters", *problem[:4], run, sums + " dense" * dense))
