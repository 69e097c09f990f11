"""The reparameterised sampler and the closed-form KL."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.backend import BACKENDS, device_of, few_shapes, use_backend
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import fastvae
from fastvae import reference

# flat sizes that are no multiple of the four numbers of a Philox block, some beyond one thread's share, and rows so
# wide that Triton takes them in pieces
SHAPES = [(1,), (3,), (5, 1), (1, 7), (3, 5), (7, 33), (2, 3, 5), (257, 129), (2, 2501), (0, 4), (2, 0, 3)]


@pytest.fixture(params=[name for name in BACKENDS if name not in ("triton-small", "cuda-emulated-tiled")])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend once: there is one kernel of each kind for small and large problems alike."""
    return use_backend(request.param, monkeypatch)


def posterior(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    mu = 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
    return mu.to(dtype), torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def sample(seed: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return fastvae.gaussian_rsample(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_the_noise_of_every_backend_is_the_same(impl: str, num_samples: int | None, dtype: torch.dtype) -> None:
    """eps agrees to 1e-6 in either dtype, the contract's figure; log q to the roundings of its D terms."""
    compiling = few_shapes(impl) and device_of(impl).type == "cuda"  # for each D a kernel
    for shape in SHAPES[5:] if compiling else SHAPES:
        mu, logvar = posterior(shape, dtype)
        z, log_q = sample(5, mu, logvar, num_samples, impl=impl)
        want, want_q = sample(5, mu.double(), logvar.double(), num_samples, impl="reference")
        assert z.dtype == log_q.dtype == dtype
        assert z.shape == want.shape == (shape if num_samples is None else (num_samples, *shape))
        assert log_q.shape == z.shape[:-1]
        eps = (want - mu.double()) / torch.exp(0.5 * logvar.double())
        # besides the noise: rounding sigma eps and its sum with mu
        u = torch.finfo(dtype).eps / 2
        sigma = torch.exp(0.5 * logvar.double())
        assert bool(((z - want).abs() <= 1e-6 * sigma + u * (4 * sigma * eps.abs() + 2 * want.abs())).all()), shape
        # log q moves by |eps| 1e-6 a dimension, and is a sum of 3 D numbers
        size = (eps.square() + logvar.abs() + 2).sum(-1)
        limit = 1e-6 * eps.abs().sum(-1) + u * size * (4 + math.sqrt(3 * shape[-1]))
        assert bool(((log_q - want_q).abs() <= limit).all()), shape


def test_seeds_and_generators(impl: str) -> None:
    """manual_seed repeats a draw, two calls differ, and a generator stands apart from the global stream."""
    mu, logvar = posterior((5, 33))
    first, _ = sample(1, mu, logvar, impl=impl)
    second, _ = fastvae.gaussian_rsample(mu, logvar, impl=impl)
    assert not torch.equal(first, second)
    assert torch.equal(first, sample(1, mu, logvar, impl=impl)[0])
    assert not torch.equal(first, sample(2, mu, logvar, impl=impl)[0])

    def given() -> Tensor:
        return fastvae.gaussian_rsample(mu, logvar, generator=torch.Generator().manual_seed(1), impl=impl)[0]

    state = torch.get_rng_state()
    assert torch.equal(given(), given()) and torch.equal(given(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_and_rows_have_noise_of_their_own(impl: str) -> None:
    z, _ = fastvae.gaussian_rsample(torch.zeros(50, 20), torch.zeros(()), 7, impl=impl)
    assert z.unique().numel() > 0.99 * z.numel()


def test_log_q_is_the_density_of_z(impl: str) -> None:
    for shape, num_samples in (((7, 33), 3), ((5, 1), None)):
        mu, logvar = posterior(shape, torch.float64)
        z, log_q = fastvae.gaussian_rsample(mu, logvar, num_samples, impl=impl)
        want = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z)
        # torch's way divides by sigma^2 what z - mu has cancelled: a few roundings of |mu| / sigma, times eps
        assert torch.allclose(log_q, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(impl: str, dtype: torch.dtype) -> None:
    """z in the input's dtype, log q in float32 and that of the upcast inputs."""
    mu, logvar = posterior((7, 33), dtype)
    z, log_q = sample(3, mu, logvar, 2, impl=impl)
    want, want_q = sample(3, mu.float(), logvar.float(), 2, impl=impl)
    assert z.dtype == dtype and torch.equal(z, want.to(dtype))
    assert log_q.dtype == torch.float32 and torch.equal(log_q, want_q)
    kl = fastvae.gaussian_kl(mu, logvar, impl=impl)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, fastvae.gaussian_kl(mu.float(), logvar.float(), impl=impl))


@pytest.mark.parametrize("path_derivative", [False, True], ids=["total", "path"])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_backward_is_the_specifications(impl: str, num_samples: int | None, path_derivative: bool) -> None:
    """Against autograd through the reference, in float64, where both err by roundings of 1e-16."""
    for shape in ((7, 33), (2, 3, 5), (1, 1), (300, 129)):
        mu, logvar = (v.requires_grad_() for v in posterior(shape, torch.float64))
        grads = []
        for backend in (impl, "reference"):
            z, log_q = sample(4, mu, logvar, num_samples, path_derivative=path_derivative, impl=backend)
            torch.manual_seed(0)
            upstream = [torch.randn_like(z), torch.randn_like(log_q)]
            for outputs in ([0], [1], [0, 1]):
                grads += torch.autograd.grad(
                    [(z, log_q)[i] for i in outputs],
                    (mu, logvar),
                    [upstream[i] for i in outputs],
                    retain_graph=True,
                )
        for got, want in zip(grads[:6], grads[6:], strict=True):
            # the noise itself may differ by 1e-6 in the last digits of sine and logarithm, by the contract
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), shape


@pytest.mark.parametrize("path_derivative", [False, True], ids=["total", "path"])
@pytest.mark.parametrize("D", [140, 396])
def test_wide_rows_of_whole_fours(impl: str, D: int, path_derivative: bool) -> None:
    """In float32, where a CUDA lane takes two fours of such a row at a time; not every lane has the second."""
    mu, logvar = (v.requires_grad_() for v in posterior((9, D)))
    results = []
    for backend, inputs in ((impl, (mu, logvar)), ("reference", (mu.double(), logvar.double()))):
        z, log_q = sample(4, *inputs, 2, path_derivative=path_derivative, impl=backend)
        kl = fastvae.gaussian_kl(*inputs, impl=backend)
        torch.manual_seed(0)
        upstream = [torch.randn(output.shape).to(output) for output in (z, log_q, kl)]
        gradients = [
            *torch.autograd.grad([z, log_q], inputs, upstream[:2]),
            *torch.autograd.grad(kl, inputs, upstream[2]),
        ]
        results.append([z, log_q, kl, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("D", [256, 257])  # rows that begin where a vector does, and rows that do not
def test_results_beyond_the_caches(cpu_impl: str, D: int) -> None:
    """Above 8 MiB results are stored another way: every row is there, the first ones with a small call's bits."""
    M = (8 << 20) // (4 * D) + 2
    mu, logvar = (v.requires_grad_() for v in posterior((M, D)))

    def results(rows: int) -> list[Tensor]:
        z, _ = sample(3, mu[:rows], logvar[:rows], impl=cpu_impl)
        kl = fastvae.gaussian_kl(mu[:rows], logvar[:rows], impl=cpu_impl)
        return [z, *torch.autograd.grad(z.sum(), (mu, logvar)), *torch.autograd.grad(kl.sum(), (mu, logvar))]

    large = results(M)
    assert all(torch.equal(got[:3], want[:3]) for got, want in zip(large, results(3), strict=True))
    z, dmu, dlogvar, kl_dmu, kl_dlogvar = large
    assert torch.equal(dmu, torch.ones(M, D)) and torch.equal(kl_dmu, mu)
    assert torch.allclose(dlogvar, 0.5 * (z - mu), rtol=1e-4, atol=1e-5)
    assert torch.allclose(kl_dlogvar, 0.5 * torch.expm1(logvar), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_no_bit_depends_on_the_threads(dtype: torch.dtype) -> None:
    mu, logvar = (v.requires_grad_() for v in posterior((700, 129), dtype))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            z, log_q = sample(6, mu, logvar, 3, impl="cpu")
            kl = fastvae.gaussian_kl(mu, logvar, impl="cpu")
            loss = z.square().sum() + log_q.square().sum() + kl.square().sum()
            results.append((z, log_q, kl, *torch.autograd.grad(loss, (mu, logvar))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_gradients_asked_for(impl: str) -> None:
    """mu alone, logvar alone, and a logvar that is shared."""
    mu, logvar = posterior((7, 5))
    full: dict[str, Tensor] = {}
    for need_mu, need_logvar in ((True, True), (True, False), (False, True)):
        leaves = mu.clone().requires_grad_(need_mu), logvar.clone().requires_grad_(need_logvar)
        z, log_q = sample(4, *leaves, 3, impl=impl)
        (z.square().sum() + log_q.sum()).backward()
        for name, leaf, need in zip(("mu", "logvar"), leaves, (need_mu, need_logvar), strict=True):
            assert (leaf.grad is not None) == need
            if leaf.grad is not None:
                assert torch.equal(leaf.grad, full.setdefault(name, leaf.grad))
    for shape in ((), (5,), (7, 1)):
        shared = torch.full(shape, 0.3, requires_grad=True)
        own = torch.full((7, 5), 0.3, requires_grad=True)
        for leaf in (shared, own):
            z, log_q = sample(4, mu, leaf, impl=impl)
            (z.square().sum() + log_q.sum()).backward()
        assert shared.grad is not None and own.grad is not None and shared.grad.shape == shape
        assert torch.allclose(shared.grad, own.grad.sum_to_size(shape) if shape else own.grad.sum(), rtol=1e-5, atol=0)


def test_path_derivative_vanishes_at_the_optimum(impl: str) -> None:
    """Its defining property: where q = p, the gradient of log q - log p is zero in every sample."""
    mu, logvar = (v.requires_grad_() for v in posterior((1, 5), torch.float64))
    grads = {}
    for path in (True, False):
        z, log_q = sample(0, mu, logvar, 10, path_derivative=path, impl=impl)
        log_p = fastvae.mixture_log_prob(z, mu.detach(), logvar.detach(), impl=impl)
        each = [torch.autograd.grad((log_q - log_p)[i, 0], (mu, logvar), retain_graph=True) for i in range(10)]
        grads[path] = torch.stack([torch.cat(pair) for pair in each])
    # the two scores are the same number computed in two ways, of a size up to |eps| / sigma, about 20 here
    assert float(grads[True].abs().max()) < 1e-12
    assert float(grads[False].abs().max()) > 0.1


def test_path_derivative_does_not_change_the_values(impl: str) -> None:
    mu, logvar = posterior((7, 33))
    for a, b in zip(
        sample(4, mu, logvar, path_derivative=True, impl=impl), sample(4, mu, logvar, impl=impl), strict=True
    ):
        assert torch.equal(a, b)


def noise(impl: str, n: int) -> Tensor:
    """n numbers, a multiple of 500, that should be standard normal, as float64."""
    z, _ = sample(11, torch.zeros(n // 500, 500), torch.zeros(()), impl=impl)
    return z.flatten().double()


def test_the_noise_is_standard_normal(impl: str) -> None:
    """Moments within five of their standard errors; Kolmogorov-Smirnov distance below its 1e-6 quantile."""
    n = 400_000
    eps = noise(impl, n)
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((eps**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    cdf = torch.special.ndtr(eps.sort().values)
    ranks = torch.arange(n, dtype=torch.float64) / n
    distance = float(torch.maximum((cdf - ranks).abs(), (cdf - ranks - 1 / n).abs()).max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))  # Massart's bound


def test_the_numbers_of_a_block_are_independent(impl: str) -> None:
    """Within and between blocks, the numbers and their squares: cosine and sine share a radius."""
    blocks = noise(impl, 400_000).reshape(-1, 8)  # two Philox blocks a row
    for numbers in (blocks, (blocks.square() - 1) / math.sqrt(2)):
        correlation = numbers.T @ numbers / len(numbers)
        off = correlation - torch.diag(correlation.diagonal())
        assert float(off.abs().max()) < 5 / math.sqrt(len(numbers))  # five standard errors of a correlation of zero


def test_different_seeds_give_independent_streams(impl: str) -> None:
    draws = torch.stack([sample(s, torch.zeros(100, 500), torch.zeros(()), impl=impl)[0].flatten() for s in range(4)])
    correlation = draws @ draws.T / draws.shape[1]
    for i, j in itertools.combinations(range(4), 2):
        assert abs(float(correlation[i, j])) < 5 / math.sqrt(draws.shape[1])


def test_flat_index_beyond_32_bits() -> None:
    """The stream goes on past 2^32 numbers: another block there, not the first again."""
    seed = torch.tensor([7])
    start = reference.philox_normal(seed, 0, 8)
    far = reference.philox_normal(seed, 2**34, 8)
    assert not torch.isin(far, start).any()
    assert torch.equal(far[3:], reference.philox_normal(seed, 2**34 + 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_kl_is_that_of_torch(impl: str, dtype: torch.dtype) -> None:
    for shape in ((7, 33), (1,), (2, 3, 5), (0, 4), (300, 257)):
        mu, logvar = posterior(shape, dtype)
        got = fastvae.gaussian_kl(mu, logvar, impl=impl)
        q = Normal(mu.double(), torch.exp(0.5 * logvar.double()))
        want = kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
        # a sum of 3 D numbers of one sign or small, each to a few roundings
        assert got.dtype == dtype and got.shape == shape[:-1]
        u = torch.finfo(dtype).eps / 2
        size = (mu.square() + torch.exp(logvar) + logvar.abs() + 1).double().sum(-1)
        assert bool(((got - want).abs() <= u * size * (4 + math.sqrt(shape[-1]))).all()), shape


def test_kl_near_zero_does_not_cancel(impl: str) -> None:
    """At logvar = 1e-3 the KL is 2.5e-7, of which exp(logvar) - 1 - logvar in float32 has no digit."""
    v = torch.tensor([[1e-3], [-1e-3], [3e-2]])
    got = fastvae.gaussian_kl(torch.zeros(3, 1), v, impl=impl)[:, None].double()
    exact = 0.5 * (torch.expm1(v.double()) - v.double())
    # expm1(v) - v loses 2 u v, of v^2 / 2: 4 u / v relative, twice over for a rounded expm1
    assert bool(((got - exact).abs() <= 8 * 2**-24 / v.abs() * exact).all())
    naive = (0.5 * (torch.exp(v) - 1 - v)).double()
    assert bool(((naive - exact).abs() > 8 * 2**-24 / v.abs() * exact)[:2].any())


def test_kl_backward(impl: str) -> None:
    mu, logvar = (v.requires_grad_() for v in posterior((4, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda *args: fastvae.gaussian_kl(*args, impl=impl), (mu, logvar))
    shared = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: fastvae.gaussian_kl(*args, impl=impl), (mu, shared))
    for leaf in (mu, logvar):
        (got,) = torch.autograd.grad(fastvae.gaussian_kl(mu, logvar, impl=impl).sum(), leaf)
        want = mu if leaf is mu else 0.5 * torch.expm1(logvar)
        assert torch.allclose(got, want, rtol=1e-14, atol=0)


def test_kl_gradient_near_zero_does_not_cancel(impl: str) -> None:
    """d KL / d logvar = expm1(logvar) / 2, to a few roundings where exp(logvar) - 1 has lost ten bits."""
    v = torch.tensor([[1e-4, -1e-4]], requires_grad=True)
    (got,) = torch.autograd.grad(fastvae.gaussian_kl(torch.zeros(1, 2), v, impl=impl).sum(), v)
    want = 0.5 * torch.expm1(v.detach().double())
    assert bool(((got - want).abs() <= 4 * 2**-24 * want.abs()).all())


def test_double_backward_raises(each_impl: str) -> None:
    """As for the mixture: a penalty on a gradient must not be dropped in silence."""
    mu, logvar = (v.requires_grad_() for v in posterior((4, 5)))
    z, _ = fastvae.gaussian_rsample(mu, logvar, impl=each_impl)
    for output in (z.sum(), fastvae.gaussian_kl(mu, logvar, impl=each_impl).sum()):
        (gradient,) = torch.autograd.grad(output, logvar, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once|twice|second"):
            (output + gradient.square().sum()).backward()
