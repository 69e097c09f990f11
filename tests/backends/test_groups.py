"""The density by groups: against a loop over the groups, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backend import interpreted
from torch import Tensor

import fastvae
from fastvae import reference


def problem(
    K: int = 60, D: int = 5, G: int = 7, shared: bool = False, weights: bool = True
) -> tuple[list[Any], Tensor]:
    """z, mu, logvar, log_weights (or None) in float64 as leaves; groups in random order, number 2 empty."""
    z, mu = torch.randn(3, 4, D, dtype=torch.float64), torch.randn(K, D, dtype=torch.float64)
    logvar = 0.5 * torch.randn((D,) if shared else (K, D), dtype=torch.float64)
    groups = torch.randint(G - 1, (K,))
    groups = groups + (groups >= 2)
    leaves = [z, mu, logvar, torch.randn(K, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return [*leaves[:3], leaves[3] if weights else None], groups


def loop(leaves: list[Any], groups: Tensor, G: int) -> Tensor:
    z, mu, logvar, log_weights = leaves
    columns = []
    for g in range(G):
        own = groups == g
        if not bool(own.any()):
            columns.append(z.new_full(z.shape[:-1], -torch.inf))
            continue
        own_logvar = logvar[own] if logvar.ndim == 2 else logvar
        weights = None if log_weights is None else log_weights[own]
        columns.append(reference.mixture_log_prob(z, mu[own], own_logvar, weights))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_equals_the_loop(impl: str, shared: bool, weights: bool, order: str) -> None:
    """Values and all gradients; a group without components is -inf and harms nothing."""
    K, G = (20, 4) if interpreted(impl) else (60, 7)  # groups are calls
    leaves, groups = problem(K, G=G, shared=shared, weights=weights)
    if order == "sorted":
        groups = groups.sort().values
    wanted = [leaf for leaf in leaves if leaf is not None]
    upstream = torch.randn(3, 4, G, dtype=torch.float64)
    results = []
    for value in (loop(leaves, groups, G), fastvae.grouped_mixture_log_prob(*leaves[:3], groups, leaves[3], impl=impl)):
        assert value.shape == (3, 4, G)
        assert bool((value[..., 2] == -torch.inf).all())
        total = (value * upstream)[..., [g for g in range(G) if g != 2]].sum()
        results.append((value.detach(), *torch.autograd.grad(total, wanted)))
    for want, got in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


def test_one_group_is_one_mixture(each_impl: str) -> None:
    z, mu, logvar = torch.randn(9, 4), torch.randn(33, 4), torch.randn(33, 4)
    got = fastvae.grouped_mixture_log_prob(z, mu, logvar, torch.zeros(33, dtype=torch.int64), impl=each_impl)
    assert torch.equal(got[:, 0], fastvae.mixture_log_prob(z, mu, logvar, impl=each_impl))
    assert fastvae.grouped_mixture_log_prob(z[:0], mu, logvar, torch.arange(33), impl=each_impl).shape == (0, 33)


def test_reference_and_number_of_groups() -> None:
    leaves, groups = problem()
    want = loop(leaves, groups, 9)
    got = fastvae.grouped_mixture_log_prob(*leaves[:3], groups, leaves[3], num_groups=9, impl="reference")
    assert got.shape[-1] == 9 and torch.allclose(got, want, rtol=1e-12)


def test_only_z_needs_a_gradient(each_impl: str) -> None:
    """No [G, M, D] of scores is kept: what autograd saves is O(M G + K D)."""
    M, G, D, K = (50, 6, 8, 12) if interpreted(each_impl) else (50, 40, 8, 80)
    z = torch.randn(M, D, requires_grad=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = fastvae.grouped_mixture_log_prob(
            z, torch.randn(K, D), torch.randn(K, D), torch.arange(K) // 2, impl=each_impl
        )
    assert value.shape == (M, G) and sum(kept) <= M * G + M * D + 2 * K * D
    value.sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_differentiable_once(each_impl: str) -> None:
    z = torch.randn(5, 2, requires_grad=True)
    value = fastvae.grouped_mixture_log_prob(z, torch.randn(4, 2), torch.zeros(2), torch.arange(4) // 2, impl=each_impl)
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("groups", "more", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, ValueError, r"groups must be \[4\]"),
        (torch.zeros(4), {}, TypeError, "groups must be an int64 tensor, not torch.float32"),
        ([0, 0, 1, 1], {}, TypeError, "groups must be a tensor, not list"),
        (torch.tensor([0, 1, -1, 0]), {}, ValueError, "they span -1 ... 1"),
        (torch.tensor([0, 1, 2, 0]), {"num_groups": 2}, ValueError, r"in 0 ... 1.*span 0 ... 2"),
        (torch.zeros(4, dtype=torch.int64), {"impl": "abacus"}, ValueError, "impl must be one of"),
    ],
)
def test_mistakes(groups: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastvae.grouped_mixture_log_prob(torch.randn(5, 2), torch.randn(4, 2), torch.zeros(2), groups, **more)
