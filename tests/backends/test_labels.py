"""The density of rows with labels: weights by label, and a row's own group alone, against the rows one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import internals
from support.backend import few_shapes, interpreted
from torch import Tensor

import fastvae
from fastvae import reference

ABSENT = 2  # a label that no row has
DTYPE = torch.float64


@pytest.fixture(params=["composite", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """One that is compiled and one that is not: what is done for labels is the same for every backend."""
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def problem(impl: str, L: int = 4, K: int = 23, shared: bool = False) -> tuple[list[Tensor], Tensor]:
    """z [3, 5, D], mu, logvar, log_weights [L, K] in float64 as leaves, with weights of 0; labels in any order."""
    K = min(K, 9) if interpreted(impl) else K
    D = 3
    z, mu = torch.randn(3, 5, D, dtype=DTYPE), torch.randn(K, D, dtype=DTYPE)
    logvar = 0.5 * torch.randn((D,) if shared else (K, D), dtype=DTYPE)
    log_weights = torch.randn(L, K, dtype=DTYPE)
    if K > 1:
        log_weights[0, 1] = log_weights[L - 1, 0] = -math.inf
    labels = torch.randint(L, (3, 5))
    if L > ABSENT:
        labels[labels == ABSENT] = 0
    return [leaf.requires_grad_() for leaf in (z, mu, logvar, log_weights)], labels


def by_rows(leaves: list[Tensor], labels: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The specification with each row's own weights, one row at a time."""
    z, mu, logvar, log_weights = leaves
    rows = []
    for i, (row, label) in enumerate(zip(z.flatten(0, -2), labels.flatten().tolist(), strict=True)):
        left_out = None if exclude is None else exclude.flatten()[i]
        rows.append(reference.mixture_log_prob(row, mu, logvar, log_weights[label], exclude=left_out))
    return torch.stack(rows).view(z.shape[:-1])


def results(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("L", "K", "shared"), [(4, 23, False), (1, 23, True), (5, 1, False), (1, 1, False)])
@pytest.mark.parametrize("excluding", [False, True])
def test_equals_the_rows_one_by_one(impl: str, L: int, K: int, shared: bool, excluding: bool) -> None:
    """Values, score and all gradients; where all weights of a row are excluded, -inf and no gradient."""
    if few_shapes(impl) and (L == 1 or K == 1 or not excluding):
        pytest.skip("the others take the same kernels")
    leaves, labels = problem(impl, L, K, shared)
    exclude = torch.randint(-1, leaves[1].shape[0], (3, 5)) if excluding else None
    options: dict[str, Any] = {"labels": labels, "exclude": exclude, "dense_backward": True, "impl": impl}
    want = results(by_rows(leaves, labels, exclude), leaves)
    assert_close(results(fastvae.mixture_log_prob(*leaves, **options), leaves), want)
    log_prob, score = fastvae.mixture_log_prob_and_score(*leaves, **options)
    assert_close(results(log_prob, leaves), want)
    assert_close([score], list(torch.autograd.grad(by_rows(leaves, labels, exclude).sum(), leaves[:1])))
    if L > ABSENT:
        assert bool((want[4][ABSENT] == 0).all())


def test_reference() -> None:
    leaves, labels = problem("reference")
    got = fastvae.mixture_log_prob(*leaves, labels=labels, impl="reference")
    assert_close(results(got, leaves), results(by_rows(leaves, labels), leaves))
    log_prob, score = fastvae.mixture_log_prob_and_score(*leaves, labels=labels, impl="reference")
    assert torch.equal(log_prob, got)
    assert_close([score], list(torch.autograd.grad(got.sum(), leaves[:1])))
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\.\. 3, they span 0 \.\.\. 4"):
        labels[0, 0], labels[1, 1] = 0, 4
        fastvae.mixture_log_prob(*leaves, labels=labels, impl="reference")


def test_only_some_need_gradients(backend: str) -> None:
    """By the score where z alone needs one, by backward else; what needs none gets none."""
    leaves, labels = problem(backend)
    want = results(by_rows(leaves, labels), leaves)[1:]
    for chosen in ([0], [1], [3], [0, 2], [0, 1, 2, 3]):
        given = [leaf.detach().requires_grad_(i in chosen) for i, leaf in enumerate(leaves)]
        value = fastvae.mixture_log_prob(*given, labels=labels, impl=backend)
        assert_close(results(value, [given[i] for i in chosen])[1:], [want[i] for i in chosen])
    with torch.no_grad():
        assert not fastvae.mixture_log_prob(*leaves, labels=labels, impl=backend).requires_grad


def test_no_component_left(backend: str) -> None:
    """A label whose weights are all 0: -inf for its rows, without a NaN anywhere."""
    leaves, labels = problem(backend)
    labels[0, 0] = 0
    leaves[3].data[0] = -math.inf
    value = fastvae.mixture_log_prob(*leaves, labels=labels, impl=backend)
    assert torch.equal(value == -math.inf, labels == 0)
    for gradient in torch.autograd.grad(value[labels != 0].sum(), leaves):
        assert bool(gradient.isfinite().all())


def test_one_label_is_a_call_without(backend: str) -> None:
    """In float32 and half precision, the bits are those of the call for one label's rows."""
    (z, mu, logvar, log_weights), _ = problem(backend)
    for dtype in (torch.float32, torch.bfloat16):
        given = [leaf.detach().to(dtype) for leaf in (z, mu, logvar, log_weights)]
        labels = torch.full((3, 5), 1)
        got = fastvae.mixture_log_prob(*given, labels=labels, impl=backend)
        want = fastvae.mixture_log_prob(*given[:3], given[3][1], impl=backend)
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_empty_batch(backend: str) -> None:
    leaves, labels = problem(backend)
    nothing = [leaves[0].detach()[:0].requires_grad_(), *leaves[1:]]
    value = fastvae.mixture_log_prob(*nothing, labels=labels[:0], impl=backend)
    assert value.shape == (0, 5)
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value.sum(), nothing))


def test_deterministic(backend: str) -> None:
    leaves, labels = problem(backend)
    given = [leaf.detach().float().requires_grad_() for leaf in leaves]
    first, again = (results(fastvae.mixture_log_prob(*given, labels=labels, impl=backend), given) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_strided_inputs(backend: str) -> None:
    leaves, labels = problem(backend)
    want = by_rows(leaves, labels).detach()
    z, mu, logvar, log_weights = (leaf.detach() for leaf in leaves)
    got = fastvae.mixture_log_prob(
        z.movedim(0, 1).contiguous().movedim(1, 0),
        mu.T.contiguous().T,
        logvar,
        log_weights.T.contiguous().T,
        labels=labels.T.contiguous().T,
        impl=backend,
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(3, 5)}, TypeError, "labels must be an int64 tensor, not torch.float32"),
        ({"labels": 3}, TypeError, "labels must be a tensor, not int"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must be \[3, 5\] to match z"),
        ({"labels": torch.full((3, 5), 4)}, ValueError, r"labels must be in 0 \.\.\. 3, they span 4 \.\.\. 4"),
        ({"labels": torch.full((3, 5), -1)}, ValueError, r"labels must be in 0 \.\.\. 3, they span -1 \.\.\. -1"),
        ({"log_weights": None}, ValueError, r"with labels, log_weights must be \[L, 9\].*not None"),
        ({"log_weights": torch.zeros(9)}, ValueError, r"with labels, log_weights must be \[L, 9\].*not \[9\]"),
        ({"log_weights": torch.zeros(0, 9)}, ValueError, r"\[L, 9\].*L >= 1, not \[0, 9\]"),
        ({"labels": None}, ValueError, r"log_weights must be \[9\].*not \[4, 9\]; weights by label are for"),
        ({"exclude": torch.full((3, 5), 9)}, ValueError, "exclude must be in"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    leaves, labels = problem("composite", K=9)
    given = dict(zip(("z", "mu", "logvar", "log_weights"), leaves, strict=True)) | {"labels": labels} | change
    with pytest.raises(error, match=message):
        fastvae.mixture_log_prob(**given)


def test_differentiable_once(backend: str) -> None:
    leaves, labels = problem(backend)
    value = fastvae.mixture_log_prob(*leaves, labels=labels, impl=backend)
    (gradient,) = torch.autograd.grad(value.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def own_group(leaves: list[Any], groups: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fastvae.grouped_mixture_log_prob(*leaves[:3], groups, leaves[3], num_groups=4, labels=labels, **options)


@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_own_group(impl: str, order: str, shared: bool, weights: bool) -> None:
    """The column of each row's label, and its gradients; group 2 has no component, and group 3 no row."""
    if few_shapes(impl) and (order == "sorted" or not shared):
        pytest.skip("the others take the same kernels")
    leaves, labels = problem(impl, shared=shared)
    labels[labels == 3] = 1
    labels[0, 0] = ABSENT
    groups = torch.randint(3, (len(leaves[1]),))
    groups[groups == ABSENT] = 3
    groups = groups.sort().values if order == "sorted" else groups
    given = [*leaves[:3], leaves[3][1] if weights else None]
    wanted = leaves if weights else leaves[:3]
    every = fastvae.grouped_mixture_log_prob(*given[:3], groups, given[3], num_groups=4, impl="reference")
    want = every.gather(-1, labels[..., None]).squeeze(-1)
    there = labels != ABSENT
    got = own_group(given, groups, labels, impl=impl, dense_backward=True)
    assert torch.equal(got == -math.inf, ~there)
    assert torch.equal(own_group(given, groups, labels, impl="reference") == -math.inf, ~there)
    assert_close(results(got[there], wanted), results(want[there], wanted))


def test_own_group_costs_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel never meets a row with a group that is not its own."""
    pairs, operators = [], internals.operators_of("composite")

    def noting(z: Tensor, mu: Tensor, *others: Any) -> Tensor:
        pairs.append(len(z) * len(mu))
        return operators.mixture_log_prob(z, mu, *others)

    internals.use_operators(monkeypatch, "composite", operators._replace(mixture_log_prob=noting))
    groups, labels = torch.arange(40) % 10, torch.arange(60) % 10
    fastvae.grouped_mixture_log_prob(
        torch.randn(60, 2), torch.randn(40, 2), torch.zeros(2), groups, labels=labels, impl="composite"
    )
    assert pairs == [6 * 4] * 10


def test_own_group_mistakes() -> None:
    leaves, labels = problem("composite")
    groups = torch.zeros(23, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be \[3, 5\]"):
        own_group([*leaves[:3], None], groups, labels[0])
    labels[0, 0] = 4
    for impl in ("composite", "reference"):
        with pytest.raises(ValueError, match=r"labels must be in 0 \.\.\. 3, they span 0 \.\.\. 4"):
            own_group([*leaves[:3], None], groups, labels, impl=impl)
