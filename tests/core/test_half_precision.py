"""Half precision with every broadcast: a gradient is summed in float32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvae

M, K, D = 40, 63, 33
SHAPES = [(K, D), (K, 1), (1, D), (D,), (1, 1), (1,), ()]
DTYPES = [torch.bfloat16, torch.float16]


def mixture_log_prob(x: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_log_prob(x, mu, logvar, impl=impl)


def mixture_kl(x: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_kl(x, torch.full_like(x, -20.0), mu, logvar, impl=impl)[1]


def gaussian_kl(x: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> Tensor:
    return fastvae.gaussian_kl(mu, logvar, impl=impl)


def gaussian_rsample(x: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> Tensor:
    return fastvae.gaussian_rsample(mu, logvar, impl=impl)[1]


OPERATIONS = [mixture_log_prob, mixture_kl, gaussian_kl, gaussian_rsample]


def gradient(
    operation: Callable[..., Tensor], tensors: list[Tensor], impl: str | None, upstream: Tensor | None = None
) -> Tensor:
    x, mu, logvar = tensors
    logvar = logvar.clone().requires_grad_()
    torch.manual_seed(1)
    result = operation(x, mu, logvar, impl)
    (grad,) = torch.autograd.grad(result, logvar, torch.ones_like(result) if upstream is None else upstream)
    return grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_broadcast_logvar(operation: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Within one rounding of the gradient that float32 gives for the same numbers."""
    tensors = [t.to(dtype) for t in (torch.randn(M, D), torch.randn(K, D), 0.3 * torch.randn(shape))]
    for impl in ("composite", None):
        got = gradient(operation, tensors, impl)
        want = gradient(operation, [t.float() for t in tensors], impl)
        assert got.dtype == dtype and got.shape == want.shape == shape
        allowed = want.abs() * torch.finfo(dtype).eps / 2 + 1e-5 * want.abs().max()  # float32 sums may cancel
        assert ((got.float() - want).abs() <= allowed).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_terms_beyond_the_largest_half(operation: Callable[..., Tensor]) -> None:
    """A gradient that float16 holds, the sum of terms of both signs that it does not."""
    x, mu = torch.zeros(M, D), torch.zeros(K, D)
    if operation in (gaussian_kl, gaussian_rsample):  # a term for each row and dimension
        upstream = torch.where(torch.arange(K) % 2 == 0, 1e6, -1e6)
        upstream[-1] = 3e3
    else:  # a term for each dimension: 1/2 sum_m g_m (t_md^2 - 1)
        x[:, ::2] = math.exp(0.25) * math.sqrt(1 + 16.2 / 17)  # 17 terms outweigh 16 by a little
        upstream = torch.full((M,), 5e3)
    tensors = [t.half() for t in (x, mu, torch.full((1, 1), 0.5))]
    want = gradient(operation, [t.float() for t in tensors], "composite", upstream)
    assert 100 < want.abs().max() < 65_504
    torch.testing.assert_close(gradient(operation, tensors, "composite", upstream).float(), want, rtol=2e-3, atol=0.0)
