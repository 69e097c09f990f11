"""The registered operators: schemas, fakes and handles.

Each backend has the same nine operators under a prefix of its own: `fastvae::mixture_log_prob` is dispatched by
device to the compiled kernels, `fastvae::composite_mixture_log_prob` is plain PyTorch, `fastvae::triton_...` Triton,
which has those of the mixture once more for each lower precision.  They take checked input:
contiguous, of one floating dtype, rows flattened to z [M, D]; logvar is [K, D], or [1, D] where all share it.

A gradient that was not asked for comes back with no elements, because an operator's arity is fixed.

The CPU kernels have four more: of a small problem forward keeps the exponents, an [M, K] array, for backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import composite, composition, triton_kernels

_MIXTURE = "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights, Tensor? exclude"
_PRIOR = "Tensor prior_mu, Tensor prior_logvar, Tensor? log_weights, Tensor? exclude"
_SCHEMAS = {
    "mixture_log_prob": f"({_MIXTURE}) -> Tensor",
    "mixture_log_prob_and_score": f"({_MIXTURE}) -> (Tensor, Tensor)",
    "mixture_log_prob_backward": f"(Tensor grad, Tensor log_prob, {_MIXTURE}, bool dense, bool need_z, bool need_mu, "
    "bool need_logvar, bool need_log_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_rsample": "(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples) -> (Tensor, Tensor)",
    "gaussian_rsample_backward": "(Tensor grad_z, Tensor grad_log_q, Tensor logvar, Tensor seed, "
    "bool path_derivative) -> (Tensor, Tensor)",
    "gaussian_kl": "(Tensor mu, Tensor logvar) -> Tensor",
    "gaussian_kl_backward": "(Tensor grad, Tensor mu, Tensor logvar) -> (Tensor, Tensor)",
    "mixture_kl": f"(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples, {_PRIOR}, bool with_score) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "mixture_kl_backward": "(Tensor? grad_z, Tensor grad_kl, Tensor logvar, Tensor seed, bool path_derivative, "
    f"Tensor z, Tensor log_prob, Tensor score, {_PRIOR}, bool dense, bool need_q, bool need_mu, bool need_logvar, "
    "bool need_log_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
_SCHEMAS_OF_CPU = {
    "mixture_log_prob_and_exponents": f"({_MIXTURE}, bool need_z) -> (Tensor, Tensor)",
    "mixture_log_prob_backward_from_exponents": f"(Tensor grad, Tensor log_prob, Tensor exponents, {_MIXTURE}, "
    "bool need_z, bool need_mu, bool need_logvar, bool need_log_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "mixture_kl_and_exponents": f"(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples, {_PRIOR}, bool need_q) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "mixture_kl_backward_from_exponents": "(Tensor? grad_z, Tensor grad_kl, Tensor logvar, Tensor seed, "
    f"bool path_derivative, Tensor z, Tensor log_prob, Tensor exponents, {_PRIOR}, bool need_q, bool need_mu, "
    "bool need_logvar, bool need_log_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _mixture_log_prob(z, mu, logvar, log_weights, exclude):
    return z.new_empty(z.shape[0])


def _mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude):
    return z.new_empty(z.shape[0]), torch.empty_like(z)


def _mixture_log_prob_backward(
    grad, log_prob, z, mu, logvar, log_weights, exclude, dense, need_z, need_mu, need_logvar, need_log_weights
):
    return (
        _wanted(need_z, z),
        _wanted(need_mu, mu),
        _wanted(need_logvar, logvar),
        _wanted(need_log_weights, mu[:, 0]),
    )


def _wanted(need: bool, like: Tensor) -> Tensor:
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
    return z, mu.new_empty(num_samples, M), mu.new_empty(num_samples * M), _wanted(with_score, z.flatten(0, 1))


def _mixture_kl_backward(
    grad_z,
    grad_kl,
    logvar,
    seed,
    path_derivative,
    z,
    log_prob,
    score,
    prior_mu,
    prior_logvar,
    log_weights,
    exclude,
    dense,
    need_q,
    need_mu,
    need_logvar,
    need_log_weights,
):
    """dmu, dlogvar, dprior_mu, dprior_logvar, dlog_weights; grad_z is None where z is not used."""
    return (
        _wanted(need_q, logvar),
        _wanted(need_q, logvar),
        _wanted(need_mu, prior_mu),
        _wanted(need_logvar, prior_logvar),
        _wanted(need_log_weights, prior_mu[:, 0]),
    )


def kept_numbers(K: int) -> int:
    """What is kept of each row: its exponents, by whole panels, and with each 16 of them one for which tiles matter."""
    return (K + 31) // 32 * 34


def _mixture_log_prob_and_exponents(z, mu, logvar, log_weights, exclude, need_z):
    """log p(z) [M], and what backward takes."""
    return z.new_empty(z.shape[0]), z.new_empty(z.shape[0], kept_numbers(mu.shape[0]))


def _mixture_log_prob_backward_from_exponents(grad, log_prob, exponents, z, mu, logvar, log_weights, exclude, *need):
    return _mixture_log_prob_backward(grad, log_prob, z, mu, logvar, log_weights, exclude, False, *need)


def _mixture_kl_and_exponents(mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, need_q):
    z, kl, *_ = _mixture_kl(mu, logvar, seed, num_samples, prior_mu, prior_logvar, log_weights, exclude, False)
    mixture = prior_mu, prior_logvar, log_weights, exclude
    return z, kl, *_mixture_log_prob_and_exponents(z.flatten(0, 1), *mixture, need_q)


def _mixture_kl_backward_from_exponents(*arguments):
    *arguments, need_q, need_mu, need_logvar, need_log_weights = arguments
    return _mixture_kl_backward(*arguments, False, need_q, need_mu, need_logvar, need_log_weights)


class Keeping(NamedTuple):
    """The operators with which exponents are kept from forward to backward, in the order of their schemas above."""

    mixture_log_prob: torch._ops.OpOverload
    mixture_log_prob_backward: torch._ops.OpOverload
    mixture_kl: torch._ops.OpOverload
    mixture_kl_backward: torch._ops.OpOverload


class Operators(NamedTuple):
    """One backend's operators, in the order of the schemas above."""

    mixture_log_prob: torch._ops.OpOverload
    mixture_log_prob_and_score: torch._ops.OpOverload
    mixture_log_prob_backward: torch._ops.OpOverload
    gaussian_rsample: torch._ops.OpOverload
    gaussian_rsample_backward: torch._ops.OpOverload
    gaussian_kl: torch._ops.OpOverload
    gaussian_kl_backward: torch._ops.OpOverload
    mixture_kl: torch._ops.OpOverload
    mixture_kl_backward: torch._ops.OpOverload
    keeping: Keeping | None  # exponents, if it can


_library = torch.library.Library("fastvae", "DEF")


def _define(prefix: str, names: Iterable[str] = tuple(_SCHEMAS)) -> dict[str, torch._ops.OpOverload]:
    for name in names:
        schema = (_SCHEMAS | _SCHEMAS_OF_CPU)[name]
        _library.define(f"{prefix}{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastvae::{prefix}{name}", globals()[f"_{name}"], lib=_library)
    return {name: getattr(torch.ops.fastvae, prefix + name).default for name in names}


def compose(library: torch.library.Library, prefix: str, backend: Operators) -> None:
    """mixture_kl of the backend's other operators, wherever it has none of its own."""
    for name in ("mixture_kl", "mixture_kl_backward"):
        library.impl(f"{prefix}{name}", partial(getattr(composition, name), backend), "CompositeExplicitAutograd")


_library.define("cpu_isa() -> str")
native = Operators(**_define(""), keeping=None)
plain = Operators(**_define("composite_"), keeping=None)
triton = Operators(**_define("triton_"), keeping=None)
on_cpu = native._replace(keeping=Keeping(*_define("", _SCHEMAS_OF_CPU).values()))
operators = {"cpu": on_cpu, "cuda": native, "composite": plain, "triton": triton}
_of_mixture = [name for name in _SCHEMAS if name.startswith("mixture")]
for _precision in ("high", "medium"):
    operators[f"triton-{_precision}"] = triton._replace(**_define(f"triton_{_precision}_", _of_mixture), keeping=None)

for _name in _SCHEMAS:
    if _name.startswith("mixture_kl"):
        continue
    _library.impl(f"composite_{_name}", getattr(composite, _name), "CompositeExplicitAutograd")
    if _name.startswith("gaussian"):
        _library.impl(f"triton_{_name}", triton_kernels.launcher("gaussian", _name), "CompositeExplicitAutograd")
        continue
    for _precision, _prefix in (("highest", "triton_"), ("high", "triton_high_"), ("medium", "triton_medium_")):
        _implementation = triton_kernels.launcher("mixture", _name, _precision)
        _library.impl(f"{_prefix}{_name}", _implementation, "CompositeExplicitAutograd")
compose(_library, "", native)
compose(_library, "composite_", plain)
for _backend in ("triton", "triton-high", "triton-medium"):
    for _name in ("mixture_kl", "mixture_kl_backward"):
        _composed = partial(getattr(composition, _name), operators[_backend])
        _implementation = triton_kernels.launcher("mixture_kl", _name, _composed)
        _library.impl(f"{_backend.replace('-', '_')}_{_name}", _implementation, "CompositeExplicitAutograd")
