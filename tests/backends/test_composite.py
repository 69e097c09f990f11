"""The chunks of the composite backend: the same results whatever their size."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from budget import Case, allowance, assert_within, diffuse_case, hard_case, run
from support.internals import COMPOSITE_CHUNK, composite_chunk_on, set_composite_chunk

import fastvae

# one number at a time; a row against some of the components; some rows; some rows with a last piece of one
SIZES = [1, 40, 130, 333]


def cases() -> list[Case]:
    """M = 17, K = 33, D = 5: excluded components beyond the first chunk, a shared logvar, no weights."""
    hard, diffuse = hard_case(17, 33, 5), diffuse_case(17, 33, 5)
    return [
        hard,
        replace(hard, exclude=2 * torch.arange(17) - 1),
        replace(diffuse, logvar=diffuse.logvar[:1], exclude=torch.arange(17)),
        replace(diffuse, log_weights=torch.full((33,), -torch.inf)),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_mixture(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    expected = [(case, *allowance(case)) for case in cases()]
    set_composite_chunk(monkeypatch, size)
    for case, want, allowed in expected:
        assert_within(run(case, "composite"), want, allowed)
        args = case.z, case.mu, case.logvar, case.log_weights
        log_prob, score = fastvae.mixture_log_prob_and_score(*args, exclude=case.exclude, impl="composite")
        ones = replace(case, grad=torch.ones(17))
        want, allowed = allowance(ones)
        assert_within(type(want)(log_prob, score, *want[2:]), want, allowed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path_derivative", [False, True], ids=["total", "path"])
def test_gaussian(monkeypatch: pytest.MonkeyPatch, size: int, path_derivative: bool) -> None:
    """Several whole samples at a time, or some rows of one; sums over samples may be rounded otherwise."""
    mu, logvar = torch.randn(2, 7, 9)
    results = []
    for chunk in (COMPOSITE_CHUNK, size):
        set_composite_chunk(monkeypatch, chunk)
        leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        torch.manual_seed(1)
        z, log_q = fastvae.gaussian_rsample(*leaves, 11, path_derivative=path_derivative, impl="composite")
        grads = torch.autograd.grad((z.square().sum(-1) * log_q).sum(), leaves)
        results.append((z.detach(), log_q.detach(), *grads))
    (z, log_q, *grads), (want_z, want_log_q, *want_grads) = results
    assert torch.equal(z, want_z) and torch.equal(log_q, want_log_q)
    for got, want in zip(grads, want_grads, strict=True):
        # 11 terms, each a product of a few numbers of at most 100
        assert torch.allclose(got, want, rtol=0, atol=11 * 2**-24 * float(want.abs().max()) * 4)


@pytest.mark.parametrize(
    ("memory", "float32", "float64"), [(2**29, 2**21, 2**20), (2**34, 2**26, 2**25), (2**37, 2**26, 2**26)]
)
def test_on_a_gpu(memory: int, float32: int, float64: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so large that kernels take longer than their launches; four of them are at most 1/16 of the memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert composite_chunk_on(torch.device("cuda"), 4) == float32
    assert composite_chunk_on(torch.device("cuda"), 8) == float64
    assert composite_chunk_on(torch.device("meta"), 4) == 2**26
