"""Each CUDA kernel once, emulated, in every tier; the tests marked `emulated` go into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from budget import allowance, assert_within, diffuse_case, hard_case, run
from support.internals import Operators

from .smoke import assert_sampling_and_kl_are_the_specifications, assert_score_is_right
from .test_cuda import everything
from .test_cuda_precisions import assert_within_products, log_prob_at
from .test_mixture_edges import with_nan


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_the_density_and_its_gradients(shared: bool) -> None:
    """Several tiles, a component left out or absent; D of whole vectors or not; all gradients or not the negligible."""
    for dtype, D, dense in ((torch.float32, 8, False), (torch.float64, 5, True)):
        case = hard_case(135, 140, D, dtype=dtype)
        case = replace(case, exclude=torch.arange(135) - 1)
        if shared:
            case = replace(case, logvar=torch.linspace(-1, 1, D, dtype=dtype))
        assert_within(run(with_nan(case), "cuda", dense), *allowance(case, dense), f"{dtype} {D}")


@pytest.mark.usefixtures("emulated")
def test_the_score() -> None:
    assert_score_is_right("cuda")


@pytest.mark.usefixtures("emulated")
def test_sampling_and_kl_are_the_specifications() -> None:
    assert_sampling_and_kl_are_the_specifications("cuda")


@pytest.mark.usefixtures("emulated_tiled")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_product_form(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles; a component left out; the gradients by products and, above D = 64, by differences."""
    for M, K, D in ((130, 140, 9), (20, 100, 66)):
        case = replace(diffuse_case(M, K, D), exclude=torch.arange(M) - 1)
        assert_within_products(case, precision, what=f"M={M} K={K} D={D}")
        monkeypatch.setenv("FASTVAE_EMULATION_ORDER", "descending")
        backwards = log_prob_at(case, precision)
        monkeypatch.delenv("FASTVAE_EMULATION_ORDER")
        assert torch.equal(backwards, log_prob_at(case, precision))


def test_no_thread_depends_on_when_another_runs(emulated: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of shared memory without a barrier after its write would give other bits in another order."""
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("FASTVAE_EMULATION_ORDER", order)
        results.append(everything(emulated, 20, 150, 5, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
