"""The densities of single dimensions: against one-dimensional mixtures in float64, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import Case, Result, allowance, assert_within
from support.backend import few_shapes
from torch import Tensor

import fastvae


def problem(M: int, K: int, D: int, dtype: torch.dtype = torch.float32, shared: bool = False) -> list[Any]:
    """z, mu, logvar, log_weights, exclude and an upstream gradient [M, D]; sigmas from 0.1 to 10."""
    rng = torch.Generator().manual_seed(1009 * K + 31 * D + M)
    z, mu = 3 * torch.randn(M, D, generator=rng), 2 * torch.randn(K, D, generator=rng)
    logvar = 4.6 * (2 * torch.rand(1 if shared else K, D, generator=rng) - 1)
    log_weights = torch.log_softmax(torch.randn(K, generator=rng), 0)
    log_weights[5::5] = -torch.inf
    exclude = torch.randint(-1, K, (M,), generator=rng)
    return [*(v.to(dtype) for v in (z, mu, logvar, log_weights)), exclude, torch.randn(M, D, generator=rng).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("M", "K", "D", "shared"), [(9, 33, 3, False), (1, 1, 1, False), (17, 70, 2, True)])
def test_each_dimension_is_a_mixture(impl: str, M: int, K: int, D: int, shared: bool, dtype: torch.dtype) -> None:
    """Value and all gradients, each dimension within the budget of a mixture of its own."""
    if few_shapes(impl) and K > 33:
        pytest.skip("one shape is enough where each is compiled or interpreted")
    z, mu, logvar, log_weights, exclude, upstream = problem(M, K, D, dtype, shared)
    if K == 1:
        exclude = torch.full_like(exclude, -1)
    for d in range(D):  # the weights' gradient is a sum over the dimensions, so that each dimension is asked alone
        leaves = [v.clone().requires_grad_() for v in (z, mu, logvar, log_weights)]
        value = fastvae.mixture_marginal_log_prob(*leaves, exclude=exclude, impl=impl)
        assert value.shape == (M, D) and value.dtype == dtype
        grads = list(torch.autograd.grad(value[:, d], leaves, upstream[:, d]))
        others = [e for e in range(D) if e != d]
        assert all(not bool(g[:, others].any()) for g in grads[:3])
        case = Case(*(v[:, d, None] for v in (z, mu, logvar)), log_weights, upstream[:, d], exclude)
        got = Result(value[:, d].detach(), *(g[:, d, None] for g in grads[:3]), grads[3])
        assert_within(got, *allowance(case), what=f"dimension {d}")


def test_all_dimensions_at_once(each_impl: str) -> None:
    """The gradients of all dimensions together, and by way of z alone, are those of a call for each dimension."""
    z, mu, logvar, log_weights, exclude, upstream = problem(9, 33, 3)
    by_need = []
    for wanted in (range(4), range(1), range(1, 4)):
        leaves = [v.clone().requires_grad_(i in wanted) for i, v in enumerate((z, mu, logvar, log_weights))]
        together = fastvae.mixture_marginal_log_prob(*leaves, exclude=exclude, impl=each_impl)
        parts = zip(*(v.split(1, -1) for v in leaves[:3]), strict=True)
        apart = torch.stack(
            [fastvae.mixture_log_prob(*p, leaves[3], exclude=exclude, impl=each_impl) for p in parts], -1
        )
        needed = [leaves[i] for i in wanted]
        grads = [torch.autograd.grad(value, needed, upstream) for value in (together, apart)]
        assert torch.allclose(together, apart, rtol=1e-6)
        for got, want in zip(*grads, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        by_need.append(grads[0])
    assert torch.allclose(by_need[0][0], by_need[1][0], rtol=1e-4, atol=1e-5)


def test_reference() -> None:
    z, mu, logvar, log_weights, exclude, _ = problem(9, 33, 3, torch.float64)
    call = {"exclude": exclude, "impl": "reference"}
    want = fastvae.mixture_marginal_log_prob(z, mu, logvar, log_weights, **call)
    density = torch.distributions.Normal(mu.T[:, None], (0.5 * logvar.T).exp()[:, None]).log_prob(z.T[..., None])
    here = torch.arange(33) != exclude[:, None]  # [M, K]
    log_terms = torch.where(here, density + log_weights, -torch.inf)  # [D, M, K]
    assert torch.allclose(want, log_terms.logsumexp(-1).T, rtol=1e-12)
    assert torch.allclose(
        fastvae.mixture_marginal_log_prob(z, mu, logvar, log_weights, exclude=exclude), want, rtol=1e-10
    )


def test_shapes(each_impl: str) -> None:
    """Leading shapes, empty batches, strided z, half precision; -inf where no component is left."""
    _, mu, logvar, *_ = problem(1, 33, 3)
    z = torch.randn(4, 5, 6).transpose(0, 1)[..., ::2]
    got = fastvae.mixture_marginal_log_prob(z, mu, logvar, impl=each_impl)
    assert got.shape == z.shape
    rows = z.reshape(-1, 3).contiguous()
    assert torch.equal(got.reshape(-1, 3), fastvae.mixture_marginal_log_prob(rows, mu, logvar, impl=each_impl))
    assert fastvae.mixture_marginal_log_prob(z[:0], mu, logvar, impl=each_impl).shape == (0, 4, 3)
    assert fastvae.mixture_marginal_log_prob(rows[0], mu, logvar, impl=each_impl).shape == (3,)
    half = fastvae.mixture_marginal_log_prob(rows.bfloat16(), mu, logvar, impl=each_impl)
    assert half.dtype == torch.float32
    nothing = torch.full((33,), -torch.inf)
    leaf = rows.clone().requires_grad_()
    gone = fastvae.mixture_marginal_log_prob(leaf, mu, logvar, nothing, impl=each_impl)
    assert bool((gone == -torch.inf).all())
    rows[3, 1] = torch.nan
    bad = fastvae.mixture_marginal_log_prob(rows, mu, logvar, impl=each_impl)
    assert bad.isnan().nonzero().tolist() == [[3, 1]]


def test_memory(each_impl: str) -> None:
    """What autograd saves is O((M + K) D), where the exponents of D small problems would be M K D."""
    z, mu, logvar, *_ = (v.requires_grad_() for v in problem(40, 90, 4)[:3])
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = fastvae.mixture_marginal_log_prob(z, mu, logvar, impl=each_impl)
    assert sum(kept) <= (3 * 40 + 2 * 90) * 4
    value.sum().backward()


def test_differentiable_once(each_impl: str) -> None:
    z = torch.randn(5, 2, requires_grad=True)
    value = fastvae.mixture_marginal_log_prob(z, torch.randn(4, 2), torch.zeros(2), impl=each_impl)
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_compiled_and_transformed(compiled: None) -> None:
    """One graph under torch.compile; grad and vmap of torch.func give what autograd gives."""
    z, mu, logvar, *_ = problem(9, 33, 3)

    def total(z: Tensor, mu: Tensor) -> Tensor:
        return fastvae.total_correlation(z, mu, logvar).sum()

    leaves = [v.clone().requires_grad_() for v in (z, mu)]
    want = torch.autograd.grad(total(*leaves), leaves)
    traced = torch.compile(total, fullgraph=True, backend="aot_eager")
    for got in (torch.autograd.grad(traced(*leaves), leaves), torch.func.grad(total, (0, 1))(z, mu)):
        assert all(torch.allclose(g, w, rtol=1e-4, atol=1e-4) for g, w in zip(got, want, strict=True))
    each = torch.func.vmap(lambda row: fastvae.mixture_marginal_log_prob(row, mu, logvar))(z)
    assert torch.allclose(each, fastvae.mixture_marginal_log_prob(z, mu, logvar), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        ((torch.randn(5, 3), torch.randn(4, 2), torch.zeros(2)), {}, ValueError, r"z must be \[..., 2\]"),
        ((torch.randn(5, 2), torch.randn(0, 2), torch.zeros(2)), {}, ValueError, "K >= 1"),
        ((torch.ones(5, 2).long(), torch.randn(4, 2), torch.zeros(2)), {}, TypeError, "z must be a floating"),
        ((torch.randn(5, 2), torch.randn(4, 2), torch.zeros(2)), {"impl": "abacus"}, ValueError, "impl must be one of"),
        ((torch.randn(5, 2), torch.randn(4, 2), torch.zeros(2)), {"precision": "low"}, ValueError, "precision must be"),
    ],
)
def test_mistakes(arguments: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastvae.mixture_marginal_log_prob(*arguments, **more)
