"""Backward for large problems in the CUDA kernels: each of its shapes, and where tiles, panels and stages end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from budget import allowance, assert_within, diffuse_case, hard_case, run
from support.internals import Operators


@pytest.fixture
def tiled(emulated_small: Operators, monkeypatch: pytest.MonkeyPatch) -> Operators:
    """The kernels for large problems, at any size."""
    monkeypatch.setenv("FASTVAE_TILES", "1")
    return emulated_small


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("D", [7, 32, 33, 48, 49, 64, 65, 130])
def test_every_width_of_a_lane_and_every_chunk(D: int, dtype: torch.dtype) -> None:
    """Two, three and four dimensions a lane; more than one block of dimensions; a last panel whose second half is empty
    or not; a component left out for each row; few pairs with a weight, and all of them."""
    for M, K in ((130, 150), (5, 250)):
        exclude = torch.arange(M) % (K + 1) - 1
        for made, dense in ((hard_case, False), (diffuse_case, True)):
            case = replace(made(M, K, D, dtype=dtype), exclude=exclude)
            assert_within(run(case, "cuda", dense), *allowance(case, dense), f"{made.__name__} M={M} K={K} D={D}")


@pytest.mark.parametrize("D", [20, 40, 70])
def test_an_item_without_weight_changes_no_bit(tiled: Operators, D: int) -> None:
    """A stage whose items all have a weight is another loop than one in which an item has none.  So a row that counts
    nothing and one that counts too little to change a sum give the same bits."""
    M, K = 130, 100
    case = diffuse_case(M, K, D)
    args = case.z, case.mu, case.logvar, None, None
    log_prob = tiled.mixture_log_prob(*args)
    results = []
    for grad_of_one in (0.0, 1e-30):
        grad = torch.ones(M)
        grad[3] = grad_of_one
        dense, of_z, of_mu, of_logvar, of_log_weights = True, True, True, True, False
        wanted = dense, of_z, of_mu, of_logvar, of_log_weights
        results.append(tiled.mixture_log_prob_backward(grad, log_prob, *args, *wanted))
    without, tiny = results
    assert torch.equal(without[1], tiny[1]) and torch.equal(without[2], tiny[2])
    assert not without[0][3].any() and tiny[0][3].any()
    others = torch.arange(M) != 3
    assert torch.equal(without[0][others], tiny[0][others])


@pytest.mark.parametrize("D", [20, 70])
def test_no_thread_depends_on_when_another_runs(tiled: Operators, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At widths that the test of all kernels has not, and with several blocks of dimensions."""
    M, K = 140, 200
    case = hard_case(M, K, D)
    args = case.z, case.mu, case.logvar, case.log_weights, torch.arange(M) % (K + 1) - 1
    log_prob = tiled.mixture_log_prob(*args)
    results = []
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("FASTVAE_EMULATION_ORDER", order)
        results.append(tiled.mixture_log_prob_backward(case.grad, log_prob, *args, False, True, True, True, True))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))
