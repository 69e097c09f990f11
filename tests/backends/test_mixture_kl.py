"""mixture_kl: sampling, log q and log p in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import Node

import fastvae


def arguments() -> tuple[Tensor, ...]:
    """mu, logvar [4, 3] of the posterior; mu, logvar, log_weights of seven components."""
    torch.manual_seed(1)
    posterior = torch.randn(4, 3), torch.randn(4, 3) - 1
    return *posterior, torch.randn(7, 3), 0.3 * torch.randn(7, 3), torch.log_softmax(torch.randn(7), 0)


def test_is_its_composition(impl: str) -> None:
    """The same bits, values and gradients, as its two parts called in turn."""
    for path in (False, True):
        for num_samples in (None, 1, 3):
            results = []
            for together in (True, False):
                leaves = [v.requires_grad_() for v in arguments()]
                torch.manual_seed(2)
                if together:
                    z, kl = fastvae.mixture_kl(*leaves, num_samples, path_derivative=path, impl=impl)
                else:
                    z, log_q = fastvae.gaussian_rsample(*leaves[:2], num_samples, path_derivative=path, impl=impl)
                    kl = log_q - fastvae.mixture_log_prob(z, *leaves[2:], impl=impl)
                assert kl.shape == z.shape[:-1] == ((4,) if num_samples is None else (num_samples, 4))
                results.append((z, kl, *torch.autograd.grad((kl * kl.detach().cos()).sum(), leaves)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_in_part(impl: str) -> None:
    """A frozen prior, a frozen posterior, z used or not: the gradients of the composition, to its bits."""
    args = arguments()
    for wanted in ((0, 1), (0,), (2, 3, 4), (0, 3)):
        for upstream in ("kl", "z", "both"):
            if upstream == "z" and min(wanted) > 1:
                continue  # z does not depend on the prior
            results = []
            for together in (True, False):
                leaves = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(args)]
                torch.manual_seed(2)
                if together:
                    z, kl = fastvae.mixture_kl(*leaves, 2, impl=impl)
                else:
                    z, log_q = fastvae.gaussian_rsample(*leaves[:2], 2, impl=impl)
                    kl = log_q - fastvae.mixture_log_prob(z, *leaves[2:], impl=impl)
                loss = torch.zeros(())
                if upstream != "z":
                    loss = loss + (kl * kl.detach().cos()).sum()
                if upstream != "kl":
                    loss = loss + (z * z.detach().sin()).sum()
                inputs = [leaf for leaf in leaves if leaf.requires_grad]
                results.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
            for got, want in zip(*results, strict=True):
                assert torch.equal(got, want), (wanted, upstream)


def test_one_node_of_the_graph(impl: str) -> None:
    leaves = [v.requires_grad_() for v in arguments()]
    z, kl = fastvae.mixture_kl(*leaves, impl=impl)
    assert node_of(z) is node_of(kl) and type(node_of(kl)).__name__ == "MixtureKLBackward"


def node_of(result: Tensor) -> Node:
    """What computed it, before it was brought back from a GPU."""
    node = result.grad_fn
    while node is not None and type(node).__name__ == "ToCopyBackward0":
        node = node.next_functions[0][0]
    assert node is not None
    return node


def test_against_autograd_of_the_specification(impl: str) -> None:
    for path in (False, True):
        grads = []
        for backend in (impl, "reference"):
            leaves = [v.double().requires_grad_() for v in arguments()]
            torch.manual_seed(2)
            _, kl = fastvae.mixture_kl(*leaves, 3, path_derivative=path, impl=backend)
            grads.append(torch.autograd.grad(kl.sum(), leaves))
        # noise that agrees to 1e-6 in backends that compute it in float32
        assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip(*grads, strict=True))


def test_exclude_is_for_every_sample(impl: str) -> None:
    """exclude [B] leaves the component out of all S samples of its row; [S, B] is taken as it is."""
    args = arguments()
    exclude = torch.tensor([-1, 0, 6, 3])
    results = []
    for given in (exclude, exclude.expand(5, 4)):
        torch.manual_seed(2)
        results.append(fastvae.mixture_kl(*args, 5, exclude=given, impl=impl))
    assert torch.equal(results[0][1], results[1][1])
    z, kl = results[0]
    torch.manual_seed(2)
    _, log_q = fastvae.gaussian_rsample(*args[:2], 5, impl=impl)
    for row, k in enumerate(exclude.tolist()):
        keep = torch.arange(7) != k
        log_p = fastvae.mixture_log_prob(z[:, row], *(v[keep] for v in args[2:]), impl=impl)
        # the same terms, tiled otherwise: a few roundings of numbers below 50
        assert torch.allclose(kl[:, row], (log_q[:, row] - log_p), atol=50 * 8 * 2**-24)


def test_half_precision_kl_is_float32(impl: str) -> None:
    """log q and log p are both of z before it is rounded, else sigma = 1e-3 would be lost in bfloat16."""
    mu, logvar = (
        torch.full((4, 3), 1.3, dtype=torch.bfloat16),
        torch.full((4, 3), -13.8, dtype=torch.bfloat16),
    )
    torch.manual_seed(2)
    z, kl = fastvae.mixture_kl(mu, logvar, mu, logvar, None, 3, impl=impl)
    torch.manual_seed(2)
    _, want = fastvae.mixture_kl(*(v.float() for v in (mu, logvar, mu, logvar)), None, 3, impl=impl)
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert torch.equal(kl, want)
    # q is every component of p, so the KL is zero: what is left is eps |mu| / sigma roundings
    assert float(kl.abs().max()) < 3 * 5 * 1.3 * math.exp(6.9) * 4 * 2**-24


def test_empty_batch(impl: str) -> None:
    for shape in ((0, 3), (2, 0, 3)):
        mu = torch.zeros(shape, requires_grad=True)
        z, kl = fastvae.mixture_kl(mu, torch.zeros(()), *arguments()[2:], 4, impl=impl)
        assert z.shape == (4, *shape) and kl.shape == (4, *shape[:-1])
        kl.sum().backward()
        assert mu.grad is not None and mu.grad.shape == shape
