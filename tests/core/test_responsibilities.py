"""The top components of rows are those of the whole table of responsibilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import mixture_responsibilities


def mixture(K: int = 40, D: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(K, D, dtype=dtype),
        torch.randn(K, D, dtype=dtype),
        torch.log_softmax(torch.randn(K), 0).to(dtype),
    )


def table(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None = None) -> Tensor:
    """The logarithms of all responsibilities, [..., K], in float64."""
    weights = None if log_weights is None else log_weights.double()
    a = fastvae.reference.component_log_prob(z.double(), mu.double(), logvar.double(), weights)
    if exclude is not None:
        a = a.masked_fill(exclude[..., None] == torch.arange(len(mu)), -math.inf)
    return torch.log_softmax(a, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 3, 40])
@pytest.mark.parametrize("chunk", [10, 10**6])
def test_they_are_the_largest(dtype: torch.dtype, top_k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few components and rows, and all at once; rows far from all components too."""
    monkeypatch.setattr("fastvae.em.responsibilities.chunk_on", lambda *_: chunk)
    parameters = mixture(dtype=dtype)
    z = torch.randn(3, 7, 4, dtype=dtype)
    z[0, 0] = 300.0
    want = table(z, *parameters).topk(top_k, -1)
    values, indices = mixture_responsibilities(z, *parameters, top_k=top_k)
    assert values.shape == indices.shape == (3, 7, top_k) and indices.dtype == torch.int64
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6  # float64 rounds the exponent of the far row by 1e-11
    assert torch.allclose(values.double(), want.values.exp(), atol=tolerance, rtol=0)
    assert torch.equal(indices, want.indices)
    if top_k == 40:
        assert torch.allclose(values.double().sum(-1), torch.ones(3, 7).double(), atol=tolerance)


@pytest.mark.usefixtures("compiled")
def test_float32_sums_to_one_where_the_exponents_are_large() -> None:
    """In float32 an exponent of -1e5 is rounded by 0.004, and the responsibilities with it."""
    mu, logvar = torch.randn(30, 8), torch.full((), -9.0)
    z = 5 + torch.randn(100, 8)
    assert float(fastvae.mixture_log_prob(z, mu, logvar).max()) < -1e5
    values, _ = mixture_responsibilities(z, mu, logvar, top_k=30)
    assert torch.allclose(values.sum(-1), torch.ones(100), atol=1e-6)


def test_exclude_and_weights_of_0() -> None:
    mu, logvar, log_weights = mixture()
    log_weights[:30] = -math.inf
    mu[0], logvar[1] = math.nan, math.inf  # of components that are not there
    z = torch.randn(12, 4, dtype=torch.float64)
    exclude = torch.arange(30, 42).where(torch.arange(30, 42) < 40, -1)
    want = table(z, mu, logvar, log_weights, exclude).topk(10, -1)
    values, indices = mixture_responsibilities(z, mu, logvar, log_weights, top_k=10, exclude=exclude)
    assert (
        torch.allclose(values, want.values.exp(), atol=1e-12)
        and (values[:10, 9] == 0).all()
        and (values[10:] > 0).all()
    )
    assert torch.equal(indices[:, :9], want.indices[:, :9])
    more, _ = mixture_responsibilities(z, mu, logvar, log_weights, top_k=20)
    assert (more[:, 10:] == 0).all() and torch.allclose(more.sum(-1), torch.ones(12, dtype=torch.float64))


def test_no_density_no_rows_and_nan() -> None:
    mu, logvar, _ = mixture(5)
    z = torch.randn(4, 4, dtype=torch.float64)
    nothing, _ = mixture_responsibilities(z, mu, logvar, torch.full((5,), -math.inf), top_k=2)
    assert (nothing == 0).all()
    values, indices = mixture_responsibilities(z[:0], mu, logvar, top_k=2)
    assert values.shape == indices.shape == (0, 2)
    z[1, 2] = math.nan
    values, _ = mixture_responsibilities(z, mu, logvar, top_k=2)
    assert values.isnan().any(-1).tolist() == [False, True, False, False]
    one, zero = mixture_responsibilities(z[0], mu[:1], logvar[:1])
    assert one.tolist() == [1.0] and zero.tolist() == [0]


def test_equal_components_come_in_order() -> None:
    mu = torch.zeros(20, 2)
    values, indices = mixture_responsibilities(torch.randn(5, 2), mu, mu, top_k=20)
    assert torch.allclose(values, torch.full((5, 20), 1 / 20)) and torch.equal(indices, torch.arange(20).expand(5, 20))


def test_choosing_by_a_product_finds_narrow_components_far_from_the_centre() -> None:
    """Where the product's terms are 1e12: in float32 it would choose at random."""
    mu = 1000.0 + torch.randn(200, 6)
    logvar = torch.full((200, 6), -6.0)
    mu[0] = -1000.0
    z = mu + 0.05 * torch.randn(200, 6)
    values, indices = mixture_responsibilities(z, mu, logvar, top_k=3)
    want = table(z, mu, logvar, None).topk(3, -1)
    assert torch.equal(indices[:, 0], want.indices[:, 0]) and torch.allclose(
        values.double(), want.values.exp(), atol=1e-6
    )


def test_shared_variances_gradients_and_backends() -> None:
    mu, _, log_weights = mixture()
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for logvar in (torch.zeros(()).double(), torch.randn(4).double(), torch.randn(40, 1).double()):
        want = table(z.detach(), mu, logvar.expand(40, 4), log_weights).topk(2, -1)
        for impl in (None, "composite", "reference"):
            values, indices = mixture_responsibilities(z, mu, logvar, log_weights, top_k=2, impl=impl)
            assert torch.allclose(values, want.values.exp()) and torch.equal(indices, want.indices)
            assert not values.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 41}, ValueError, "top_k must be at most K = 40, not 41"),
        ({"top_k": 1.0}, TypeError, "top_k must be an integer"),
        ({"exclude": torch.zeros(6)}, TypeError, "exclude must be an int64 tensor"),
        ({"impl": "numpy"}, ValueError, "impl must be one of"),
        ({"log_weights": torch.zeros(3)}, ValueError, r"log_weights must be \[40\]"),
    ],
)
def test_a_clear_error(options: dict, error: type[Exception], message: str) -> None:
    mu, logvar, _ = mixture(dtype=torch.float32)
    with pytest.raises(error, match=message):
        mixture_responsibilities(torch.zeros(6, 4), mu, logvar, **options)


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_components_so_narrow_that_products_would_choose_at_random(spread: float) -> None:
    """Standard deviations of 1e-6 and of 1e6 in one mixture, and a row with NaN among the others."""
    torch.manual_seed(0)
    logvar = 2 * torch.tensor([1e-6, 1e6], dtype=torch.float64).repeat(30).log()[:, None].expand(60, 3)
    mu = spread * torch.randn(60, 3, dtype=torch.float64)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(60, 3, dtype=torch.float64)
    want = table(z, mu, logvar, None).topk(2, -1)
    z = torch.cat([z, torch.full((1, 3), math.nan, dtype=torch.float64)])
    values, indices = mixture_responsibilities(z, mu, logvar, top_k=2)
    assert torch.allclose(values[:-1], want.values.exp(), atol=1e-12) and values[-1].isnan().all()
    assert torch.equal(indices[:-1, 0], want.indices[:, 0])
