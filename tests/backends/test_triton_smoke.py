"""Each Triton kernel once, in every tier; the tests marked `triton` go into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from budget import allowance, assert_within, hard_case, run
from support.backend import device_of, use_backend
from support.internals import operators_of
from torch import Tensor

import fastvae
from fastvae import reference

from .smoke import assert_sampling_and_kl_are_the_specifications, assert_score_is_right
from .test_mixture_edges import with_nan
from .test_triton import product_band, run_at

pytest.importorskip("triton")


@pytest.fixture(params=["triton", "triton-small"])
def tiled_and_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch)


@pytest.mark.usefixtures("tiled_and_small")
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_the_density_and_its_gradients(shared: bool) -> None:
    """Several parts of several tiles, of components and of rows, a component left out or absent; dense or not."""
    for dtype, M, K, dense in ((torch.float32, 20, 200, False), (torch.float64, 140, 30, True)):
        case = hard_case(M, K, 5, dtype=dtype)
        case = replace(case, exclude=torch.arange(M) % K - 1)
        if shared:
            case = replace(case, logvar=torch.linspace(-1, 1, 5, dtype=dtype))
        assert_within(run(with_nan(case), "triton", dense), *allowance(case, dense))


@pytest.mark.usefixtures("tiled_and_small")
def test_the_score() -> None:
    assert_score_is_right("triton")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precisions(precision: str) -> None:
    rng = torch.Generator().manual_seed(0)
    mu, z = torch.randn(70, 20, generator=rng), torch.randn(17, 20, generator=rng)
    case = replace(hard_case(17, 70, 20), z=z, mu=mu, logvar=0.2 * mu.flip(0), log_weights=mu[:, 0].log_softmax(0))
    exact = case.to(torch.float64)
    assert_within(run_at(case, precision), run(exact, "reference"), product_band(exact, precision))


@pytest.mark.usefixtures("triton")
def test_noise_sampling_and_kl() -> None:
    """The specification's numbers, from blocks of four and one by one; and their gradients."""
    assert_sampling_and_kl_are_the_specifications("triton")
    noise = reference.philox_normal(torch.tensor([5]), 0, 64)
    mu = torch.zeros(1, 64)
    assert torch.allclose(sampled(mu, 5), noise.float()[None], atol=1e-6)


def sampled(mu: Tensor, seed: int) -> Tensor:
    there = mu.to(device_of("triton"))
    return (
        operators_of("triton").gaussian_rsample(there, there, torch.tensor([seed], device=there.device), 1)[0][0].to(mu)
    )


@pytest.mark.usefixtures("tiled_and_small")
def test_mixture_kl_is_its_parts() -> None:
    """The same bits in one call, values and gradients."""
    results = []
    for together in (True, False):
        torch.manual_seed(1)
        leaves = [torch.randn(n, 6, requires_grad=True) for n in (4, 4, 40, 40)]
        torch.manual_seed(2)
        if together:
            z, kl = fastvae.mixture_kl(*leaves, None, 2, impl="triton")
        else:
            z, log_q = fastvae.gaussian_rsample(*leaves[:2], 2, impl="triton")
            kl = log_q - fastvae.mixture_log_prob(z, *leaves[2:], impl="triton")
        results.append((z, kl, *torch.autograd.grad(kl.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
