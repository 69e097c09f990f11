"""Exponents that forward keeps for backward where the problem is small: the same gradients, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from budget import Case, diffuse_case, hard_case, run
from support import internals

import fastvae

from .test_order import apart_case
from .test_skipping import concentrated

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Around every edge of a tile; nothing to leave out, much of it, components in an order; shared variances."""
    hard = {f"hard {M} {K}": hard_case(M, K, 5, dtype=dtype) for M in (1, 3, 7, 8, 13, 25) for K in (1, 15, 33, 129)}
    some = diffuse_case(21, 40, 70, dtype=dtype)
    return {
        **hard,
        "diffuse": some,
        "shared": replace(some, logvar=some.logvar[0]),
        "isotropic": replace(some, logvar=some.logvar[0, 0]),
        "concentrated": concentrated().to(dtype),
        "in order": apart_case(45, 2100, 12, dtype),
        "without a density": replace(some, log_weights=torch.full((40,), -torch.inf, dtype=dtype)),
        "NaN": replace(some, z=some.z.masked_fill(torch.eye(21, 70, dtype=torch.bool), torch.nan)),
    }


@DTYPES
def test_the_gradients_are_those_of_exponents_computed_again(
    cpu_impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, case in cases(dtype).items():
        kept = run(case, cpu_impl)
        with monkeypatch.context() as patch:
            internals.limit_exponents(patch, 0)
            again = run(case, cpu_impl)
        for field, got, want in zip(kept._fields, kept, again, strict=True):
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{name}: {field}"


@pytest.mark.usefixtures("compiled")
def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a parameter needs a gradient, tiles may be left out, and M K is small; never without a backward."""
    called: list[str] = []

    def named(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return operator(*arguments)

        return call

    exponents = internals.exponent_operators()
    names = [*internals.NAMES, *(f"keeping {name}" for name in exponents._fields)]
    functions = [*internals.operators_of("cpu"), *exponents]
    watched = [named(name, function) for name, function in zip(names, functions, strict=True)]
    common = len(internals.NAMES)
    internals.use_operators(
        monkeypatch,
        "cpu",
        internals.Operators(*watched[:common]),
        internals.ExponentOperators(*watched[common:]),
    )
    internals.limit_exponents(monkeypatch, 6 * internals.exponents_per_row(9) * 4)

    z, mu = torch.randn(6, 3), torch.randn(9, 3)
    leaf, z_leaf = mu.clone().requires_grad_(), z.clone().requires_grad_()
    for wanted, arguments, dense in (
        (["keeping mixture_log_prob", "keeping mixture_log_prob_backward"], (z, leaf, mu), False),
        (["keeping mixture_log_prob", "keeping mixture_log_prob_backward"], (z_leaf, leaf, leaf), False),
        (["mixture_log_prob", "mixture_log_prob_backward"], (z, leaf, mu), True),
        (["mixture_log_prob", "mixture_log_prob_backward"], (torch.randn(7, 3), leaf, mu), False),
        (["mixture_log_prob_and_score"], (z_leaf, mu, mu), False),
        (["mixture_log_prob"], (z, mu, mu), False),
    ):
        called.clear()
        log_prob = fastvae.mixture_log_prob(*arguments, dense_backward=dense)
        if log_prob.requires_grad:
            log_prob.sum().backward()
        assert called == wanted
    with torch.no_grad():
        called.clear()
        fastvae.mixture_log_prob(z, leaf, leaf)
        assert called == ["mixture_log_prob"]


@DTYPES
@pytest.mark.parametrize("K", [1, 31, 33, 500])
def test_what_is_kept_is_within_the_limit(K: int, dtype: torch.dtype) -> None:
    """Of few components too, which are kept by whole panels."""
    mu = torch.empty(K, 1, dtype=dtype, device="meta")
    most = max(M for M in range(1, 2**17, 31) if internals.keeps_exponents(M, mu))
    per_row = internals.exponents_per_row(K)
    _, kept = internals.exponent_operators().mixture_log_prob(mu.new_empty(most, 1), mu, mu, None, None, True, per_row)
    assert 0.9 * 2**24 < kept.nbytes <= 2**24


@DTYPES
@pytest.mark.parametrize("num_samples", [None, 3])
def test_mixture_kl(
    cpu_impl: str, dtype: torch.dtype, num_samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        leaves = [torch.randn(n, 6, dtype=dtype, requires_grad=True) for n in (11, 11, 40, 40)]
        weights = torch.log_softmax(torch.randn(40, dtype=dtype), 0).requires_grad_()
        z, kl = fastvae.mixture_kl(*leaves, weights, num_samples=num_samples, impl=cpu_impl)
        loss = (kl * torch.randn_like(kl)).sum() + z.square().sum()
        return torch.autograd.grad(loss, [*leaves, weights], retain_graph=True) + torch.autograd.grad(loss, leaves)

    kept = gradients()
    internals.limit_exponents(monkeypatch, 0)
    assert all(torch.equal(got, want) for got, want in zip(kept, gradients(), strict=True))


@pytest.mark.usefixtures("compiled")
def test_the_operator_takes_only_what_was_kept() -> None:
    z, mu = torch.randn(6, 3), torch.randn(9, 3)
    keeping = internals.exponent_operators()
    log_prob, exponents = keeping.mixture_log_prob(z, mu, mu, None, None, True, internals.exponents_per_row(9))
    for wrong in (exponents[:5], exponents[:, :17].contiguous(), exponents.reshape(3, -1), exponents.double()):
        with pytest.raises(RuntimeError, match="want"):
            keeping.mixture_log_prob_backward(log_prob, log_prob, wrong, z, mu, mu, None, None, True, True, True, True)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("K", [1, 32, 33, 500])
def test_the_width_of_a_row_must_fit_the_components(K: int) -> None:
    """The width is computed in Python alone; another one would be memory that the kernel overruns."""
    mixture = torch.randn(6, 3), torch.randn(K, 3), torch.zeros(1, 3), None, None
    keeping, width = internals.exponent_operators().mixture_log_prob, internals.exponents_per_row(K)
    for wrong in (0, 34, K, width - 34, width - 1, width + 1, width + 17, width + 34):
        if wrong != width:
            with pytest.raises(RuntimeError, match=f"not {wrong} for K = {K}"):
                keeping(*mixture, True, wrong)


@pytest.mark.usefixtures("compiled")
def test_compiles_once_for_any_number_of_components() -> None:
    """The width is an argument of the operator: a symbolic one under torch.compile with dynamic shapes."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, example)

    def log_prob(z: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
        return fastvae.mixture_log_prob(z, mu, 0.1 * mu, impl="cpu")

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(log_prob, fullgraph=True, dynamic=True, backend=backend)
    for M, K in ((4, 5), (7, 40), (12, 70), (9, 33)):
        z, mu = torch.randn(M, 3, requires_grad=True), torch.randn(K, 3, requires_grad=True)
        got, want = (torch.autograd.grad(f(z, mu).sum(), (z, mu)) for f in (compiled, log_prob))
        assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-6) for g, w in zip(got, want, strict=True)), (M, K)
    assert len(graphs) == 1
