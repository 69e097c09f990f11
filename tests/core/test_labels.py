"""Labels apart from numerics: the operators' registration, torch.compile and torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fastvae
from fastvae import labelled_operators

B, M, K, D, L = 3, 7, 5, 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own


def by_label(z: Tensor, mu: Tensor, labels: Tensor, impl: str) -> Tensor:
    log_weights = torch.log_softmax(torch.arange(L)[:, None] * mu.sum(-1), -1)
    return fastvae.mixture_log_prob(z, mu, 0.1 * mu, log_weights, labels=labels, impl=impl)


def with_score(z: Tensor, mu: Tensor, labels: Tensor, impl: str) -> Tensor:
    log_weights = torch.arange(L)[:, None] * mu.sum(-1)
    log_prob, score = fastvae.mixture_log_prob_and_score(z, mu, mu[0], log_weights, labels=labels, impl=impl)
    return log_prob + score.sum(-1)


def own_group(z: Tensor, mu: Tensor, labels: Tensor, impl: str) -> Tensor:
    groups = torch.tensor([1, 0, 1, 3, 2])
    return fastvae.grouped_mixture_log_prob(z, mu, 0.1 * mu, groups, mu[:, 0], labels=labels, impl=impl)


OPERATIONS = [by_label, with_score, own_group]


@pytest.fixture(params=["composite", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


@pytest.mark.parametrize("groups", [None, torch.tensor([1, 0, 1, 3, 0])])
@pytest.mark.parametrize(("rows", "shared"), [(M, False), (0, True)])
def test_opcheck(backend: str, groups: Tensor | None, rows: int, shared: bool) -> None:
    mixture = torch.randn(rows, D), torch.randn(K, D), torch.randn(1 if shared else K, D)
    log_weights = torch.randn(L, K) if groups is None else None
    exclude = torch.arange(rows) % (K + 1) - 1 if groups is None else None
    given = *mixture, log_weights, exclude, torch.arange(rows) % L, groups, L
    for score in (False, True):
        torch.library.opcheck(labelled_operators.mixture_log_prob, (*given, score, backend))
    log_prob, _ = labelled_operators.mixture_log_prob(*given, False, backend)
    need_weights = log_weights is not None
    for need in ((True, True, True, need_weights), (False, True, False, False)):
        arguments = torch.randn(rows), log_prob, *given, True, *need, backend
        torch.library.opcheck(labelled_operators.mixture_log_prob_backward, arguments)


@pytest.mark.parametrize("operation", [by_label, with_score])
def test_compiles_without_a_break(operation: Any, backend: str) -> None:
    """Also for other labels than those that it was compiled with; a label out of range raises as in eager mode."""
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    for labels in (torch.arange(M) % L, torch.zeros(M, dtype=torch.int64)):
        z, mu = torch.randn(M, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
        got, want = (f(z, mu, labels, backend) for f in (compiled, operation))
        torch.testing.assert_close(got, want)
        for g, w in zip(*(torch.autograd.grad(v.sum(), (z, mu)) for v in (got, want)), strict=True):
            torch.testing.assert_close(g, w)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\.\. 3"):
        compiled(z, mu, labels + L, backend)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vmap_and_grad_are_the_loop(operation: Any, backend: str) -> None:
    z, mu, labels = torch.randn(B, M, D), torch.randn(K, D), torch.randint(L, (B, M))
    want = torch.stack([operation(one, mu, of_one, backend) for one, of_one in zip(z, labels, strict=True)])
    torch.testing.assert_close(vmap(lambda one, of_one: operation(one, mu, of_one, backend))(z, labels), want)
    shared = torch.stack([operation(one, mu, labels[0], backend) for one in z])
    torch.testing.assert_close(vmap(lambda one: operation(one, mu, labels[0], backend))(z), shared)

    def total(one: Tensor, mu: Tensor, of_one: Tensor) -> Tensor:
        return operation(one, mu, of_one, backend).sum()

    got = vmap(grad(total, argnums=(0, 1)), in_dims=(0, None, 0))(z, mu, labels)
    for i in range(B):
        leaves = z[i].clone().requires_grad_(), mu.clone().requires_grad_()
        for g, w in zip(got, torch.autograd.grad(total(*leaves, labels[i]), leaves), strict=True):
            torch.testing.assert_close(g[i], w)


def test_shapes_without_data() -> None:
    z, mu = torch.randn(M, D, device="meta"), torch.randn(K, D, device="meta")
    labels = torch.zeros(M, dtype=torch.int64, device="meta")
    log_weights = torch.zeros(L, K, device="meta")
    assert fastvae.mixture_log_prob(z, mu, mu, log_weights, labels=labels, impl="composite").shape == (M,)


@pytest.mark.parametrize("labelled", [False, True])
def test_groups_out_of_range_are_refused_inside_vmap(labelled: bool) -> None:
    mu, groups = torch.zeros(3, 2), torch.tensor([0, 1, 2])

    def log_prob(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        labels = y if labelled else None
        return fastvae.grouped_mixture_log_prob(z, mu, torch.zeros(()), groups, num_groups=2, labels=labels)

    with pytest.raises(ValueError, match=r"groups must be in 0 \.\.\. 1"):
        torch.vmap(log_prob)(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
