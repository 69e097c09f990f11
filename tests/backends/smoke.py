"""What the smoke tests of several backends ask alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from budget import allowance, assert_within, hard_case

import fastvae


def assert_score_is_right(impl: str) -> None:
    """log p(z) and its score, within the error budget."""
    case = hard_case(17, 65, 8)
    want, allowed = allowance(replace(case, grad=torch.ones(17)), dense_backward=True)
    log_prob, score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, impl=impl)
    assert_within(type(want)(log_prob, score, *want[2:]), want, allowed)


def assert_sampling_and_kl_are_the_specifications(impl: str) -> None:
    """The specification's samples, from blocks of four and one by one, and its KL; and their gradients."""
    for shape in ((7, 33), (3, 8)):
        mu, logvar = torch.randn(2, *shape, dtype=torch.float64)
        results = []
        for name in (impl, "reference"):
            leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_()]
            torch.manual_seed(3)
            z, log_q = fastvae.gaussian_rsample(*leaves, 2, path_derivative=True, impl=name)
            kl = fastvae.gaussian_kl(*leaves, impl=name)
            loss = (z.square().sum(-1) * log_q).sum() + kl.square().sum()
            results.append((z, log_q, kl, *torch.autograd.grad(loss, leaves)))
        for got, want in zip(*results, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
