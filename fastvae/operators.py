"""The registered operators: for each its schema and its fake, which gives the shapes of its results.

A backend has the nine operators of :data:`SCHEMAS` under a prefix of its own (`fastvae::mixture_log_prob`,
`fastvae::composite_mixture_log_prob`, ...) and, if it keeps exponents, the four of :data:`EXPONENT_SCHEMAS`.

They take checked input: contiguous, of one floating dtype, z [M, D] with all leading dimensions flattened to M rows,
logvar [K, D], or [1, D] where the components share it.  A gradient that is not asked for comes back without elements,
because an operator always returns the same number of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae import _vmap


def _mixture_log_prob(z, mu, logvar, log_weights, exclude):
    return z.new_empty(z.shape[0])


def _mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude):
    return z.new_empty(z.shape[0]), torch.empty_like(z)


def _mixture_log_prob_backward(
    grad, log_prob, z, mu, logvar, log_weights, exclude, dense, need_z, need_mu, need_logvar, need_log_weights
):
    return (
        _if_needed(need_z, z),
        _if_needed(need_mu, mu),
        _if_needed(need_logvar, logvar),
        _if_needed(need_log_weights, mu[:, 0]),
    )


def _if_needed(need: bool, like: Tensor) -> Tensor:
    return like.new_empty(like.shape if need else (0,))


def _gaussian_rsample(mu, logvar, seed, num_samples):
    M, D = mu.shape
    return mu.new_empty(num_samples, M, D), mu.new_empty(num_samples, M)


def _gaussian_rsample_backward(grad_z, grad_log_q, logvar, seed, path_derivative):
    return torch.empty_like(logvar), torch.empty_like(logvar)


def _gaussian_kl(mu, logvar):
    return mu.new_empty(mu.shape[0])


def _gaussian_kl_backward(grad, mu, logvar):
    return torch.empty_like(mu), torch.empty_like(mu)


def _mixture_kl(mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, with_score):
    """(z [S, M, D], kl [S, M], log p(z) [S M], its score [S M, D])."""
    M, D = mu.shape
    z = mu.new_empty(num_samples, M, D)
    return z, mu.new_empty(num_samples, M), mu.new_empty(num_samples * M), _if_needed(with_score, z.flatten(0, 1))


def _mixture_kl_backward(
    grad_z, grad_kl, logvar, seed, path_derivative, z, log_prob, score, prior_mu, prior_logvar, log_weights, exclude,
    dense, need_q, need_mu, need_logvar, need_log_weights,
):  # fmt: skip
    """The gradients in mu, logvar, prior_mu, prior_logvar, log_weights; grad_z is None where z is not used."""
    return (
        _if_needed(need_q, logvar),
        _if_needed(need_q, logvar),
        _if_needed(need_mu, prior_mu),
        _if_needed(need_logvar, prior_logvar),
        _if_needed(need_log_weights, prior_mu[:, 0]),
    )


def exponents_per_row(K: int) -> int:
    """How many numbers forward keeps of each row for backward; the operators that keep them take it as an argument.

    They are the row's K exponents a_mk, padded to whole panels of 32 components, and for each 16 of these the room of
    one number.  That room holds a byte for each tile: whether it is active.
    """
    return (K + 31) // 32 * (32 + 2)


def _mixture_log_prob_and_exponents(z, mu, logvar, log_weights, exclude, need_z, exponents_per_row):
    """(log p(z) [M], the exponents that backward takes [M, exponents_per_row])."""
    return z.new_empty(z.shape[0]), z.new_empty(z.shape[0], exponents_per_row)


def _mixture_log_prob_backward_from_exponents(grad, log_prob, exponents, z, mu, logvar, log_weights, exclude, *need):
    return _mixture_log_prob_backward(grad, log_prob, z, mu, logvar, log_weights, exclude, False, *need)


def _mixture_kl_and_exponents(
    mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, need_q, exponents_per_row
):
    """(z [S, M, D], kl [S, M], log p(z) [S M], the exponents of the S M rows)."""
    z, kl, *_ = _mixture_kl(mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, False)
    mixture = prior_mu, prior_logvar, log_weights, exclude
    return z, kl, *_mixture_log_prob_and_exponents(z.flatten(0, 1), *mixture, need_q, exponents_per_row)


def _mixture_kl_backward_from_exponents(*arguments):
    *arguments, need_q, need_mu, need_logvar, need_log_weights = arguments
    return _mixture_kl_backward(*arguments, False, need_q, need_mu, need_logvar, need_log_weights)


class Schema(NamedTuple):
    """What is known of an operator before any backend implements it."""

    name: str
    signature: str
    fake: Callable[..., Any]


_MIXTURE = "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights, Tensor? exclude"
_PRIOR = "Tensor prior_mu, Tensor prior_logvar, Tensor? log_weights, Tensor? exclude"
_NEED = "bool need_mu, bool need_logvar, bool need_log_weights"
_TWO, _FOUR, _FIVE = (f"({', '.join(['Tensor'] * n)})" for n in (2, 4, 5))

SCHEMAS = (
    Schema("mixture_log_prob", f"({_MIXTURE}) -> Tensor", _mixture_log_prob),
    Schema("mixture_log_prob_and_score", f"({_MIXTURE}) -> {_TWO}", _mixture_log_prob_and_score),
    Schema(
        "mixture_log_prob_backward",
        f"(Tensor grad, Tensor log_prob, {_MIXTURE}, bool dense, bool need_z, {_NEED}) -> {_FOUR}",
        _mixture_log_prob_backward,
    ),
    Schema(
        "gaussian_rsample",
        f"(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples) -> {_TWO}",
        _gaussian_rsample,
    ),
    Schema(
        "gaussian_rsample_backward",
        f"(Tensor grad_z, Tensor grad_log_q, Tensor logvar, Tensor seed, bool path_derivative) -> {_TWO}",
        _gaussian_rsample_backward,
    ),
    Schema("gaussian_kl", "(Tensor mu, Tensor logvar) -> Tensor", _gaussian_kl),
    Schema("gaussian_kl_backward", f"(Tensor grad, Tensor mu, Tensor logvar) -> {_TWO}", _gaussian_kl_backward),
    Schema(
        "mixture_kl",
        f"(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples, {_PRIOR}, bool with_score) -> {_FOUR}",
        _mixture_kl,
    ),
    Schema(
        "mixture_kl_backward",
        "(Tensor? grad_z, Tensor grad_kl, Tensor logvar, Tensor seed, bool path_derivative, Tensor z, Tensor log_prob, "
        f"Tensor score, {_PRIOR}, bool dense, bool need_q, {_NEED}) -> {_FIVE}",
        _mixture_kl_backward,
    ),
)
EXPONENT_SCHEMAS = (
    Schema(
        "mixture_log_prob_and_exponents",
        f"({_MIXTURE}, bool need_z, SymInt exponents_per_row) -> {_TWO}",
        _mixture_log_prob_and_exponents,
    ),
    Schema(
        "mixture_log_prob_backward_from_exponents",
        f"(Tensor grad, Tensor log_prob, Tensor exponents, {_MIXTURE}, bool need_z, {_NEED}) -> {_FOUR}",
        _mixture_log_prob_backward_from_exponents,
    ),
    Schema(
        "mixture_kl_and_exponents",
        f"(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples, {_PRIOR}, bool need_q, SymInt exponents_per_row) "
        f"-> {_FOUR}",
        _mixture_kl_and_exponents,
    ),
    Schema(
        "mixture_kl_backward_from_exponents",
        "(Tensor? grad_z, Tensor grad_kl, Tensor logvar, Tensor seed, bool path_derivative, Tensor z, Tensor log_prob, "
        f"Tensor exponents, {_PRIOR}, bool need_q, {_NEED}) -> {_FIVE}",
        _mixture_kl_backward_from_exponents,
    ),
)


class Operators(NamedTuple):
    """The handles of one backend's operators, in the order of SCHEMAS."""

    mixture_log_prob: torch._ops.OpOverload
    mixture_log_prob_and_score: torch._ops.OpOverload
    mixture_log_prob_backward: torch._ops.OpOverload
    gaussian_rsample: torch._ops.OpOverload
    gaussian_rsample_backward: torch._ops.OpOverload
    gaussian_kl: torch._ops.OpOverload
    gaussian_kl_backward: torch._ops.OpOverload
    mixture_kl: torch._ops.OpOverload
    mixture_kl_backward: torch._ops.OpOverload


class ExponentOperators(NamedTuple):
    """The handles of the operators that pass exponents from forward to backward, in the order of EXPONENT_SCHEMAS."""

    mixture_log_prob: torch._ops.OpOverload
    mixture_log_prob_backward: torch._ops.OpOverload
    mixture_kl: torch._ops.OpOverload
    mixture_kl_backward: torch._ops.OpOverload


library = torch.library.Library("fastvae", "DEF")
library.define("cuda_unusable(int device) -> str")  # why the CUDA kernels do not run on a device; empty: they do
library.define("cpu_isa() -> str")  # the instruction set that the CPU kernels take


def define(
    prefix: str, schemas: Iterable[Schema], into: torch.library.Library = library
) -> list[torch._ops.OpOverload]:
    """Define these operators, each under `prefix` and its name, in a library; their handles, in the same order."""
    handles = []
    for schema in schemas:
        name = prefix + schema.name
        into.define(name + schema.signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{into.ns}::{name}", schema.fake, lib=into)
        handle = getattr(getattr(torch.ops, into.ns), name).default
        torch.library.register_vmap(f"{into.ns}::{name}", _vmap.rule(schema.name, handle), lib=into)
        handles.append(handle)
    return handles
